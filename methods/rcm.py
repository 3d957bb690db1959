"""rCM: Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency.

Zheng et al. 2025, arXiv:2510.08431 (code: NVlabs/rcm).

A consistency model that follows the teacher's trajectories (sCM, arXiv:2410.11081) covers what the teacher draws, and
errs in details, where its errors along the way add up. A gradient of DMD's kind, taken at what the student draws from
noise, corrects them: a "long skip" from the end of the way. With F the student's velocity, F- its value without a
gradient, F_T the teacher's, guided, and r rising from 0 to 1,

    g = -cos(t) sqrt(1 - r^2 sin(t)^2) (F- - F_T) - r cos(t) sin(t) (x_t + dF-/dt),    g <- g/(|g| + c),
    loss = weight |F - F- - g|^2 at noised images, and 1/2 |x - sg[x - (D_fake - D_teacher)/mean|x - D_teacher|]|^2,

g being cos(t) df/dt at r = 1. The samples x are drawn by the student itself in one step or more up to `student_steps`,
from noise, at times that are drawn downwards (`simulated_times`), and only the last step has a gradient. So one student
is sampled in any number of steps up to that. The fake score learns these samples.

Deviations:
- The fake score moves in each step, and the student before it in every `update_ratio`-th; the authors' take turns, four
  of the fake score for one of the student. It also learns while r rises; in their code the student moves alone there.
- How many steps are simulated is drawn, where theirs counts up in turn.
- Losses are means over elements. With `norm: l2`, `consistency_weight: 50` is the authors' 100 of sums, since their
  matching loss has no 1/2. Samples that are not finite stop a training here, and are left out there.
- Times of the matching are uniform in the teacher's own (a shifted flow's are theirs). The sampler's levels are evenly
  spaced in these, where theirs are 1.5, 1.4 and 1.0 after pi/2.
- `derivative: semi` is their semi-continuous derivative and `backward` their discrete one, over larger steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import expand
from diffdistill.core.times import edm_log_normal, native_uniform
from diffdistill.options import (
    DerivativeOptions,
    MatchingOptions,
    MatchingTimes,
    NormaliserOptions,
    SimulationOptions,
    TangentOptions,
    TangentTarget,
    option,
)
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod, matching_loss
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.simulation import simulated_through
from diffdistill.scaffold.tangent import Point, TangentMethod, normalised

ABOUT = About(
    paper="Zheng et al. 2025, arXiv:2510.08431",
    data="real images, to place x_t where the trajectories pass",
    kind="distribution",
    needs=("images",),
    equations={
        "g and its warm-up": "Consistency.tangent, options.TangentTarget.warm",
        "tangent normalisation": "scaffold.tangent.normalised",
        "the consistency loss": "Consistency.regression",
        "long-skip regulariser (DMD, arXiv:2311.18828)": (
            "RCM.matching, scaffold.matching.distribution_matching_gradient"
        ),
        "samples by the student's own steps": "RCM.simulated, scaffold.simulation.simulated_through",
        "the fake score's loss": "scaffold.matching.fake_score_loss",
        "semi-continuous and discrete derivative": "core.jvp.derivative",
    },
)


@dataclass(frozen=True)
class Config(MatchingOptions, MatchingTimes, NormaliserOptions, SimulationOptions, TangentTarget, DerivativeOptions,
             student_lr=2e-6, fake_score_lr=4e-7, beta1=0.0, weight_decay=0.01, update_ratio=4, time_low=0.0,
             time_high=1.0, time_std=1.6, tangent_warmup=1000, norm="l2"):  # fmt: skip
    """rCM's options; the teacher's guidance is that of both terms."""

    consistency_weight: float = option(50.0, "weight of the consistency loss; that of the matching is 1", at_least=0)
    simulated_times: Literal["drawn", "levels"] = option(
        "drawn", "where the student's steps to a sample begin; drawn: at times that are drawn; levels: at the sampler's"
    )


class Consistency(TangentMethod):
    """The game of the first term, whose only player is the student of both."""

    stream = "path"

    def __init__(self, teacher: Teacher, config: Config, student: Denoiser):
        c = self.own = config
        path = TangentOptions(
            guidance_scale=c.guidance_scale, derivative=c.derivative, derivative_step=c.derivative_step
        )
        super().__init__(teacher, path, student)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        normal = self.own.time_mean, self.own.time_std
        t = batch.draw("path/t", lambda n, draw: edm_log_normal(self.schedule, n, draw, *normal))
        return t, torch.zeros_like(t)

    def tangent(self, f: Tensor, at: Point, r: float) -> Tensor:
        """g (B, ...) where the student says f, not normalised: cos(t) df/dt at r = 1, the teacher's gap at r = 0."""
        cos, sin = torch.cos(at.t), torch.sin(at.t)
        toward = expand(cos * torch.sqrt(1 - r**2 * sin**2), f) * (f - at.v)
        return -toward - r * (expand(cos * sin, f) * at.x_t + self.derivative(at, cos * sin))

    def regression(self, step: int, at: Point) -> Outcome:
        """The squared error against F- + g."""
        f = self.velocity(at)
        g = self.tangent(f.detach(), at, self.own.warm(step))
        target = f.detach() + normalised(g, self.own.norm, self.own.norm_c)
        return Outcome(per_sample_mean((f - target).square()).mean())


class RCM(MatchingMethod):
    """Distribution matching, whose student also plays a game of tangents."""

    needs = Consistency.needs

    def __init__(
        self, teacher: Teacher, config: Config, *, student: Denoiser | None = None, fake_score: Denoiser | None = None
    ):
        super().__init__(teacher, config, student=student, fake_score=fake_score)
        self.consistency = Consistency(teacher, config, self.student)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        return matching_loss(x, t, eps, cond, self.teacher, self.fake_score, self.config.normalise)

    def simulated(self, k: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """After k steps; times that are drawn descend, each the least of a draw and the one before."""
        if self.config.simulated_times == "levels":
            return super().simulated(k, batch)
        angles = partial(native_uniform, self.schedule)
        draws = [batch.draw(f"z {j}/t", angles) for j in range(1, k + 1)]
        times = list(torch.stack(draws).cummin(0).values) if draws else []
        return simulated_through(self.sampler(), times, batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        """Consistency at noised images and, when r is 1, the matching of the student's samples."""
        step = batch.key[1]
        consistency = self.consistency.student_turn(step, batch).loss
        loss, shown = self.config.consistency_weight * consistency, {"consistency": consistency}
        if self.config.warm(step) < 1:
            with torch.no_grad():
                return self.generate(batch, "student"), Outcome(loss, shown)
        x, matched = super().student_loss(batch)
        return x, Outcome(loss + matched.loss, {**matched.shown, **shown})


METHOD = RCM
