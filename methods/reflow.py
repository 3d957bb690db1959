"""Reflow: rectified flows, InstaFlow, and their improved training (rf++).

Liu, Gong, Liu 2022, arXiv:2209.03003; Liu, Zhang, Ma, Peng, Liu 2023, arXiv:2309.06380 (InstaFlow); Lee, Lin, Fanti
2024, arXiv:2405.20320 (code: sangyun884/rfpp).

Noise z and the image x that the teacher's ODE makes of it are a pair (`diffdistill pairs`). The student learns the
velocity of straight lines from one to the other,

    x_t = (1 - t) x + t z,    loss = |u(x_t, t) - (z - x)|^2,

whose flow has the same ends and is straighter, so that few Euler steps, in one dimension a single one, come near them.
Doing it again, with pairs of the student, straightens it further. After `reflow_steps` the second stage makes one step
of it: with x the end of the reflowed student's own ODE from fresh z, d(z - u(z, 1), x).

rf++ finds one reflow enough, if it learns where lines are hard: t is drawn more often at both ends (`time_exponent`),
and the loss is (1 - t) pseudo-Huber/dimensions, with an LPIPS distance of x_t - t u and x beside it (`image_weight`).

Scales of guidance are those of the pairs. To reflow once more, export the student and make pairs with it.

Deviations:
- Lines are cos(t) x + sin(t) z in the normal form, the same lines in a flow's own time; a teacher of another schedule
  keeps it, with its DDIM steps for Euler's, where the authors turn the network into that of a flow.
- The authors store the pairs of the second stage; here they are made as they are needed, by `ode_steps` steps.
- rf++ samples with the first noise at all steps, and begins with EDM's weights at other times; neither is done.
- t stays within what the network knows, theirs within 1e-5 of both ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.losses import pseudo_huber
from diffdistill.core.ode import ddim_step, sample_ode
from diffdistill.core.prediction import Prediction
from diffdistill.core.times import u_shaped
from diffdistill.options import StagedOptions, option
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.straightening import Line, StagedMethod, squared

ABOUT = About(
    paper="Liu et al. 2022, arXiv:2209.03003; Liu et al. 2023, arXiv:2309.06380; Lee et al. 2024, arXiv:2405.20320",
    data="noise-image pairs of the teacher",
    kind="trajectory",
    needs=("pairs",),
    equations={
        "reflow loss": "Reflow.error, scaffold.straightening.StraighteningMethod.straight_turn, data.pairs.make_pairs",
        "distillation of the reflowed student": "Reflow.distill_turn, Reflow.ends",
        "U-shaped times (rf++)": "core.times.u_shaped",
        "weighted pseudo-Huber and LPIPS (rf++)": "Reflow.error, core.distances.distance",
        "Euler steps": "Reflow.sampler, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(StagedOptions, student_lr=1e-4, distance="l2", distill_steps=0):
    """The options of reflow; the distance is that of images, in the second stage and beside the velocities."""

    time_exponent: float = option(0.0, "a of the U-shaped times, as e^(a t) and its mirror; 0: uniform", at_least=0)
    velocity_loss: Literal["l2", "huber"] = option("l2", "l2: mean square; huber: rf++'s weighted pseudo-Huber")
    image_weight: float = option(0.0, "weight of the distance of the image that the velocity leads to", at_least=0)
    image_over_time: bool = option(False, "divide that distance by t")
    ode_steps: int = option(25, "Euler steps of the reflowed student that make the second stage's images", at_least=1)


class Reflow(StagedMethod):
    """The second stage follows the ODE of the student of the first."""

    def line(self, step: int, batch: Batch) -> Line:
        a, pair = self.config.time_exponent, batch.paired
        t = batch.draw("student/t", lambda n, draw: u_shaped(self.schedule, n, draw, a))
        return Line(pair.x0, pair.z, t, pair.cond)

    def error(self, prediction: Prediction, line: Line) -> Tensor:
        own, other = self.velocities(prediction, line)
        time = self.schedule.native(line.t)
        sigma = (time.sigma / (time.alpha + time.sigma)).to(own)  # the flow's own time
        if self.config.velocity_loss == "l2":
            loss = squared(own, other)
        else:
            size = math.prod(own.shape[1:])
            loss = (1 - sigma) * pseudo_huber(own, other, 0.00054 * size) / size
        if self.config.image_weight:
            image = self.image_distance(prediction.x0, line.x0)
            loss = loss + self.config.image_weight * (image / sigma if self.config.image_over_time else image)
        return loss

    @torch.no_grad()
    def ends(self, z: Tensor, batch: Batch) -> Tensor:
        """(B, ...) what the reflowed student's ODE makes of noise z (B, ...)."""
        return sample_ode(ddim_step, self.reflowed, self.schedule, z, self.config.ode_steps, batch.cond)

    def distill_turn(self, batch: Batch) -> Outcome:
        """The distance of one step from the end of the reflowed student's trajectory."""
        z = batch.randn("student/z")
        loss = self.image_distance(self.one_step(z, batch.cond), self.ends(z, batch)).mean()
        return Outcome(loss, {"straightness": loss})


METHOD = Reflow
