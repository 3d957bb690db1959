"""Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models.

Luo, Hu, Zhang, Sun, Li, Zhang, NeurIPS 2023, arXiv:2305.18455 (code: pkulwj1994/diff_instruct).

The student x = G(z, c) follows the gradient of the integral of KL(q_t || p_t) over noise levels, weighted by w(t):
the fake score's denoiser less the teacher's, D_fake - D_teacher, is pushed into x, and no gradient passes through
either network. Against EDM's x_t = x + sigma eps the score gap is (D_fake - D_teacher)/sigma^2, so the code's
gradient has the weight w = sigma^2. In the normal form sigma is tan(t), the gradient of KL(q_t || p_t) with
respect to x is cot(t)^2 (D_fake - D_teacher), and w = tan(t)^2. There is no normaliser, no regression and no GAN.

Deviations: the fake score moves after the student, on the samples that the student was judged by; the authors' moves
first, and both draw their own. Both networks of the gap are evaluated without dropout, where the authors' have it
with one mask for both. Losses are means over elements, not sums, which Adam does not see. Gradients are not cleaned
of nan: the trainer refuses what is not finite. No augmentation of what the fake score sees. The student's input is
what the stock scheduler draws, for an EDMEulerScheduler of standard deviation sqrt(sigma^2 + 1) instead of sigma.
For a teacher that is not EDM's the noise levels are those of EDM at the same angle. Guidance of the teacher and
`update_ratio` are additions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import gradient_injection
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import edm_log_normal
from diffdistill.options import MatchingOptions, RewardOptions, option
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Luo et al. 2023, arXiv:2305.18455",
    data="nothing",
    kind="distribution",
    equations={
        "gradient of the integral KL divergence (the code's gloss)": "DiffInstruct.matching",
        "denoising loss of the fake score": "scaffold.matching.fake_score_loss",
        "noise levels, ln sigma ~ N(-1.2, 1.2^2)": "core.times.edm_log_normal",
    },
)


@dataclass(frozen=True)
class Config(MatchingOptions, RewardOptions, beta1=0.0):
    """Diff-Instruct's options."""

    time_mean: float = option(-1.2, "mean of ln sigma, at data of standard deviation 0.5, in both losses")
    time_std: float = option(1.2, "standard deviation of ln sigma", above=0)


class DiffInstruct(MatchingMethod):
    """The score gap of EDM's denoisers, as it is, is what the student follows."""

    dropout = "own"

    def times(self, player: str, batch: Batch) -> Tensor:
        mean, std = self.config.time_mean, self.config.time_std
        return batch.draw(f"{player}/t", lambda n, draw: edm_log_normal(self.schedule, n, draw, mean, std))

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """A loss whose gradient in x (B, ...) is D_fake - D_teacher at angles t (B,), as a mean."""
        with torch.no_grad():
            x_t = diffuse(x, t, eps)
            gap = self.fake_score(x_t, t, cond).x0 - self.teacher(x_t, t, cond).x0
        return Outcome(gradient_injection(x, gap), {"gap": gap.square().mean()})


METHOD = DiffInstruct
