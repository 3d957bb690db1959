"""SIMS: Self-Improving Diffusion Models with Synthetic Data.

Alemohammad, Humayun, Agarwal, Collomosse, Baraniuk 2024 (no code).

A model that is trained on its own samples drifts away from the data. The direction of that drift is what to go against:
an auxiliary copy learns the teacher's own samples, and the score of sampling is extrapolated away from it,

    (1 + omega) s - omega s_auxiliary.

That takes two passes a step. Here a student learns it in one, as guidance distillation does, and keeps the number of
steps. The teacher's samples are those of `diffdistill pairs`.

1. Auxiliary: for `auxiliary_steps` the copy of the teacher learns the samples.
2. Student: it imitates the extrapolation at noised samples.

Deviations:
- The formula is as others give it; the paper's text was not at hand. It samples with two networks; the student is ours.
- omega and the auxiliary's steps have to fit each other, which the authors search by FID; here both are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import student_levels
from diffdistill.options import OnePassSampling, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Pair, Turn

ABOUT = About(
    paper="Alemohammad et al. 2024, SIMS",
    data="noise-image pairs of the teacher, for their images",
    kind="guidance",
    needs=("pairs",),
    equations={
        "the auxiliary model learns the teacher's samples": "SIMS.learn, core.losses.denoising_loss",
        "negative guidance away from it": "SIMS.extrapolated",
        "one pass for two": "SIMS.imitate",
    },
)


@dataclass(frozen=True)
class Config(OnePassSampling, student_lr=1e-4):
    """SIMS's options."""

    auxiliary_steps: int = option(500, "training steps of the auxiliary model, before the student's", at_least=1)
    auxiliary_lr: float = option(1e-4, "AdamW's learning rate for the auxiliary model", above=0)
    extrapolation: float = option(1.0, "omega, how far away from the auxiliary model", at_least=0)


class SIMS(Method):
    """Players: student, which is exported, and auxiliary. No network drops out."""

    needs = frozenset({Need.PAIRS})

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config)
        self.teacher = frozen(teacher.denoiser)
        self.student, self.auxiliary = (players.get(r) or teacher.player(r) for r in ("student", "auxiliary"))
        self.players = {"student": self.student.eval(), "auxiliary": self.auxiliary.eval()}
        self.shortest = config.auxiliary_steps + 1

    def sampler(self) -> Sampler:
        """Deterministic steps, one pass each."""
        levels = student_levels(self.schedule, self.config.sampling_steps, option="sampling_steps")
        return Sampler(self.student, levels.tolist(), DDIM())

    def turns(self, step: int) -> Sequence[Turn]:
        """First the auxiliary, then the student."""
        if step < self.config.auxiliary_steps:
            return [Turn("auxiliary", self.learn)]
        return [Turn("student", self.imitate)]

    def learn(self, batch: Batch) -> Outcome:
        """The auxiliary's denoising loss on the teacher's samples."""
        pair, x_t, t, eps = self.noised(batch, "auxiliary")
        return Outcome(denoising_loss(self.auxiliary.eval()(x_t, t, pair.cond), pair.x0, eps))

    def imitate(self, batch: Batch) -> Outcome:
        """The student's distance from the extrapolation, in what the network predicts."""
        pair, x_t, t, _ = self.noised(batch, "student")
        target, apart = self.extrapolated(x_t, t, pair.cond)
        return Outcome(F.mse_loss(self.student.eval()(x_t, t, pair.cond).y, target), {"apart": apart})

    @torch.no_grad()
    def extrapolated(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(1 + omega) y - omega y_auxiliary (B, ...), and the mean square by which the two differ ()."""
        own, other = self.teacher(x_t, t, cond).y, self.auxiliary.eval()(x_t, t, cond).y
        return own + self.config.extrapolation * (own - other), (own - other).square().mean()

    def noised(self, batch: Batch, player: str) -> tuple[Pair, Tensor, Tensor, Tensor]:
        """The pairs, their images noised x_t (B, ...) to the angles t (B,), and the noise (B, ...)."""
        t = self.uniform_times(batch, f"{player}/t")
        eps = batch.randn(f"{player}/eps")
        return batch.paired, diffuse(batch.paired.x0, t, eps), t, eps


METHOD = SIMS
