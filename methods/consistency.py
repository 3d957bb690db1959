"""Consistency: Consistency Models, discrete in time, by distillation, by training, and made easy.

Song, Dhariwal, Chen, Sutskever, ICML 2023, arXiv:2303.01469 (code: openai/consistency_models).
Mode easy: Geng, Pokle, Luo, Lin, Kolter, 2024, arXiv:2406.14548 (code: locuslab/ect).

f(x_t, t) is to be the same everywhere on a trajectory of the teacher's ODE: its end. In mode distillation one step of
the teacher leads from a noised image x_t to the less noisy x_r, and f(x_t, t) is pulled to what a slow copy of f says
at x_r; on a grid of N angles the student becomes the product of the solver's steps. Mode training needs no teacher
step, since x_r has the noise of x_t; its N grows. Mode easy draws t from a log-normal distribution, ties r to it,
brings r closer to t stage by stage, and has no slow copy.

Deviations:
- f is the student's x0 prediction, whatever the network's output. At the grid's last point the *target* is x_r itself
  (eq. 4), where the authors' c_skip and c_out with sigma - sigma_min (eq. 5) make f the identity; so the boundary holds
  for every kind of output, and f is never trained there. A CMStochasticIterativeScheduler teacher has eq. 5 as well.
- Outside EDM the "karras" grid spans sigma 80 to 0.002 (at data_std 0.5), or less where the schedule knows less; its
  first point is moved to where the student's sampler starts, which may be pure noise.
- The sampler adds noise of variance sigma^2, the paper sigma^2 - sigma_min^2; its levels are the schedule's own, not
  searched for by FID. AdamW stands for RAdam. mu(k) is the paper's, mu0^(s0/N(k)); the code has N(k) - 1 there.
- LPIPS is the `lpips` package's VGG, with max pooling; the authors' has average pooling. `huber_c` and `time_mean`
  count in the data's own units.
- Where r comes below the least level that the network knows, "easy" takes r = 0, and x_r itself as the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, heun_step, heun_x0_step
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import grid_points_at, log_normal
from diffdistill.errors import UserError
from diffdistill.options import FollowingOptions, ImageDistance, TeacherGuidance, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.following import FollowingMethod, trajectory_grid
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Song et al. 2023, arXiv:2303.01469",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "consistency distillation loss (eq. 7, Algorithm 2)": "Consistency.following",
        "ODE step (eq. 6); training pair (eq. 10)": "Consistency.less_noisy, core.ode.ddim_step, core.ode.heun_step",
        "boundary condition f(x, sigma_min) = x (section 3)": "Consistency.target_x0",
        "Karras grid (section 4)": "core.times.karras_grid",
        "N(k) and mu(k) (appendix C)": "core.times.grid_points_at, Consistency.target_decay",
        "target's moving average (eq. 8)": "scaffold.following.FollowingMethod.after_step",
        "distances; pseudo-Huber of Song & Dhariwal 2023, arXiv:2310.14189": "core.distances.distance",
        "t to r and its stages (arXiv:2406.14548 and its code)": "Consistency.easy_partner",
        "multistep sampling (Algorithm 1)": "players.sampler.Renoise",
    },
)


@dataclass(frozen=True)
class Config(FollowingOptions, ImageDistance, TeacherGuidance, student_lr=1e-4):
    """The options of consistency models; target_ema is mu, in training mu0."""

    mode: Literal["distillation", "training", "easy"] = option(
        "distillation",
        "distillation: a teacher step leads to x_r; training: the data's noise; easy: continuous t, no slow target",
    )
    grid: Literal["karras", "native"] = option("karras", "karras: rho 7 in sigma; native: the teacher's own steps")
    grid_points: int = option(40, "N, the points of the grid in distillation, both ends counted", at_least=2)
    solver: Literal["heun", "heun_x0", "euler"] = option("heun", "the teacher's step; heun_x0: mean x0, for long ones")
    loss_weight: Literal["auto", "uniform", "inverse_step"] = option(
        "auto", "inverse_step: 1/(sigma_t - sigma_r); auto: inverse_step for mode easy, else uniform"
    )
    start_scales: int = option(2, "mode training: s0, N at the start", at_least=2)
    end_scales: int = option(150, "mode training: s1, N - 1 at the end", at_least=2)
    ramp_steps: int = option(100000, "mode training: K, the training steps over which N grows", at_least=1)
    time_mean: float = option(-1.1, "mode easy: mean of ln sigma")
    time_std: float = option(2.0, "mode easy: standard deviation of ln sigma", above=0)
    stage_factor: float = option(2.0, "mode easy: q, the factor by which a stage brings r closer to t", above=1)
    stage_steps: int = option(10000, "mode easy: training steps of a stage", at_least=1)
    ratio_limit: float = option(0.999, "mode easy: the highest r/t", above=0, below=1)
    easy_from: Literal["data", "teacher"] = option(
        "data", "mode easy: x_r from the data's noise, or by one Euler step of the teacher"
    )


class Step(NamedTuple):
    """From t to the less noisy r, both (B,)."""

    t: Tensor
    r: Tensor


class Consistency(FollowingMethod[Step]):
    """f is the student's x0 prediction; in mode easy the student is its own target."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = config
        super().__init__(teacher, c, student or teacher.player("student"), slow_target=c.mode != "easy")
        self.from_teacher = c.mode == "distillation" or (c.mode == "easy" and c.easy_from == "teacher")
        if c.guidance_scale != 1 and not self.from_teacher:
            raise UserError(f"guidance_scale: {c.guidance_scale} guides the teacher's step, and this mode has none")
        self.teacher = guided(self.teacher, c.guidance_scale)
        self.top = self.schedule.t_max if c.student_level is None else float(self.schedule.angle(c.student_level))
        if c.mode != "easy":
            self.grid(c.ramp_steps)  # one that is too fine is refused now, not later
        self.end = 0.0 if c.mode == "easy" else float(self.grid(0)[-1])
        self.inverse_step = c.loss_weight == "inverse_step" or (c.loss_weight == "auto" and c.mode == "easy")

    def points(self, step: int) -> int:
        """N at that training step."""
        c, ends = self.config, (self.config.start_scales, self.config.end_scales)
        return grid_points_at(step, c.ramp_steps, *ends) if c.mode == "training" else c.grid_points

    def target_decay(self, step: int) -> float:
        """mu at that training step."""
        c = self.config
        return c.target_ema ** (c.start_scales / self.points(step)) if c.mode == "training" else c.target_ema

    def grid(self, step: int) -> Tensor:
        """(N,) the descending angles of that training step."""
        c, first = self.config, self.sampler().levels[0]
        return trajectory_grid(self.schedule, self.points(step), c.grid, first, c.student_level)

    def interval(self, step: int, batch: Batch) -> Step:
        if self.config.mode == "easy":
            normal = partial(log_normal, self.schedule, mean=self.config.time_mean, std=self.config.time_std)
            t = batch.draw("student/t", normal)
            t = t.clamp(self.schedule.t_min, self.top)
            return Step(t, self.easy_partner(t, step))
        grid = self.grid(step).to(batch.device)
        i = batch.integers(len(grid) - 1, "student/t")
        return Step(grid[i], grid[i + 1])

    def easy_partner(self, t: Tensor, step: int) -> Tensor:
        """r (B,) of t: in sigma, r = t - t (1 - ratio)(1 + 8 sigmoid(-t)); 0 below what the network knows."""
        c = self.config
        ratio = min(1 - c.stage_factor ** -(1 + step // c.stage_steps), c.ratio_limit)
        sigma = self.schedule.data_std * torch.tan(t)
        sigma = sigma - sigma * (1 - ratio) * (1 + 8 * torch.sigmoid(-sigma))
        r = torch.atan(sigma.clamp_min(0) / self.schedule.data_std)
        return torch.where(r < self.schedule.t_min, 0.0, r)

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Step, cond: Cond) -> Tensor:
        if not self.from_teacher:
            return diffuse(x0, interval.r, eps)
        heun = heun_step if self.config.solver == "heun" else heun_x0_step
        plain = self.config.solver == "euler" or self.config.mode != "distillation"
        return (ddim_step if plain else heun)(self.teacher, x_t, *interval, cond)

    @torch.no_grad()
    def target_x0(self, x_r: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) what the target says at x_r; at the boundary x_r itself, in the scale of x0."""
        boundary = expand(r - self.end, x_r) <= 0
        return torch.where(boundary, x_r / expand(torch.cos(r), x_r), self.target(x_r, r, cond).x0)

    def following(self, x_t: Tensor, x_r: Tensor, interval: Step, cond: Cond, seed: int = 0) -> Outcome:
        """w(t) d(f(x_t, t), sg f_target(x_r, r))."""
        t, r = interval
        x0, target = self.both(seed, x_t, lambda: self.student(x_t, t, cond).x0, lambda: self.target_x0(x_r, r, cond))
        d = self.image_distance(x0, target)
        gap = self.schedule.data_std * (torch.tan(t) - torch.tan(r))  # of sigma
        weighted = d / gap.to(d) if self.inverse_step else d
        return Outcome(weighted.mean(), {"distance": d.mean()})


METHOD = Consistency
