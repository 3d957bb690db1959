"""SDXS: Real-Time One-Step Latent Diffusion Models with Image Conditions, its training of one step.

Song, Sun, Yin, 2024, arXiv:2403.16627 (code: IDKiro/sdxs, inference alone; its README says that the released weights
were trained as DMD2's since).

Score distillation says little where there is little noise, and at first draws all samples to one. So the range of
noise has a boundary, alpha: above it the student's samples are matched as in DMD, below it features take the place of
the score, those of what the student and the teacher's sampler make of one noise, which are to be alike by SSIM. Alpha
falls from 1, where features are all there is, to `boundary`. The student is usually smaller than its teacher
(`--student`, `diffdistill prune`).

L = (1 - alpha) E[matching, noise above alpha] + alpha F E[1 - SSIM], F constant.

Deviations: the paper's formulas are known here from summaries, not its code. Features are those of the frozen teacher's
layers, lightly noised, where the paper's encoder reads images. F is a constant, and the integral over the lower part is
its length. SSIM's constants and windows are ours (`core.distances.dissimilarity`). The matching has DMD's normaliser,
where the paper builds on Diff-Instruct. The pairs are made beforehand (`diffdistill pairs`); the teacher's guidance and
level are theirs. The paper's tiny decoder is
`diffdistill decoder`; its ControlNet is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import dissimilarity
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.options import MatchingOptions, MatchingTimes, NormaliserOptions, option
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Need, Outcome

ABOUT = About(
    paper="Song et al. 2024, arXiv:2403.16627",
    data="noise-image pairs of the teacher",
    kind="distribution",
    needs=("pairs",),
    equations={
        "feature matching by SSIM (section 3.2)": "SDXS.unlike, core.distances.dissimilarity",
        "segmented score distillation, alpha from 1 down (section 3.2)": "SDXS.alpha, SDXS.times, SDXS.student_loss",
        "matching above the boundary": "scaffold.matching.distribution_matching_gradient",
        "denoising loss of the fake score": "scaffold.matching.fake_score_loss",
    },
)


@dataclass(frozen=True)
class Config(MatchingOptions, MatchingTimes, NormaliserOptions, weight_decay=0.01):
    """The options of SDXS's one step; the pairs have the teacher's guidance scale and level."""

    boundary: float = option(
        0.5, "alpha at the end: the share of the range of noise, from below, where features are matched", at_least=0,
        below=1,
    )  # fmt: skip
    boundary_steps: int = option(
        1000, "training steps in which alpha falls from 1 to there; 0: it is there at once", at_least=0
    )
    feature_weight: float = option(1.0, "F, the weight of the features' 1 - SSIM", above=0)
    feature_noise: float = option(
        0.1, "the noise at which the teacher's layers read images, as a fraction of its own time", at_least=0, below=1
    )
    feature_depths: tuple[float, ...] = option(
        (0.2, 0.5, 0.8), "the teacher's layers that are compared, as fractions of its depth", at_least=0, below=1
    )


class SDXS(MatchingMethod):
    """One pass of the student serves the fresh noise, which is matched, and that of the pairs; no network drops out."""

    needs = frozenset({Need.PAIRS})

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        self.reader = frozen(teacher.start or teacher.denoiser)
        self.layers = self.reader.layers_at(config.feature_depths)
        if not self.layers:
            raise UserError("feature_depths: this teacher's network has no layer at these depths; use dmd")

    def alpha(self, step: int) -> float:
        """The boundary at a training step, as a share of the range of noise."""
        c = self.config
        return max(c.boundary, 1 - (1 - c.boundary) * step / c.boundary_steps) if c.boundary_steps else c.boundary

    def times(self, player: str, batch: Batch) -> Tensor:
        if player != "student":
            return super().times(player, batch)
        c, alpha = self.config, self.alpha(batch.key[1])
        low = c.time_low + alpha * (c.time_high - c.time_low)
        return batch.draw(
            "student/t", lambda n, draw: native_uniform(self.schedule, n, draw, low, c.time_high, c.time_shift)
        )

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        pair, alpha = batch.paired, self.alpha(batch.key[1])
        x, x_ref = self.beside(batch, pair)
        matched = self.matching(x, self.times("student", batch), batch.randn("student/eps"), batch.cond)
        unlike = self.unlike(x_ref, pair.x0, batch.randn("features/eps"), pair.cond).mean()
        loss = (1 - alpha) * matched.loss + alpha * self.config.feature_weight * unlike
        return x, Outcome(loss, {**matched.shown, "features": unlike, "alpha": unlike.new_tensor(alpha)})

    def unlike(self, x: Tensor, y: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) 1 - SSIM of the features of x (B, ...) and of the teacher's y (B, ...), noised with eps (B, ...)."""
        fraction = torch.full((len(x),), self.config.feature_noise, dtype=torch.float64, device=x.device)
        t = self.schedule.at_fraction(fraction)
        with torch.no_grad():
            theirs = self.reader.features_of(self.layers, diffuse(y, t, eps), t, cond)
        ours = self.reader.features_of(self.layers, diffuse(x, t, eps), t, cond)
        return torch.stack([dissimilarity(a, b) for a, b in zip(ours, theirs, strict=True)]).mean(0)


METHOD = SDXS
