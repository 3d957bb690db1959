"""Consistency: Consistency Models, discrete in time, by distillation, by training, and made easy.

Song, Dhariwal, Chen, Sutskever, ICML 2023, arXiv:2303.01469 (code: openai/consistency_models); "easy" is Geng,
Pokle, Luo, Lin, Kolter, 2024, arXiv:2406.14548 (code: locuslab/ect).

f(x_t, t) is to be the same everywhere on a trajectory of the teacher's ODE: its end. From a noised image x_t one
step of the teacher gives the less noisy x_r, and f(x_t, t) is pulled to what a slow copy of f says at x_r
(`mode: distillation`). On a grid of N angles the student can follow exactly: it becomes the product of the
solver's steps. `training` needs no teacher step, since x_r has the noise of x_t; its N grows. `easy` draws t from
a log-normal distribution, ties r to it, brings r closer to t stage by stage, and has no slow copy.

Deviations: f is the student's x0 prediction. At t = 0 that is the identity for outputs of kind v, flow, eps and
EDM's F, but the grid ends at a sigma_min above 0, where the authors' c_skip and c_out (sigma - sigma_min in place
of sigma, eq. 5) make f the identity. Here the *target* at the grid's last point is x_r itself, whatever the
network says there, which is the paper's other way (eq. 4): so the boundary holds for every kind of output, and f
is never trained at that point. A teacher with a CMStochasticIterativeScheduler has eq. 5 as well. Outside EDM the
"karras" grid spans sigma 80 to 0.002 (at data_std 0.5) or less where the schedule knows less; its first point is
moved to where the student's sampler starts, which may be pure noise. The sampler adds noise of variance sigma^2,
the paper sigma^2 - sigma_min^2, and its levels are the schedule's own, not searched for by FID. AdamW stands for
RAdam. mu(k) is the paper's, mu0^(s0/N(k)); the authors' code has N(k) - 1 there. LPIPS is the `lpips` package's
VGG, with max pooling; the authors' has average pooling. Where r comes below the least level that the network
knows, "easy" takes r = 0, and x_r itself as the target. `huber_c` and `time_mean` count in the data's own units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, heun_step
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.schedule import sampling_grid, student_levels
from diffdistill.core.times import karras_grid, log_normal
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen, trainable_copy
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Song et al. 2023, arXiv:2303.01469"
DATA = "real images, to place x_t where the trajectories pass"
EQUATIONS = {
    "consistency distillation loss (eq. 7, Algorithm 2)": "Consistency.consistency",
    "one step of the teacher's ODE (eq. 6)": "Consistency.less_noisy, ode.ddim_step, ode.heun_step",
    "consistency training pair (eq. 10, Algorithm 3)": "Consistency.less_noisy",
    "boundary condition f(x, sigma_min) = x (section 3)": "Consistency.target_x0",
    "Karras grid (section 4)": "times.karras_grid",
    "N(k) and mu(k) (appendix C)": "grid_points_at, Consistency.target_decay",
    "target's moving average (eq. 8)": "Consistency.after_step",
    "distances; pseudo-Huber of Song & Dhariwal 2023, arXiv:2310.14189": "distances.distance",
    "t to r and its stages (arXiv:2406.14548 and its code)": "Consistency.easy_partner",
    "multistep sampling (Algorithm 1)": "players.FewStepSampler",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 300,
        "batch_size": 64,
        "grid": "native",
        "grid_points": 18,
        "student_lr": 8e-4,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "cifar10": {
        "steps": 800000,
        "batch_size": 512,
        "grid_points": 18,
        "distance": "lpips",
        "target_ema": 0.0,
        "student_lr": 4e-4,
        "ema": 0.9999,
    },
    "imagenet64": {
        "steps": 600000,
        "batch_size": 2048,
        "grid_points": 40,
        "distance": "lpips",
        "target_ema": 0.95,
        "student_lr": 8e-6,
        "ema": 0.999943,
    },
    "imagenet64-training": {
        "mode": "training",
        "steps": 800000,
        "ramp_steps": 800000,
        "batch_size": 2048,
        "start_scales": 2,
        "end_scales": 200,
        "distance": "lpips",
        "target_ema": 0.95,
        "student_lr": 8e-6,
        "ema": 0.999943,
    },
    "cifar10-easy": {
        "mode": "easy",
        "steps": 200000,
        "batch_size": 128,
        "stage_steps": 25000,
        "huber_c": 1e-8,
        "student_lr": 1e-4,
        "ema": 0.9999,
    },
}
PASSES = {"digits": 4}
ANY_STEPS = True
END_TO_END = {
    "kind": "trajectory",
    "options": {"grid": "native", "grid_points": 18, "steps": 2000, "student_lr": 1e-3},
}


@dataclass(frozen=True)
class Config:
    """The options of consistency models."""

    mode: Literal["distillation", "training", "easy"] = option(
        "distillation", "where x_r comes from: a teacher step, the data's noise; easy: continuous t, no slow target"
    )
    grid: Literal["karras", "native"] = option("karras", "karras: rho 7 in sigma; native: the teacher's own steps")
    grid_points: int = option(40, "N, the points of the grid in distillation, both ends counted", at_least=2)
    solver: Literal["heun", "euler"] = option("heun", "the teacher's step; heun costs two of its passes")
    distance: Literal["huber", "l2", "lpips"] = option(
        "huber", "huber: of the whole sample; l2: squared; lpips: VGG features, with pip install lpips"
    )
    huber_c: float | None = option(None, "pseudo-Huber's c; default: 0.00054 sqrt(dimensions)", above=0)
    loss_weight: Literal["auto", "uniform", "inverse_step"] = option(
        "auto", "inverse_step: 1/(sigma_t - sigma_r); auto: that for easy, else uniform"
    )
    target_ema: float = option(0.95, "mu, the target's moving average; in training mu0", at_least=0, below=1)
    start_scales: int = option(2, "training: s0, N at the start", at_least=2)
    end_scales: int = option(150, "training: s1, N - 1 at the end", at_least=2)
    ramp_steps: int = option(100000, "training: K, the steps over which N grows", at_least=1)
    time_mean: float = option(-1.1, "easy: mean of ln sigma")
    time_std: float = option(2.0, "easy: standard deviation of ln sigma", above=0)
    stage_factor: float = option(2.0, "easy: q, a stage brings r closer to t by that factor", above=1)
    stage_steps: int = option(10000, "easy: training steps of a stage", at_least=1)
    ratio_limit: float = option(0.999, "easy: r/t grows no further than this", above=0, below=1)
    easy_from: Literal["data", "teacher"] = option("data", "easy: x_r from the data's noise, or one Euler step")
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    student_steps: int = option(1, "sampling steps, at the schedule's own levels; training is the same", at_least=1)
    student_lr: float = option(1e-4, "AdamW's learning rate", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)


class Consistency:
    """One player; its moving average, the target, lies in the checkpoint."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = self.config = config
        self.from_teacher = c.mode == "distillation" or (c.mode == "easy" and c.easy_from == "teacher")
        if c.guidance_scale != 1 and not self.from_teacher:
            raise UserError(f"guidance_scale: {c.guidance_scale} guides the teacher's step, and this mode has none")
        self.schedule = teacher.denoiser.schedule
        self.teacher = guided(frozen(teacher.denoiser), c.guidance_scale)
        self.student = student or teacher.player("student")
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {}
        self.target = self.student
        if c.mode != "easy":
            self.target = self.state["target"] = trainable_copy(self.student).requires_grad_(False)
            self.grid(c.ramp_steps)  # one that is too fine is refused now, not later
        self.end = 0.0 if c.mode == "easy" else float(self.grid(0)[-1])
        self.inverse_step = c.loss_weight == "inverse_step" or (c.loss_weight == "auto" and c.mode == "easy")
        self.distance = distance(c.distance, teacher.shape, self.schedule.data_std, c.huber_c)

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", partial(self.student_turn, step))]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """target <- mu target + (1 - mu) student."""
        if self.state:
            averages: list[Tensor] = list(self.target.parameters())
            torch._foreach_lerp_(averages, list(self.student.parameters()), 1 - self.target_decay(step))

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.student, student_levels(self.schedule, self.config.student_steps).tolist())

    # -- times ---------------------------------------------------------------------------------------------

    def points(self, step: int) -> int:
        """N at that training step."""
        c = self.config
        if c.mode != "training":
            return c.grid_points
        return grid_points_at(step, c.ramp_steps, c.start_scales, c.end_scales)

    def target_decay(self, step: int) -> float:
        """mu at that training step."""
        c = self.config
        return c.target_ema ** (c.start_scales / self.points(step)) if c.mode == "training" else c.target_ema

    def grid(self, step: int) -> Tensor:
        """(N,) the descending angles of that training step."""
        n = self.points(step)
        grid = karras_grid(self.schedule, n) if self.config.grid == "karras" else sampling_grid(self.schedule, n - 1)
        grid[0] = self.schedule.angle(self.sampler().levels[0])
        if not bool((grid.diff() < 0).all()):
            raise UserError(f"grid_points: {n} is more than the teacher's schedule has room for; give fewer")
        return grid

    def times(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and the less noisy r, both (B,)."""
        c, draw = self.config, batch.generator("student/t")
        if c.mode == "easy":
            t = log_normal(self.schedule, batch.size, draw, c.time_mean, c.time_std)
            t = t.clamp(self.schedule.t_min, self.schedule.t_max)
            return t, self.easy_partner(t, step)
        grid = self.grid(step).to(draw.device)
        i = torch.randint(len(grid) - 1, (batch.size,), generator=draw, device=draw.device)
        return grid[i], grid[i + 1]

    def easy_partner(self, t: Tensor, step: int) -> Tensor:
        """r (B,) of t: in sigma, r = t - t (1 - ratio)(1 + 8 sigmoid(-t)); 0 below what the network knows."""
        c = self.config
        ratio = min(1 - c.stage_factor ** -(1 + step // c.stage_steps), c.ratio_limit)
        sigma = self.schedule.data_std * torch.tan(t)
        sigma = sigma - sigma * (1 - ratio) * (1 + 8 * torch.sigmoid(-sigma))
        r = torch.atan(sigma.clamp_min(0) / self.schedule.data_std)
        return torch.where(r < self.schedule.t_min, 0.0, r)

    # -- the loss ------------------------------------------------------------------------------------------

    def student_turn(self, step: int, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        t, r = self.times(step, batch)
        eps = batch.randn("student/eps")
        x_t = diffuse(batch.x0, t, eps)
        x_r = self.less_noisy(x_t, batch.x0, eps, t, r, batch.cond)
        return self.consistency(x_t, x_r, t, r, batch.cond, seed_for(*batch.key, "student/dropout"))

    @torch.no_grad()
    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_r: one step of the teacher from x_t, or x0 under the same noise as x_t."""
        if not self.from_teacher:
            return diffuse(x0, r, eps)
        heun = self.config.solver == "heun" and self.config.mode == "distillation"
        return (heun_step if heun else ddim_step)(self.teacher, x_t, t, r, cond)

    @torch.no_grad()
    def target_x0(self, x_r: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) what the target says at x_r; at the boundary x_r itself, in the scale of x0."""
        own = self.target(x_r, r, cond).x0
        return torch.where(expand(r - self.end, x_r) <= 0, x_r / expand(torch.cos(r), x_r), own)

    def consistency(
        self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, cond: Cond, seed: int = 0
    ) -> dict[str, Tensor]:
        """w(t) d(f(x_t, t), sg f_target(x_r, r)); both passes drop the same units."""
        with seeded(seed, x_t.device):
            x0 = self.student(x_t, t, cond).x0
        with seeded(seed, x_t.device):
            target = self.target_x0(x_r, r, cond)
        d = self.distance(x0, target)
        gap = self.schedule.data_std * (torch.tan(t) - torch.tan(r))  # of sigma
        weighted = d / gap.to(d) if self.inverse_step else d
        return {"loss": weighted.mean(), "distance": d.mean()}


METHOD = Consistency


def grid_points_at(k: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, from s0 to s1 + 1; constant after K."""
    return math.ceil(math.sqrt(min(k / total, 1) * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
