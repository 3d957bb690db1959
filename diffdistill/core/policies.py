"""Policies: what one pass of a network says of x0 all along a stretch of a trajectory, at any x and t on it.

Chen et al. 2025, arXiv:2510.14974. In the normal form x_t = cos(t) x0 + sin(t) eps: a pass at x_s gives a function
x0(x, t) for the angles t from s down to e, which is cheap; its flow is integrated by DDIM steps without the network.

This file needs nothing of this package: an exported folder holds a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("mixture", "nodes")


def wide_channels(kind: str, components: int, channels: int) -> int:
    """Channels of a network's output that says a policy for samples of so many channels."""
    return components * (channels + 1) + 1 if kind == "mixture" else components * channels


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Policy:
    """x0 as a function of x (B, C, ...) and t (B,) float64, for e <= t <= s, from a pass at x_s."""

    x_s: Tensor  #: (B, C, ...)
    s: Tensor  #: (B,) float64 angles
    e: Tensor  #: (B,)
    values: Tensor  #: (B, K, C, ...) the K components' x0

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, ...) at x (B, C, ...) and the angles t (B,), above 0."""
        raise NotImplementedError

    def v(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, ...) dx/dt there, cos(t) eps - sin(t) x0."""
        return (_like(torch.cos(t), x) * x - self.x0(x, t)) / _like(torch.sin(t), x)

    def roll(self, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        """(B, C, ...) from x (B, C, ...) at the angles t (B,) to r (B,), by so many DDIM steps, even in the angle."""
        for k in range(steps):
            here, there = (torch.lerp(t, r, (k + j) / steps) for j in (0, 1))
            x0 = self.x0(x, here)
            kept = torch.sin(there) / torch.sin(here)
            x = _like(kept, x) * x + _like(torch.cos(there) - kept * torch.cos(here), x) * x0
        return x


@dataclass(frozen=True)
class Mixture(Policy):
    """x0 given x_s is a mixture of Gaussians, of one width, at each position; at (x, t) it is conditioned on x too.

    N(m, var) times the ratio of the likelihoods of x and x_s, exp(x0 nu - zeta x0^2/2), is Gaussian again.
    """

    logits: Tensor  #: (B, K, 1, ...)
    log_std: Tensor  #: (B, 1, 1, ...) of the width, in units of sin(s)

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """The mean of the mixture at (x, t)."""
        var = (self.log_std.exp() * _like(torch.sin(self.s), self.log_std)) ** 2
        zeta = _like(torch.tan(t) ** -2 - torch.tan(self.s) ** -2, self.values)
        of_x, of_x_s = (_like(torch.cos(angle) / torch.sin(angle) ** 2, x) for angle in (t, self.s))
        nu = (of_x * x - of_x_s * self.x_s)[:, None]
        scale = var * zeta + 1
        logits = self.logits + (self.values * (nu - zeta * self.values / 2)).sum(2, keepdim=True) / scale
        return (torch.softmax(logits, 1) * (var * nu + self.values) / scale).sum(1)


@dataclass(frozen=True)
class Nodes(Policy):
    """K values of x0 at angles evenly spaced from e, the first, to s, the last; linear in the angle between."""

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """Whatever x is."""
        last = self.values.shape[1] - 1
        place = ((t - self.e) / (self.s - self.e)).clamp(0, 1) * last
        below = place.floor().clamp(max=last - 1)
        rows, low = torch.arange(len(t), device=x.device), below.long()
        return torch.lerp(self.values[rows, low], self.values[rows, low + 1], _like(place - below, x))


def policy_of(
    kind: str, components: int, y: Tensor, x_s: Tensor, s: Tensor, e: Tensor, of_x: Tensor, of_y: Tensor
) -> Policy:
    """The policy that the output y (B, `wide_channels`, ...) of a pass at x_s (B, C, ...) and angles s (B,) says, to e.

    A network's prediction y says x0 = of_x x_s + of_y y, both (B,); each component's is such a prediction.
    """
    c = x_s.shape[1]
    means = y[:, : components * c].unflatten(1, (components, c))
    values = _like(of_x, means) * x_s[:, None] + _like(of_y, means) * means
    if kind == "nodes":
        return Nodes(x_s, s, e, values)
    logits = y[:, components * c : -1].unsqueeze(2)
    log_std = y[:, -1:].flatten(1).mean(1)
    return Mixture(x_s, s, e, values, logits, _like(log_std, means))
