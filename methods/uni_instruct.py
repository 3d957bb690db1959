"""Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction.

Wang, Bai, Zhang, Zhang, Luo, Sun 2025, arXiv:2505.20755.

An f-divergence of the clean distributions is an integral over noise of their scores' gap, weighted by the ratio r = p/q
of their densities: with h(r) = r^2 f''(r) and x_sigma = x + sigma eps,

    D_f(p || q) = int E_q[ h(r) |s_p - s_q|^2 ] sigma dsigma + what is left at the greatest noise.

Its gradient through the student's samples and through s_q, the score of their distribution, has two terms: one moves
the samples against (h - r h') |s_p - s_q|^2, the other is score implicit matching's, weighted by h. Both are those of

    (h - r h') |Delta|^2 + 2 h <Delta, D_psi - x>,    Delta = D_phi - D_psi,

in which the parameters of both networks are fixed, their inputs and r are not, and D_psi, the fake score, is trained on
the student's samples. The ratio is a discriminator's, as f-distill's; along x_t it moves by d log r = (s_p - s_q) dx_t.
For reverse KL h is 1, and this is twice SiD's loss with alpha = 1/2, the Fisher divergence; for forward KL, the
authors' best, the first term is 0.

Deviations: the formulas were derived here and are compared with the gradients of the divergences (`verify`); of the
paper its abstract was at hand, of the code its README. As in SiD, which that code is built on, the weight sigma^-2 of
the integral is left out, each sample is divided by mean|x - D_phi|, and levels are SiD's. Ratios and weights
are kept in bounds and divided by their means as in f-distill. The discriminator and the order of turns are DMD2's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import l1_normaliser, per_sample_mean
from diffdistill.core.prediction import diffuse, expand
from diffdistill.options import RatioOptions, SiDOptions
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Need, Outcome

ABOUT = About(
    paper="Wang et al. 2025, arXiv:2505.20755",
    data="real images, for the ratio of the densities",
    kind="distribution",
    needs=("images",),
    equations={
        "expansion of an f-divergence over noise, and its gradient": "uni_loss, UniInstruct.matching",
        "weights h(r) = r^2 f''(r) and h - r h'": "scaffold.ratio.WEIGHTS, scaffold.ratio.PATHS",
        "ratio by a discriminator": "scaffold.ratio.RatioWeight.of, scaffold.adversary.Adversary",
        "denoising loss of the fake score": "scaffold.matching.fake_score_loss",
    },
)


@dataclass(frozen=True)
class Config(SiDOptions, RatioOptions, divergence="forward_kl", gan_weight=0.0002, discriminator_weight=0.02):
    """Uni-Instruct's options."""


class UniInstruct(MatchingMethod):
    """The student moves first, the fake score learns from the same samples, and no network drops out."""

    needs = frozenset({Need.IMAGES})

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """Both networks stay in the graph; r follows x_t by the gap of the scores."""
        x_t, weight = diffuse(x, t, eps), self.weights[self.place]
        x0_teacher, x0_fake = (network(x_t, t, cond).x0 for network in (self.teacher, self.fake_score))
        r = weight.of(self.ratio_logits(x, t, eps, cond), t)
        gap = expand(torch.cos(t) / torch.sin(t) ** 2, x) * (x0_teacher - x0_fake).detach()
        moved = r * torch.exp((gap * (x_t - x_t.detach())).flatten(1).sum(1))  # the value is r, the slope r (s_p - s_q)
        losses = uni_loss(x, x0_teacher, x0_fake, *weight.both(moved))
        if self.config.normalise:
            losses = losses / l1_normaliser(x, x0_teacher)
        shown = {"gap": (x0_teacher - x0_fake).detach().square().mean(), "ratio": r.mean()}
        return Outcome(losses.mean(), shown)


def uni_loss(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, h: Tensor, path: Tensor) -> Tensor:
    """(B,) (h - r h') |Delta|^2 + 2 h <Delta, D_psi - x> as a mean of elements; h and path = h - r h' are (B,)."""
    delta = x0_teacher - x0_fake
    return path * per_sample_mean(delta.square()) + 2 * h * per_sample_mean(delta * (x0_fake - x))


METHOD = UniInstruct
