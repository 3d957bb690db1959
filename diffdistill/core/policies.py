"""Policies: what one pass of a network says of x0 all along a stretch of a trajectory, at any x and t on it.

Chen et al. 2025, arXiv:2510.14974; `Heads` are those of Shaul et al. 2026, arXiv:2607.26004, `Momenta` those of
arXiv:2602.09014. In the normal form x_t = cos(t) x0 + sin(t) eps: a pass at x_s gives a function x0(x, t) for the
angles t from s down to e, which is cheap; its flow is integrated without the network, by DDIM steps or in closed form.

This file needs nothing of this package: an exported folder holds a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("mixture", "nodes", "heads", "momenta")


def wide_channels(kind: str, components: int, channels: int) -> int:
    """Channels of a network's output that says a policy for samples of so many channels."""
    more = {"mixture": components + 1, "momenta": 2 * components}  # logits and a width, or logits and rates
    return components * channels + more.get(kind, 0)


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
class Weighted(Policy):
    """A policy whose components have weights at each position."""

    logits: Tensor  #: (B, K, 1, ...)

    def without(self, out: Tensor) -> Weighted:
        """The same without the components where out (B, K) is true."""
        lost = out.reshape(*out.shape, *[1] * (self.logits.ndim - 2))
        return replace(self, logits=self.logits.masked_fill(lost, -1e9))


@dataclass(frozen=True)
class Mixture(Weighted):
    """x0 given x_s is a mixture of Gaussians, of one width, at each position; at (x, t) it is conditioned on x too.

    N(m, var) times the ratio of the likelihoods of x and x_s, exp(x0 nu - zeta x0^2/2), is Gaussian again.
    """

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


@dataclass(frozen=True)
class Heads(Policy):
    """K outputs of the network, each for the step from one angle to the next; x0 depends on the x of that angle."""

    nodes: Tensor  #: (K + 1,) descending angles float64, the last of which is 0
    of_x: Tensor  #: (K,) x0 = of_x x + of_y value at each angle
    of_y: Tensor  #: (K,)

    def _at(self, t: Tensor) -> Tensor:
        """(B,) which of the angles t (B,) are."""
        return (self.nodes[None] - t[:, None]).abs().argmin(1)

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """At one of the angles, t (B,)."""
        k = self._at(t)
        value = self.values[torch.arange(len(k), device=k.device), k]
        return _like(self.of_x[k], x) * x + _like(self.of_y[k], x) * value

    def roll(self, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        """From one of the angles, t (B,), to another one, r (B,), by a DDIM step each between; `steps` is not read.

        The steps are linear in x and in the outputs, and are summed as such.
        """
        here, there = self.nodes[:-1], self.nodes[1:]
        shrunk = torch.sin(there) / torch.sin(here)
        by_x0 = torch.cos(there) - shrunk * torch.cos(here)
        parts = torch.arange(len(here), device=t.device)
        inside = (self._at(t)[:, None] <= parts) & (parts < self._at(r)[:, None])
        kept, moved = torch.where(inside, shrunk + by_x0 * self.of_x, 1.0), torch.where(inside, by_x0 * self.of_y, 0.0)
        # Of what comes in at each angle, and of x, this much is left at the end.
        left = torch.cat([kept.flip(1).cumprod(1).flip(1), torch.ones_like(kept[:, :1])], 1)
        values = torch.einsum("bk,bkd->bd", (moved * left[:, 1:]).to(x), self.values.flatten(2))
        return _like(left[:, 0], x) * x + values.reshape(x.shape)


def _flow_time(t: Tensor) -> Tensor:
    """The time of a flow over data of unit variance, 0 to 1, at the angles t; there x is x_t/(cos(t) + sin(t))."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


@dataclass(frozen=True)
class Momenta(Weighted):
    """The velocity of a flow as K exponentials of its time, whatever x is: sum_k w_k m_k exp(rate_k (s - t)).

    The components' x0 are those of the velocities m_k at x_s.
    """

    rates: Tensor  #: (B, K, 1, ...)

    def _momenta(self) -> Tensor:
        """(B, K, C, ...) w_k m_k."""
        cos, sin = (_like(part(self.s), self.values) for part in (torch.cos, torch.sin))
        return torch.softmax(self.logits, 1) * (self.x_s[:, None] - (cos + sin) * self.values) / sin

    def _before(self, t: Tensor) -> Tensor:
        """(B, K, 1, ...) exp(rate (s - t)) in the flow's time."""
        return torch.exp(self.rates * _like(_flow_time(self.s) - _flow_time(t), self.rates))

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """x - t u in the flow's coordinates."""
        u = (self._momenta() * self._before(t)).sum(1)
        return x / _like(torch.cos(t) + torch.sin(t), x) - _like(_flow_time(t), x) * u

    def roll(self, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        """(B, C, ...) from x (B, C, ...) at the angles t (B,) to r (B,), in closed form; `steps` is not read."""
        way = _like(_flow_time(t) - _flow_time(r), self.rates)
        z = self.rates * way
        near = z.abs() < 1e-2
        far = torch.where(near, 1.0, z)
        ratio = torch.where(near, 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5))), torch.expm1(far) / far)
        moved = (self._momenta() * self._before(t) * way * ratio).sum(1)
        size_t, size_r = (_like(torch.cos(angle) + torch.sin(angle), x) for angle in (t, r))
        return size_r * (x / size_t - moved)


def policy_of(
    kind: str, components: int, y: Tensor, x_s: Tensor, s: Tensor, e: Tensor, of_x: Tensor, of_y: Tensor,
    nodes: Tensor | None = None,
) -> Policy:  # fmt: skip
    """The policy that the output y (B, `wide_channels`, ...) of a pass at x_s (B, C, ...) and angles s (B,) says, to e.

    A network's prediction y says x0 = of_x x_s + of_y y, both (B,); each component's is such a prediction. "heads" are
    predictions at the angles `nodes` (K + 1,), and of_x and of_y (K,) are those there.
    """
    c = x_s.shape[1]
    means = y[:, : components * c].unflatten(1, (components, c))
    if kind == "heads":
        assert nodes is not None, "the heads have no angles"
        return Heads(x_s, s, e, means, nodes, of_x, of_y)
    values = _like(of_x, means) * x_s[:, None] + _like(of_y, means) * means
    if kind == "nodes":
        return Nodes(x_s, s, e, values)
    if kind == "momenta":
        logits, rates = (part.unsqueeze(2) for part in y[:, components * c :].chunk(2, 1))
        return Momenta(x_s, s, e, values, logits, torch.cat([0 * rates[:, :1], rates[:, 1:]], 1))
    logits = y[:, components * c : -1].unsqueeze(2)
    log_std = y[:, -1:].flatten(1).mean(1)
    return Mixture(x_s, s, e, values, logits, _like(log_std, means))
