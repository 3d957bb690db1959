"""TDD: Target-Driven Distillation.

Wang, Guo, Duan, Li, Chen, Tang, Hu 2024, arXiv:2409.01347 (code: RedAIGC/Target-Driven-Distillation).

A consistency model learns jumps that sampling never makes. Here the student, from x_t and from one guided step of the
teacher below it, x_r, jumps only to times that a sampler of steps_min to steps_max steps visits. With S the union of
these samplers' levels and 0, and s0 uniform among those of S that lie at most `reach` below the greatest one that is
not above r,

    s = (1 - u eta) s0, u uniform in [0, 1),    loss = d(f(x_t, t, s), sg f(x_r, r, s)) + lambda GAN,

f being the DDIM step from t to s, of a network that is not told s. eta > 0 makes room for samplers that jump below a
level and add noise (`gamma`). A share of samples has no condition, for teacher and student: the student's own guidance
can then be set when it samples (decoupled guidance).

The network is one for all s: with several s for one t only an x0 that is the same along the trajectory would be exact,
and what is learned is between them. With one s for each t it is the trajectory, as `pcm`'s.

Read in the authors' code. Scales here are a = 1 + w: its w = 3.5 is guidance_scale 4.5.

Deviations:
- s is not rounded to a timestep. At s = 0 it is clean data, where theirs have the noise of timestep 0.
- Where a condition is dropped, it is the teacher's own "no condition", also in its guidance. Their SDXL script has the
  encoded empty text for the one, and zeros for the other.
- Both players move in every step, with the heads of `ladd`, where theirs take turns (`pcm` has the same GAN).
- Samples take DDIM steps, with gamma those of TCDScheduler; their own scheduler's clipping is left to pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import lcm_indices
from diffdistill.errors import UserError
from diffdistill.options import ConditionDropout, SegmentOptions, option
from diffdistill.players.sampler import Sampler, gamma_step
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, some_dropped
from diffdistill.scaffold.segments import SegmentMethod

ABOUT = About(
    paper="Wang et al. 2024, arXiv:2409.01347",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "loss at the target times": "scaffold.segments.SegmentMethod.following, scaffold.segments.SegmentMethod.jumped",
        "target times, and s below them": "TDD.target_levels, TDD.ends",
        "decoupled guidance": "TDD.prepared, scaffold.method.some_dropped",
        "guided step of the teacher": "scaffold.segments.SegmentMethod.less_noisy",
        "adversarial term": "scaffold.adversary.EdgeAdversary",
        "sampling with gamma": "TDD.sampler, players.sampler.Gamma",
    },
)


@dataclass(frozen=True)
class Config(SegmentOptions, ConditionDropout, student_lr=1e-6, solver_steps=250):
    """TDD's options."""

    steps_min: int = option(4, "the fewest sampling steps whose times are trained for", at_least=1)
    steps_max: int = option(8, "the most sampling steps whose times are trained for", at_least=1)
    student_steps: int | None = option(None, "sampling steps, steps_min to steps_max; none: steps_min", at_least=1)
    reach: float = option(0.26, "how far below r the times lie at most, of the teacher's own time", above=0, at_most=1)
    eta: float = option(0.3, "the most by which s lies below its time, as a share of it", at_least=0, at_most=1)
    gamma: float = option(0.0, "fresh noise between sampling steps, at most eta; 0: none", at_least=0, at_most=1)

    def check(self) -> None:
        if not self.steps_min <= self.steps_max <= self.solver_steps:
            least, most = self.steps_min, self.solver_steps
            raise UserError(f"steps_max: {self.steps_max} is not from {least} (steps_min) to {most} (solver_steps)")
        if self.student_steps is None:
            object.__setattr__(self, "student_steps", self.steps_min)
        elif not self.steps_min <= self.student_steps <= self.steps_max:
            trained = f"{self.steps_min} (steps_min) to {self.steps_max} (steps_max)"
            raise UserError(f"student_steps: {self.student_steps} is not among those that are trained, {trained}")
        if self.gamma > self.eta:
            raise UserError(f"gamma: {self.gamma} jumps further below a level than is trained, {self.eta} (eta)")


class TDD(SegmentMethod):
    """The student is its own target."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        self.trained_steps = range(config.steps_min, config.steps_max + 1)
        self.targets = self.target_levels(torch.tensor([*self.levels, 0.0], dtype=torch.float64))

    def target_levels(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S (M,), ascending levels; of each of the teacher's steps (N,) the least and greatest place in S of s0."""
        c, n = self.config, len(levels) - 1
        visited = {i for steps in range(c.steps_min, c.steps_max + 1) for i in lcm_indices(n, steps)} - {0}
        own = torch.tensor([n, *sorted(visited, reverse=True)])
        time = self.schedule.fraction(self._angle(levels))
        greatest = (own[None] > torch.arange(n)[:, None]).sum(1) - 1
        far = time[own][None] < time[own][greatest][:, None] - c.reach - 1e-9
        return levels[own], far.sum(1).clamp(max=greatest), greatest

    def _angle(self, level: Tensor) -> Tensor:
        return torch.where(level > 0, self.schedule.angle(level), 0.0)

    def sampler(self) -> Sampler:
        """Those of the teacher's steps that are evenly apart, as whole indices are."""
        indices = lcm_indices(self.config.solver_steps, self.sampling_steps or self.config.student_steps)
        return Sampler(self.student, [self.levels[i] for i in indices], gamma_step(self.config.gamma))

    def prepared(self, step: int, batch: Batch) -> Batch:
        return some_dropped(batch, self.teacher.null, self.config.label_dropout)

    def ends(self, step: int, i: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The discriminator reads noise up to that of one of steps_min steps above s."""
        levels, least, greatest = (part.to(i.device) for part in self.targets)
        j = least[i] + (batch.uniform("student/target") * (greatest[i] - least[i] + 1)).long()
        s = self._angle((1 - self.config.eta * batch.uniform("student/shorter")) * levels[j])
        time = self.schedule.fraction(s) + 1 / self.config.steps_min
        return self.schedule.at_fraction(time.clamp(max=1.0)).clamp(max=float(self.grid[0])), s


METHOD = TDD
