"""PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator.

Yan, Liu, Pan, Liew, Liu, Feng 2024, arXiv:2405.07510 (code: magic-research/piecewise-rectified-flow).

Reflow makes a trajectory straight as a whole, from pairs that were stored. Here it is cut into K windows, which are
made straight one by one, and pairs are made as they are needed: in a window from the noise level s down to e, noised
data x_s and what a few steps of the teacher's ODE make of them, x_e. The one line through both has

    x_s = cos(s) x0 + sin(s) eps,    x_e = cos(e) x0 + sin(e) eps,

and the student is to say these x0 and eps all along it (the authors' "ddim_eps", or a flow's velocity). One DDIM step
a window then comes to x_e, and more steps to the same. K = 1 is reflow from noised data.

Guidance is the teacher's, at one scale, or none, with a share of conditions dropped for both, so that the student is
guided as it is sampled (the authors' "cfg_sync").

Read in the authors' code. Deviations:
- x_t lies on the line through x_s and x_e that DDIM steps stay on. With the authors it is linear in the network's
  units and timestep, for flows the same, for others another curve with the same ends, which needs their own scheduler.
- Windows are those of the teacher's own sampler of K steps.
- Half of the samples are at their window's beginning (`at_start`; with the authors none). One step a window reads the
  network there alone, and just above it the window before ends, with another line: of evenly drawn times a network that
  is smooth in time learns something between the two.
- Where a condition is dropped, the teacher has none either; with the authors' fixed guidance it keeps its own.
- Their "diff_eps", whose noise is that of a chain from e to s, is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, inverse_ddim
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.core.schedule import student_levels
from diffdistill.errors import UserError
from diffdistill.options import ConditionDropout, TeacherGuidance, TrajectoryOptions, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Need, some_dropped
from diffdistill.scaffold.straightening import Line, StraighteningMethod, squared

ABOUT = About(
    paper="Yan et al. 2024, arXiv:2405.07510",
    data="real images, to place the windows' beginnings",
    kind="trajectory",
    needs=("images",),
    equations={
        "piecewise reflow loss": "PeRFlow.error, scaffold.straightening.StraighteningMethod.straight_turn",
        "ends of a window": "PeRFlow.solved, core.ode.ddim_step",
        "the noise of a window's line (ddim_eps)": "PeRFlow.line, core.ode.inverse_ddim",
        "synchronised guidance (cfg_sync)": "scaffold.method.some_dropped",
        "one step a window, or more": "PeRFlow.sampler, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(TrajectoryOptions, TeacherGuidance, ConditionDropout, student_lr=8e-5, student_steps=4, label_dropout=0.0):
    """PeRFlow's options; student_steps is a multiple of the windows."""

    windows: int = option(4, "K, the parts of the trajectory, each of which is made straight", at_least=1)
    solver_steps: int = option(8, "the teacher's DDIM steps in a window", at_least=1)
    at_start: float = option(
        0.5,
        "share of samples at their window's very beginning, where one step a window reads the network and the window "
        "before ends with another line",
        at_least=0,
        at_most=1,
    )
    loss: Literal["epsilon", "velocity", "v"] = option(
        "v", "the squared error of the noise, of a flow's velocity, or of v, which weighs the two ends alike"
    )

    def check(self) -> None:
        if self.levels is not None:
            raise UserError("levels: the windows are those of evenly spaced steps; say student_steps instead")
        if self.student_steps % self.windows:
            raise UserError(f"student_steps: {self.student_steps} is no multiple of the {self.windows} windows")


class PeRFlow(StraighteningMethod):
    """The windows end where a sampler of K steps denoises."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})  # type: ignore[misc]

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        self.guided = guided(self.teacher, config.guidance_scale)
        total, level = config.windows * config.solver_steps, config.student_level
        levels = student_levels(self.schedule, total, level, option="windows times solver_steps")
        self.grid = torch.cat([self.schedule.angle(levels), torch.zeros(1, dtype=torch.float64)])
        self.trained_steps = range(config.windows, 1001, config.windows)

    def sampler(self) -> Sampler:
        """The same number of DDIM steps in each window."""
        return Sampler(self.student, self.levels_in(self.sampling_steps), DDIM())

    def solved(self, x: Tensor, window: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_e at the end of the windows (B,) that x (B, ...) is at the beginning of."""
        n, grid = self.config.solver_steps, self.grid.to(x.device)
        for k in range(n):
            x = ddim_step(self.guided, x, grid[window * n + k], grid[window * n + k + 1], cond)
        return x

    def line(self, step: int, batch: Batch) -> Line:
        """The pair of each window that its two ends lie on, and an angle between them, uniform in the native time."""
        n, cond = self.config.solver_steps, some_dropped(batch, self.teacher.null, self.config.label_dropout).cond
        window, grid = batch.integers(self.config.windows, "student/window"), self.grid.to(batch.device)
        s, e = grid[window * n], grid[(window + 1) * n]
        x_s = diffuse(batch.images, s, batch.randn("student/eps"))
        x0 = inverse_ddim(self.solved(x_s, window, cond), x_s, s, e)
        eps = (x_s - expand(torch.cos(s), x_s) * x0) / expand(torch.sin(s), x_s)
        inside = batch.uniform("student/t") * (batch.uniform("student/at start") >= self.config.at_start)
        time = torch.lerp(self.schedule.fraction(s), self.schedule.fraction(e), inside)
        return Line(x0, eps, self.schedule.at_fraction(time).clamp(max=s), cond)

    def error(self, prediction: Prediction, line: Line) -> Tensor:
        if self.config.loss == "epsilon":
            return squared(prediction.eps, line.eps)
        if self.config.loss == "velocity":
            return super().error(prediction, line)
        cos, sin = (expand(part(line.t), line.x0) for part in (torch.cos, torch.sin))
        return squared(prediction.v, cos * line.eps - sin * line.x0)


METHOD = PeRFlow
