"""SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation.

Chen et al. 2025, arXiv:2503.09641 (code: NVlabs/Sana; read in diffusers' train_sana_sprint_diffusers.py).

sCM (arXiv:2410.11081) aligns the student with the teacher's trajectories, and LADD (arXiv:2403.12015) sharpens what it
draws. The student takes the guidance scale as an input, and is sampled in one step or more. With F- the value of its
velocity F without a gradient, v the teacher's, guided by the scale that is drawn, and d the heads on the teacher,

    g = -cos(t)^2 (F- - v) - r cos(t) sin(t) (x_t + dF-/dt),    g <- g/(|g| + c),
    loss = e^(-w(t))/tan(t) |F - F- - g|^2 + w(t) - gan_weight mean_l d_l(x0 of F),

r rising from 0 to 1. The GAN's samples are drawn at other times than the first term's, `noisiest_share` of them from
noise alone, where one step begins.

Deviations:
- A flow teacher needs no conversion: F is the velocity of the normal form of any network. The authors first tune the
  teacher with another embedding of time and normalised queries and keys, which is not done here; where its embedding
  has high frequencies, `derivative` takes a difference.
- Scales are uniform between guidance_min and guidance_max, where theirs are 4, 4.5 and 5.
- Real and generated images share the discriminator's noise, and it moves in each step, on the student's samples of that
  step; in the script the two take turns. Its losses lack the script's factor 1/2, which Adam does not see.
- Samples at the largest time are at 0.5 radians in the script's discriminator turn, which puts their probability in
  place of that time.
- The adaptive weight w is a small network of its own, as in `scm`, where theirs is a head of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import edm_log_normal
from diffdistill.options import (
    AdaptiveWeightRate,
    LatentAdversarialOptions,
    ScaleRange,
    TangentOptions,
    TangentTarget,
    option,
)
from diffdistill.players.adaptive_weight import AdaptiveWeight
from diffdistill.players.scale_input import DrawnGuidance, scale_player, scale_taken
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.continuous import ContinuousMethod
from diffdistill.scaffold.method import Batch, Outcome, Turn
from diffdistill.scaffold.tangent import Point

ABOUT = About(
    paper="Chen et al. 2025, arXiv:2503.09641",
    data="real images",
    kind="trajectory",
    needs=("images",),
    equations={
        "flow to TrigFlow (section 3.1)": "core.prediction.Prediction",
        "sCM's g, its warm-up and normalisation": (
            "scaffold.continuous.ContinuousMethod.target, scaffold.continuous.ContinuousMethod.tangent, "
            "options.TangentTarget.warm, scaffold.tangent.normalised"
        ),
        "sCM's loss with the adaptive weight": (
            "SanaSprint.regression, scaffold.continuous.ContinuousMethod.weighed, "
            "scaffold.continuous.ContinuousMethod.weight_turn"
        ),
        "LADD's losses": "scaffold.adversary.LatentAdversary",
        "samples at the largest time": "SanaSprint.generate",
        "the guidance scale as an input": "players.scale_input.guidance_input",
    },
)


@dataclass(frozen=True)
class Config(ScaleRange, TangentOptions, TangentTarget, LatentAdversarialOptions, AdaptiveWeightRate, guidance_max=1.0,
             time_mean=0.2, time_std=1.6, tangent_warmup=4000, norm="l2", gan_time_mean=-0.6):  # fmt: skip
    """SANA-Sprint's options; the mode is distillation."""

    gan_weight: float = option(0.5, "weight of the GAN loss in the student's", at_least=0)
    noisiest_share: float = option(0.5, "share of the GAN's samples that are drawn from noise", at_least=0, at_most=1)


class SanaSprint(ContinuousMethod):
    """f is the student's x0; players: student, discriminator, which is the heads, and the adaptive weight."""

    untaught = "sana_sprint follows its teacher"

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student or scale_player(teacher, config))
        self.guidance = DrawnGuidance(teacher.denoiser, config)
        self.adversary, self.weight = LatentAdversary(teacher, config), AdaptiveWeight()
        self.players |= {"discriminator": self.adversary.heads, "weight": self.weight}

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        t = self.drawn("student/t", batch)
        return t, torch.zeros_like(t)

    def drawn(self, stream: str, batch: Batch) -> Tensor:
        """(B,) angles of sCM's distribution."""
        normal = {"mean": self.config.time_mean, "std": self.config.time_std}
        return batch.draw(stream, partial(edm_log_normal, self.schedule, **normal))

    def scales(self, batch: Batch) -> Tensor:
        """(B,) guidance scales."""
        return self.config.drawn(batch.uniform("student/scale"))

    def extra(self, batch: Batch) -> Extra:
        return scale_taken(self.config, self.scales(batch))

    def direction(self, x_t: Tensor, v: Tensor, t: Tensor, batch: Batch, cond: Cond) -> Tensor:
        return self.guidance(x_t, t, cond, self.scales(batch)).v

    def regression(self, step: int, at: Point) -> Outcome:
        """The squared error against F- + g, weighted by time and by what the adaptive weight says."""
        f = self.velocity(at, at.extra)
        error = per_sample_mean((f - self.target(f, at, self.config.warm(step))).square())
        return self.weighed((1 / torch.tan(at.t)).to(f) * error, at)

    def generate(self, batch: Batch) -> Tensor:
        """x0 (B, ...) of noised images, of which a share is noise at the sampler's first level."""
        t, z = self.drawn("student/gan input t", batch), batch.randn("z")
        noise, top = self.sampler().start(z)
        first = batch.uniform("student/first") < self.config.noisiest_share
        x_t = torch.where(expand(first, z) > 0, noise, diffuse(batch.images, t, z))
        return self.student(x_t, torch.where(first, top, t), batch.cond, self.extra(batch)).x0

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """sCM's loss, and the GAN's on other samples, which the discriminator's turn reads too."""
        consistency, x = super().student_turn(step, batch), self.generate(batch)
        gan = self.adversary.student_loss(x, batch)
        return Outcome(consistency.loss + self.config.gan_weight * gan, {**consistency.shown, "gan": gan})

    def more_turns(self, step: int) -> Sequence[Turn]:
        """The discriminator's, on the samples of the student's turn, and the adaptive weight's."""
        return [Turn("discriminator", self.adversary.turn), *super().more_turns(step)]


METHOD = SanaSprint
