"""Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield.

Liu et al. (Tongyi Lab) 2025, arXiv:2511.22677 (adopted by Z-Image's eight steps; no training code).

DMD with a teacher that is guided by a follows the sum of two directions, of which one alone matches distributions:

    s_c - s_fake  +  (a - 1) (s_c - s_none),    s_c and s_none the teacher's scores with and without its condition.

The second, guidance as an augmentation, is what turns many steps into few, the engine; the first holds it, since by
itself the engine has no fixed point (on Gaussians its pull is the same wherever the samples are, which `verify` shows).
Each has its own noise here: the matching at all levels, so that it sees a wrong tint as well as a wrong texture; the
engine only at less noise than that of the student's input, as what is decided at more noise is decided already.

Deviations:
- Each term is divided by mean|x - D| of its own noise, with D the conditional prediction, as in byliutao/CDM; the paper
  says a weight, no normaliser. With `normalise: false` both weights are those of the exact divergence's gradient.
- The engine's times are uniform in the teacher's own time from time_low to time_high of what lies below the student's
  level (by an author's answer in Tongyi-MAI/Z-Image#78, before a flow's shift); `time_shift` is for the matching alone.
- Discriminator, several steps and fake scores for each level are DMD2's. The paper's other regularisers are not here.
- Where the two have the same noise (`augmentation_times: matching`) it is guided DMD but for the normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide_with_conditional
from diffdistill.core.losses import l1_normaliser, per_sample_mean
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import native_uniform
from diffdistill.options import DMD2Options, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod, injected
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Liu et al. 2025, arXiv:2511.22677",
    data="nothing; real images for its GAN, when gan_weight > 0",
    kind="distribution",
    equations={
        "matching, the regulariser (eq. 8, first difference)": "DecoupledDMD.matching, scaffold.matching.dmd_loss",
        "guidance as an augmentation, the engine (eq. 8, second difference)": "DecoupledDMD.engine",
        "noise of both (section 4.3, the fourth kind)": "DecoupledDMD.engine_times",
        "several steps (Algorithm 1)": "scaffold.simulation.simulated_input",
    },
)


@dataclass(frozen=True)
class Config(DMD2Options):
    """Decoupled DMD's options; guidance_scale is a, and at 1 there is no engine."""

    augmentation_times: Literal["below", "all", "matching"] = option(
        "below",
        "noise of the guidance term; below: less than the student's input has; all: any; matching: the same as that of "
        "the matching, which is DMD",
    )


class DecoupledDMD(MatchingMethod):
    """The teacher matches unguided; its guidance is the engine's."""

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)  # which refuses guidance of a teacher that has no null condition
        self.teacher = self.unguided = teacher.denoiser  # frozen by now

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        predicted, t, eps = self.predicted(batch, "student"), self.times("student", batch), batch.randn("student/eps")
        x = self.samples_of(predicted, batch)
        weighted, shown = self.by_reward(x, batch)
        matched = self.matching(weighted, t, eps, batch.cond)
        if self.config.augmentation_times != "matching":
            t, eps = self.engine_times(batch), batch.randn("student/augmentation eps")
        pushed = self.engine(weighted, t, eps, batch.cond)
        outcome = Outcome(matched.loss + pushed.loss, {**matched.shown, **pushed.shown, **shown})
        return x, self.with_targets(outcome, predicted, batch)

    def engine_times(self, batch: Batch) -> Tensor:
        """(B,) the angles of the guidance term."""
        c, below = self.config, 1.0
        if c.augmentation_times == "below":
            level = self.sampler().levels[self.level(batch)]
            below = float(self.schedule.fraction(self.schedule.angle(level)))
        span = below * c.time_low, below * c.time_high
        return batch.draw("student/augmentation t", lambda n, draw: native_uniform(self.schedule, n, draw, *span))

    def engine(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """(a - 1) (s_c - s_none) at the angles t (B,), pushed into x (B, ...); shown relative to mean|x - D_c|.

        Nothing at a = 1.
        """
        a, normalise = self.config.guidance_scale, self.config.normalise
        if a == 1:
            return Outcome(x.new_zeros(()))
        guided, conditional = self.both(diffuse(x, t, eps), t, cond, torch.full_like(t, a))
        gradient, size = conditional - guided, l1_normaliser(x, conditional)
        weight = 1 / size if normalise else torch.tan(t) ** -2
        loss = injected(x, expand(weight, x) * gradient, self.fake_score, normalise)
        return Outcome(loss, {"augmentation": (per_sample_mean(gradient.abs()) / size).mean()})

    @torch.no_grad()
    def both(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's x0 (B, ...), guided and under the condition alone."""
        guided, conditional = guide_with_conditional(self.unguided, x_t, t, cond, scale)
        return guided.x0, conditional.x0


METHOD = DecoupledDMD
