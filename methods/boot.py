"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping.

Gu, Zhai, Zhang, Liu, Susskind 2023, arXiv:2306.05544. No code by the authors was found; the recursion is derived here.

No image is needed. From noise eps the teacher's deterministic steps lead through x_t = cos(t) y_t + sin(t) eps: the
noise stays, and the signal y_t goes from what the teacher first says to the sample y_0. The student says y_t for any t,
and learns it from noise downwards, each y_s from its own y_t a little above. One DDIM step from t to s is, in y,

    y_s = (1 - k) D(x_t, t) + k y_t,    k = tan(s)/tan(t),
    loss = |y(eps, s) - sg[(1 - k) D(cos(t) y(eps, t) + sin(t) eps, t) + k y(eps, t)]|^2,

with D the guided teacher's x0. From pure noise, k = 0: there y is D(eps) alone, with which the student begins. All is
bounded, where x0 from x_t would not be. After training the student says y_0 in one step.

Deviations:
- The student is the jump of a network of two times, which reads eps at the noisiest time and takes s for the second:
  at s = t it is the teacher, as a student that begins so, and at s = 0 a stock network of one time, to export.
- t and s are neighbours of a grid of the teacher's own N steps, where the authors draw t and take s = t - delta.
- `ramp_steps` opens the grid from noise downwards, so that no step bootstraps from what has not been learned yet.
- Their progressive images in pixel spaces and other details of networks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import expand
from diffdistill.core.schedule import sampling_grid
from diffdistill.options import StudentLevel, StudentOptions, TeacherGuidance, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.solo import SoloMethod
from diffdistill.scaffold.tangent import two_time_player

ABOUT = About(
    paper="Gu et al. 2023, arXiv:2306.05544",
    data="nothing",
    kind="trajectory",
    equations={
        "signal part of a trajectory": "Boot.y",
        "bootstrapping loss": "Boot.student_turn, Boot.target",
        "condition at pure noise": "Boot.target, players.two_times.time_input",
        "one-step sampling": "Boot.sampler",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, StudentLevel, TeacherGuidance, student_lr=1e-4):
    """BOOT's options."""

    solver_steps: int = option(64, "N, the teacher's DDIM steps that the student follows", at_least=1)
    ramp_steps: int = option(0, "training steps in which the grid opens from noise to data; 0: it is open", at_least=0)


class Boot(SoloMethod):
    """One player, the student, which takes the time to jump to; it is its own target."""

    trained_steps = range(1, 2)

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student=student or two_time_player(teacher, 1, config.student_level))
        self.top = self.schedule.init_level if config.student_level is None else config.student_level
        self.grid = sampling_grid(self.schedule, config.solver_steps, config.student_level, option="solver_steps")
        self.grid[0] = self.schedule.angle(self.top)  # where it starts

    def sampler(self) -> Sampler:
        """One jump from noise to data."""
        return Sampler(self.student, [self.top], DDIM())

    def y(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """(B, ...) the student's y_s at the angles s (B,), from the sampler's noise x (B, ...)."""
        return self.student(x, self.grid[0].to(s).expand(len(s)), cond, Extra(r=s)).x0

    @torch.no_grad()
    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """(B, ...) y_s by the teacher's step from the student's y_t, or from the noise x itself at the noisiest t."""
        top = self.grid[0].to(t)
        eps, first = x / expand(torch.sin(top), x), expand(top - t, x) <= 0
        y_t = torch.where(first, 0.0, self.y(x, t, cond))
        x_t = torch.where(first, x, expand(torch.cos(t), x) * y_t + expand(torch.sin(t), x) * eps)
        k = expand(torch.tan(s) / torch.tan(t), x)
        return (1 - k) * self.teacher(x_t, t, cond).x0 + k * y_t

    def open_steps(self, step: int) -> int:
        """How many of the grid's steps are trained, from noise downwards."""
        n, ramp = self.config.solver_steps, self.config.ramp_steps
        return n if step >= ramp else max(1, n * step // ramp)

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """The squared error of y_s."""
        i = (batch.uniform("student/t") * self.open_steps(step)).long()
        x, _ = self.sampler().start(batch.randn("z"))
        t, s, seed = self.grid.to(i.device)[i], self.grid.to(i.device)[i + 1], seed_for(*batch.key, "student/dropout")
        with seeded(seed, x.device):
            own = self.y(x, s, batch.cond)
        with seeded(seed, x.device):
            target = self.target(x, t, s, batch.cond)
        loss = per_sample_mean((own - target).square()).mean()
        return Outcome(loss, {"bootstrap": loss})


METHOD = Boot
