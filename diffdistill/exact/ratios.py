"""f-divergences of Gaussians, and a discriminator that tells the ratio of their densities exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.core.prediction import diffuse
from diffdistill.exact.analytic import GaussianMixture
from diffdistill.exact.checks import AffineGame, affine_game, mistake
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold import matching
from diffdistill.scaffold.matching import MatchingMethod

DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (1 + r) * torch.log((1 + r) / r),
    "jensen_shannon": lambda r: r * r.log() - (1 + r) * torch.log((1 + r) / 2),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "chi_square": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
}
"""f of each; D_f(p || q) = E_q f(p/q)."""

EXACT: dict[str, Any] = {"ratio_low": 1e-300, "ratio_high": 1e300, "ratio_bins": 0}
"""Options with which ratios and weights are as they are."""

MU, S, M, B = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.8, -0.1, 0.95))
"""A teacher N(mu, s^2) and a student N(m, b^2) on a line; all divergences of the two have their moments."""


class KnownRatio:
    """A discriminator at its optimum, log p_t/q_t, in the place of `scaffold.adversary.Adversary`."""

    def __init__(self, *ignored: object):
        self.head = nn.Linear(1, 1)
        self.p = self.q = GaussianMixture([[0.0]], 1.0)

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) of x (B, d) noised to the angles t (B,) with eps (B, d)."""
        x_t = diffuse(x, t, eps)
        return self.p.log_density(x_t, t) - self.q.log_density(x_t, t)


def known_ratio_game(
    make: Callable[..., MatchingMethod], parts: AffineGame | None = None
) -> tuple[MatchingMethod, AffineGame]:
    """What `make(teacher, student=.., fake_score=..)` gives for affine Gaussians, with an exact discriminator."""
    parts = affine_game(MU, S, M, B) if parts is None else parts
    with mistake(matching, "Adversary", KnownRatio):
        method = make(parts.teacher, student=parts.student, fake_score=parts.fake_score)
    known: Any = method.adversaries[0]
    known.p, known.q = parts.teacher.denoiser.network, parts.score
    only_trains("student", trainable(method.players))
    return method, parts


def derivatives(f: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, Tensor]:
    """h = r^2 f''(r) and h - r h'(r), both (n,), at r (n,), by differentiating f."""
    r = r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), r, create_graph=True)
    h = r**2 * curve
    (change,) = torch.autograd.grad(h.sum(), r)
    return h.detach(), (h - r * change).detach()
