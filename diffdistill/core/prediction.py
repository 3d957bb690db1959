"""What a network predicts, and x0, eps and v from it by one 2x2 solve.

A network output is `y = a x0 + b eps` at `x_t = cos(t) x0 + sin(t) eps`. With
`D = cos(t) b - sin(t) a` the inverse is `x0 = (b x_t - sin(t) y)/D`, `eps = (cos(t) y - a x_t)/D`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Coefficient = Callable[[Tensor, Tensor, float], Tensor]
"""A function of alpha, sigma (B,) and data_std."""


@dataclass(frozen=True)
class Output:
    """A kind of network output: y = a x0_data + b eps at x_native = alpha x0_data + sigma eps."""

    name: str
    a: Coefficient
    b: Coefficient

    def at(self, alpha: Tensor, sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
        """a and b (B,)."""
        return self.a(alpha, sigma, data_std), self.b(alpha, sigma, data_std)

    def __neg__(self) -> Output:
        def negative(coefficient: Coefficient) -> Coefficient:
            return lambda alpha, sigma, data_std: -coefficient(alpha, sigma, data_std)

        return Output(f"-{self.name}", negative(self.a), negative(self.b))


def _zero(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    return torch.zeros_like(alpha)


def _one(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    return torch.ones_like(alpha)


def _edm_a(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    return sigma / (data_std * torch.sqrt(sigma**2 + data_std**2))


def _edm_b(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    return -data_std / torch.sqrt(sigma**2 + data_std**2)


OUTPUTS: dict[str, Output] = {
    output.name: output
    for output in (
        Output("sample", _one, _zero),
        Output("epsilon", _zero, _one),
        Output("v_prediction", lambda alpha, sigma, data_std: -sigma, lambda alpha, sigma, data_std: alpha),
        Output("flow_prediction", lambda alpha, sigma, data_std: -torch.ones_like(alpha), _one),
        Output("edm", _edm_a, _edm_b),
    )
}


def edm_boundary(sigma_min: float) -> Output:
    """F in the consistency model's form, which is exactly the identity at sigma_min.

    x0 = c_skip x + c_out F with sigma - sigma_min in c_skip and c_out (Song et al. 2023, arXiv:2303.01469,
    appendix C), as diffusers' CMStochasticIterativeScheduler computes it.
    """

    def scalings(sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
        # At sigma_min itself F has no weight; the least one keeps the coefficients finite.
        excess = (sigma - sigma_min).clamp_min(1e-12 * sigma_min)
        return data_std**2 / (excess**2 + data_std**2), excess * data_std / torch.sqrt(sigma**2 + data_std**2)

    def a(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
        c_skip, c_out = scalings(sigma, data_std)
        return (1 - c_skip) / c_out

    def b(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
        c_skip, c_out = scalings(sigma, data_std)
        return -c_skip * sigma / c_out

    return Output("edm_boundary", a, b)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype and on the device of `like`."""
    return coefficient.to(like).reshape(-1, *[1] * (like.ndim - 1))


def diffuse(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """(B, ...) x_t = cos(t) x0 + sin(t) eps for t (B,)."""
    return expand(torch.cos(t), x0) * x0 + expand(torch.sin(t), x0) * eps


def _determinant(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cos(t) * b - torch.sin(t) * a


def x0_weights(t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and (B,) what x_t and y are multiplied by in x0, for an output y = a x0 + b eps at the angles t (B,)."""
    det = _determinant(t, a, b)
    return b / det, -torch.sin(t) / det


@dataclass(frozen=True)
class Prediction:
    """A raw output y (B, ...) at x_t (B, ...); a, b, t are (B,) float64, in units where x0 has variance one.

    The output is kept as it came and converted on demand: eps is singular at t = pi/2 for a network that
    predicts eps, and eps is singular at t = 0 for one that predicts x0.
    """

    x_t: Tensor
    t: Tensor
    y: Tensor
    a: Tensor
    b: Tensor

    def _combine(self, of_x: Tensor, of_y: Tensor) -> Tensor:
        det = _determinant(self.t, self.a, self.b)
        return expand(of_x / det, self.x_t) * self.x_t + expand(of_y / det, self.x_t) * self.y

    @property
    def x0(self) -> Tensor:
        """(B, ...) the predicted clean sample, of unit variance."""
        return self._combine(self.b, -torch.sin(self.t))

    @property
    def eps(self) -> Tensor:
        """(B, ...) the predicted noise; the score of x_t is -eps/sin(t)."""
        return self._combine(-self.a, torch.cos(self.t))

    @property
    def v(self) -> Tensor:
        """(B, ...) dx_t/dt of the probability-flow ODE, cos(t) eps - sin(t) x0."""
        cos, sin = torch.cos(self.t), torch.sin(self.t)
        return self._combine(-(self.a * cos + self.b * sin), torch.ones_like(cos))

    def at(self, s: Tensor) -> Tensor:
        """(B, ...) the DDIM step to the angle s (B,): cos(s) x0 + sin(s) eps, in one combination."""
        return self._combine(self.b * torch.cos(s) - self.a * torch.sin(s), torch.sin(s - self.t))

    def with_output(self, y: Tensor) -> Prediction:
        """The same point with another raw output of the same kind."""
        return replace(self, y=y)
