"""SIM: One-Step Diffusion Distillation through Score Implicit Matching.

Luo, Huang, Geng, Kolter, Qi, NeurIPS 2024, arXiv:2410.16794 (code: maple-research-lab/SIM, inference only).

The student minimises E d(y), y = s_psi - s_phi the gap between its own score and the teacher's, over its noised
samples, for a distance d of choice and with the distribution that y is averaged over held fixed. The change of
s_psi with the student is intractable; for every u, E[u(x_t) . (s_psi(x_t) - grad log q(x_t | x))] = 0, and with
u = d'(y) its derivative gives the same gradient as the loss -d'(y) . (s_psi - grad log q(x_t | x)), in which x, x_t
and both networks' outputs, y too, move with the student and only the networks' parameters are fixed. The loss itself
is zero in expectation; `distance` is E d(y). With d = |y|^2 it is SiD's loss at alpha = 1, times 2 cos^2/sin^4.

In the normal form s_psi - s_phi = cos/sin^2 (D_psi - D_phi), and grad log q(x_t | x) is the score of a denoiser
that answers x. By default y is the gap of the denoisers themselves (`weight: denoiser`), which is another d at
each level, d(sin^2/cos y), and needs no 1/sin^2; `weight: score` is the formula of the paper with w(t) = 1.

Deviations: there is no training code, and the paper's w(t), noise levels, c and learning rates were not found in
what could be read: those here are SiD's, and c, in units of data of variance one, is 0.00054 sqrt(d) of improved
consistency training (arXiv:2310.14189) at CIFAR-10's d = 3072. Only the pseudo-Huber and the squared distance are
implemented. The fake score moves after the student, on the samples that the student was judged by. The loss is a
sum over elements, since d is of the whole sample. The student's input is what the stock scheduler draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import pseudo_huber
from diffdistill.core.prediction import diffuse, expand
from diffdistill.options import EDMTimes, MatchingOptions, option
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Outcome

ABOUT = About(
    paper="Luo et al. 2024, arXiv:2410.16794",
    data="nothing",
    kind="distribution",
    equations={
        "score implicit matching's loss (section 3.2)": "SIM.divergence",
        "pseudo-Huber and squared distance and their gradients (section 3.3)": "distance, distance_gradient",
        "denoising loss of the fake score": "scaffold.matching.fake_score_loss",
    },
)


@dataclass(frozen=True)
class Config(MatchingOptions, EDMTimes, beta1=0.0):
    """SIM's options."""

    distance: Literal["pseudo_huber", "l2"] = option(
        "pseudo_huber", "of the score gap y; pseudo_huber: sqrt(|y|^2 + c^2) - c; l2: |y|^2"
    )
    c: float = option(0.03, "the pseudo-Huber distance's c, in the units of y over a whole sample", above=0)
    weight: Literal["denoiser", "score"] = option(
        "denoiser", "what y is; denoiser: the gap of the denoisers; score: of the scores, which grows as 1/sigma^2"
    )


class SIM(MatchingMethod):
    """The distance of the scores is minimised through a gradient that score identities give."""

    dropout = "own"

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        loss, y = self.divergence(x, t, eps, cond)
        return Outcome(loss.mean(), {"distance": distance(y.detach(), self.config.distance, self.config.c).mean()})

    def divergence(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(B,) -d'(y) . (s_psi - grad log q(x_t | x)), and y (B, ...); both networks stay in the graph."""
        x_t = diffuse(x, t, eps)
        x0_teacher, x0_fake = self.teacher(x_t, t, cond).x0, self.fake_score(x_t, t, cond).x0
        scale = torch.ones_like(t) if self.config.weight == "denoiser" else torch.cos(t) / torch.sin(t) ** 2
        y = expand(scale, x) * (x0_fake - x0_teacher)
        to_x = expand(scale, x) * (x0_fake - x)
        return -(distance_gradient(y, self.config.distance, self.config.c) * to_x).flatten(1).sum(1), y


def distance(y: Tensor, kind: str, c: float) -> Tensor:
    """(B,) d of the whole sample y (B, ...)."""
    return y.flatten(1).square().sum(1) if kind == "l2" else pseudo_huber(y, torch.zeros_like(y), c)


def distance_gradient(y: Tensor, kind: str, c: float) -> Tensor:
    """(B, ...) d'(y), not detached: 2 y, or y/sqrt(|y|^2 + c^2), which is never longer than 1."""
    if kind == "l2":
        return 2 * y
    return y / expand(torch.sqrt(y.flatten(1).square().sum(1) + c**2), y)


METHOD = SIM
