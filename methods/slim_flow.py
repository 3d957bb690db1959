"""SlimFlow: a small one-step student, by annealed reflow and flow-guided distillation.

Zhu, Liu, Liu 2024, arXiv:2407.12718 (code: yuanzhi-zhu/SlimFlow 96d8b25).

`reflow` on a student that does not begin as its teacher begins badly: the lines of the teacher's pairs (z, x) are
learned from nothing. Here they begin as those of independent noise, which are a flow's usual training, and become the
teacher's pairs as beta falls from 1 to 0 over `anneal_steps`,

    z' = sqrt(1 - beta^2) z + beta eps,    loss = |u((1 - t) x + t z', t) - (z' - x)|^2,

so that z' is standard normal at any beta. After `reflow_steps` the second stage makes one step of it. With
x(z) = z - u(z, 1) and u~ the frozen student of the first stage,

    loss = d(x(z), x) on pairs + w d(x(z), sg x~) on fresh noise z,
    x~ = y - s u~(y, s),    y = (1 - s) sg x(z) + s z,    s ~ U(0.2, 0.8):

what the reflowed flow makes of the student's own line, seen from the middle of it. Where that flow is straight and the
student has learned it, x~ is the end of z's line.

The student is any network, `--student` of another size for one; without it it begins as the teacher.

Deviations:
- Lines are cos(t) x + sin(t) z in the normal form, as in `reflow`; a teacher of another schedule keeps its times.
- The authors mirror half of their batches of pairs, noise and image alike. Here pairs are taken as they were made.
- The frozen student is theirs averaged (EMA), and the trained one is not; here both begin as the trained weights.
- An older function of the authors' code makes y by the frozen student; the one that they call, and this, by the trained
  one, which asks the guide where the student is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.prediction import diffuse
from diffdistill.options import StagedOptions, option
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.straightening import Line, StagedMethod

ABOUT = About(
    paper="Zhu et al. 2024, arXiv:2407.12718",
    data="noise-image pairs of the teacher",
    kind="trajectory",
    needs=("pairs",),
    equations={
        "annealing reflow": "SlimFlow.line, SlimFlow.beta, annealed, scaffold.straightening.squared",
        "distillation on pairs": "SlimFlow.distill_turn, scaffold.straightening.StagedMethod.one_step",
        "flow-guided distillation": "SlimFlow.distill_turn, SlimFlow.guide",
        "Euler step": "SlimFlow.sampler, players.sampler.DDIM",
    },
)

MIDDLE = (0.2, 0.8)
"""Flow times of the guide's point; the authors' range is the same counted from the other end."""


@dataclass(frozen=True)
class Config(StagedOptions, student_lr=2e-4, distance="l2"):
    """SlimFlow's options; the distance is that of images, in both terms of the second stage."""

    anneal_steps: int = option(20000, "training steps over which beta falls from 1 to 0; 0: it is 0", at_least=0)
    guide_weight: float = option(1.0, "weight of the second stage's term on fresh noise; 0: pairs alone", at_least=0)


def annealed(z: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """(B, ...) sqrt(1 - beta^2) z + beta fresh: standard normal where z and fresh (B, ...) are, and independent."""
    return math.sqrt(1 - beta**2) * z + beta * fresh


class SlimFlow(StagedMethod):
    """The second stage's guide is the student of the first."""

    def beta(self, step: int) -> float:
        """The share of fresh noise at a training step, from 1 down to 0 in a line."""
        return 1 - min(1.0, step / self.config.anneal_steps) if self.config.anneal_steps else 0.0

    def line(self, step: int, batch: Batch) -> Line:
        pair = batch.paired
        z = annealed(pair.z, batch.randn("student/fresh"), self.beta(step))
        return Line(pair.x0, z, self.uniform_times(batch), pair.cond)

    @torch.no_grad()
    def guide(self, x: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """(B, ...) x~, the end of the reflowed flow's one step from the middle of the line of noise z and x."""
        low, high = MIDDLE
        s = low + (high - low) * batch.uniform("student/middle")
        t = torch.atan2(s, (1 - s) * self.schedule.data_std)  # the angle of the flow time s
        return self.reflowed(diffuse(x, t, z), t, batch.cond).x0

    def distill_turn(self, batch: Batch) -> Outcome:
        """The distance of one step from the pairs' images, and from what the guide says of it on fresh noise."""
        pair = batch.paired
        paired = self.image_distance(self.one_step(pair.z, pair.cond), pair.x0).mean()
        if not self.config.guide_weight:
            return Outcome(paired, {"straightness": paired})
        z = batch.randn("student/z")
        x = self.one_step(z, batch.cond)
        guided = self.image_distance(x, self.guide(x, z, batch)).mean()
        return Outcome(paired + self.config.guide_weight * guided, {"straightness": paired, "guided": guided})


METHOD = SlimFlow
