"""Exact checks of a method: what is expected, what was got, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from .denoiser import Denoiser
from .players import Teacher


@dataclass(frozen=True)
class Check:
    """One row of `diffdistill verify`.

    kind 'equal' holds when the error is at most the tolerance; 'differs', a negative test, when the error is
    greater: a known mistake must be caught.
    """

    name: str
    expected: float
    got: float
    error: float
    tolerance: float
    kind: Literal["equal", "differs"] = "equal"

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance if self.kind == "equal" else self.error > self.tolerance


def equal(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The relative error |got - expected| / max(|expected|, scale) in the l2 norm is within the tolerance.

    `scale` is what the quantity is measured against where the expected value is zero.
    """
    return _check(name, expected, got, tolerance, scale, "equal")


def differs(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The same comparison must fail: `got` comes from a known mistake."""
    return _check(name, expected, got, tolerance, scale, "differs")


def _check(
    name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, scale: float,
    kind: Literal["equal", "differs"],
) -> Check:  # fmt: skip
    want, have = (torch.as_tensor(v, dtype=torch.float64).detach().flatten() for v in (expected, got))
    size = max(float(want.norm()), scale) or 1.0
    error = float((have - want).norm()) / size
    return Check(name, float(want.norm()), float(have.norm()), error, tolerance, kind)


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """The gradients of a scalar with respect to all parameters, flattened into one vector."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) with sum_i w_i f(z_i) = E f(z), z ~ N(0, 1); exact to degree 2n - 1."""
    import numpy

    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(n))
    return nodes, weights / weights.sum()


@dataclass(frozen=True)
class AffineGame:
    """A teacher N(mu, s^2), an affine student N(m, b^2) of it, and the student's exact fake score, per dimension.

    The score's own means and stds require gradients, so that its training can be checked too.
    """

    teacher: Teacher
    generator: AffineGenerator
    student: Denoiser
    score: GaussianMixture
    fake_score: Denoiser


def affine_game(mu: Tensor, s: Tensor, m: Tensor, b: Tensor) -> AffineGame:
    """All four are (d,) float64."""
    teacher = gaussian_teacher(mu.tolist(), s)
    generator = AffineGenerator(m, b)
    student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.row)
    score = generator.exact_score()
    score.means.requires_grad_()
    score.stds.requires_grad_()
    return AffineGame(teacher, generator, student, score, score.denoiser())


def two_points(d: int) -> tuple[Tensor, Tensor]:
    """z and eps (4^d, d), all signs: their mean is exact for polynomials of degree 3 in each coordinate."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * (2 * d))
    return signs[:, :d], signs[:, d:]


def run_checks(checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """All rows, computed in double precision with a fixed seed."""
    torch.manual_seed(0)
    return list(checks())
