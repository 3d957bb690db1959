"""MeanFlow: Mean Flows for One-step Generative Modeling.

Geng, Deng, Bai, Kolter, He 2025, arXiv:2505.13447 (code: Gsunshine/meanflow and py-meanflow).
Restricted to short intervals: DisCa, 2026, arXiv:2602.05449 (no code; `longest_jump`).

The student takes two times and learns the average velocity u of the path from x_t to x_r, so that x_r = x_t - (t - r) u
in one pass. Differentiating (t - r) u gives an identity without an integral, u = v - (t - r) du/dt, whose right side is
the target: one Jacobian-vector product of the network along the direction v. Mode training takes v from the image and
its noise, whose mean is the marginal velocity; mode distillation takes the teacher's, guided if wanted.

In the normal form, with F the velocity for which x_r = cos(t - r) x_t - sin(t - r) F, the identity of u reads

    k [cos(t - r) (F - v) + sin(t - r) (x_t + dF/dt)] = 0,   k = rho(t)/rho(r),   rho = data_std sin + cos,

and u - u_target is rho(t) times its left side, for any data_std. So the loss below is the paper's whatever the network
predicts, and for a flow-matching network word for word.

Guidance in mode training is the paper's: v is replaced by omega v + (1 - omega - kappa) u(x_t, t, t | none) + kappa
u(x_t, t, t | c), of the student itself. Here `guidance_scale` is the scale that comes of it, omega/(1 - kappa), and
`guidance_mix` is kappa.

Deviations:
- What the network sees of r is the gap to t in its schedule's own time, through an embedding that is nothing at r = t.
- Each sample is trained at r = t with probability `equal_share`, and without its condition with `label_dropout`, drawn
  independently; in the authors' code the conditions are dropped of the first samples, which are those with r = t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra, choose
from diffdistill.core.guidance import require_null
from diffdistill.core.prediction import expand
from diffdistill.core.times import logit_normal
from diffdistill.errors import UserError
from diffdistill.options import TangentOptions, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point, TangentMethod, two_time_player

ABOUT = About(
    paper="Geng et al. 2025, arXiv:2505.13447",
    data="real images, to place x_t, and in mode training for the direction",
    kind="trajectory",
    needs=("images",),
    equations={
        "MeanFlow identity (eq. 6)": "MeanFlow.residual",
        "its total derivative by a JVP (eq. 8)": "scaffold.tangent.TangentMethod.derivative",
        "loss with the adaptive weight (eq. 9 and section 4.3)": "MeanFlow.regression",
        "guidance inside (eq. 19-21)": "MeanFlow.direction",
        "times (section 4.3)": "MeanFlow.times, core.times.logit_normal",
        "two times as an input": "players.two_times.time_input",
        "sampling (Algorithm 2)": "MeanFlow.sampler, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(TangentOptions, mode="training", student_lr=1e-4):
    """The options of MeanFlow; times are flow times sigma/(alpha + sigma) in [0, 1]."""

    time_mean: float = option(-0.4, "mean of the logit of the two times")
    time_std: float = option(1.0, "standard deviation of the logit of the two times", above=0)
    r_mean: float | None = option(
        None,
        "mean of the logit of another distribution for r, which is then the smaller one; none: both draws are sorted",
    )
    equal_share: float = option(0.75, "share of samples with r = t, which is flow matching", at_least=0, at_most=1)
    weight_power: float = option(1.0, "p of the weight 1/(|u - target|^2 + c)^p; 0: no weight", at_least=0)
    weight_c: float = option(0.01, "c of that weight", above=0)
    guidance_mix: float = option(
        0.0, "mode training: kappa, the share of the student's own velocity", at_least=0, below=1
    )
    guidance_until: float = option(1.0, "mode training: the time above which nothing is guided", above=0, at_most=1)
    label_dropout: float = option(
        0.1, "mode training: share of conditions that a guided student is trained without", at_least=0, at_most=1
    )
    longest_jump: float = option(1.0, "DisCa: R, the longest interval, t - r being uniform up to it; 1: no such limit",
                                 above=0, at_most=1)  # fmt: skip


class MeanFlow(TangentMethod):
    """The student takes the time to jump to."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = config
        super().__init__(teacher, c, student or two_time_player(teacher, c.student_steps, c.student_level))
        self.guided = not self.from_teacher and (c.guidance_scale != 1 or c.guidance_mix > 0)
        if self.guided:
            require_null(self.student, "guidance")
        self.std = self.schedule.data_std
        levels = self.schedule.angle(torch.tensor(self.levels)).tolist()
        jumps = [self.flow_time(t) - self.flow_time(r) for t, r in zip(levels, [*levels[1:], 0.0], strict=True)]
        if max(jumps) > c.longest_jump + 1e-3:
            raise UserError(
                f"student_steps: {c.student_steps} make a jump of {max(jumps):.3g}, and jumps over more than "
                f"{c.longest_jump:g} (longest_jump) are not trained; give more steps"
            )

    def sampler(self) -> Sampler:
        """Deterministic jumps that divide the way from `student_level` down."""
        return Sampler(self.student, self.levels, DDIM())

    def flow_time(self, t: float) -> float:
        """sigma/(alpha + sigma) at an angle."""
        return math.sin(t) * self.std / (math.sin(t) * self.std + math.cos(t))

    def rho(self, t: Tensor) -> Tensor:
        """(B,) by how much an error of F is one of u, at the angles t (B,)."""
        return self.std * torch.sin(t) + torch.cos(t)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        means = {"t": c.time_mean, "r": c.time_mean if c.r_mean is None else c.r_mean}
        t, r = (
            logit_normal(self.schedule, batch.size, batch.generator(f"student/{name}"), mean, c.time_std)
            for name, mean in means.items()
        )
        t, r = torch.maximum(t, r) if c.r_mean is None else t, torch.minimum(t, r)
        if c.longest_jump < 1:
            time = self.std * torch.sin(t) / self.rho(t) - c.longest_jump * batch.uniform("student/jump")
            r = torch.atan2(time.clamp_min(0), (1 - time.clamp_min(0)) * self.std)
        return t, torch.where(batch.uniform("student/equal") < c.equal_share, t, r)

    def dropped(self, batch: Batch) -> Tensor:
        """(B,) whose condition is left out."""
        return batch.uniform("student/dropped") < self.config.label_dropout

    def conditions(self, batch: Batch) -> Cond:
        if not self.guided:
            return super().conditions(batch)
        assert self.student.null is not None
        return choose(self.dropped(batch), self.student.null(batch.cond), batch.cond)

    def direction(self, x_t: Tensor, v: Tensor, t: Tensor, batch: Batch, cond: Cond) -> Tensor:
        if not self.guided:
            return super().direction(x_t, v, t, batch, cond)
        assert self.student.null is not None
        null, twice = self.student.null(cond), Extra(r=torch.cat([t, t]))
        both = {name: torch.cat([cond[name], null[name]]) for name in cond}
        own, none = self.student(torch.cat([x_t, x_t]), torch.cat([t, t]), both, twice).v.chunk(2)
        kappa = self.config.guidance_mix
        omega = self.config.guidance_scale * (1 - kappa)
        plain = self.dropped(batch) | (self.std * torch.sin(t) / self.rho(t) > self.config.guidance_until)
        return torch.where(expand(plain, v) > 0, v, omega * v + (1 - omega - kappa) * none + kappa * own)

    def residual(self, f: Tensor, at: Point) -> Tensor:
        """(B, ...) what is zero for the exact average velocity, where the student says f; u - u_target over rho(t)."""
        apart, k = at.t - at.r, self.rho(at.t) / self.rho(at.r)
        along = expand(torch.cos(apart), f) * (f - at.v) + expand(torch.sin(apart), f) * at.x_t
        return expand(k, f) * along + self.derivative(at, k * torch.sin(apart), Extra(r=at.r))

    def regression(self, step: int, at: Point) -> Outcome:
        """|u - sg u_target|^2 of each sample, over (itself + c)^p without a gradient."""
        c, f = self.config, self.velocity(at, Extra(r=at.r))
        target = f.detach() - self.residual(f.detach(), at)
        error = (expand(self.rho(at.t), f) * (f - target)).square().flatten(1).sum(1)
        weight = (error.detach() + c.weight_c) ** -c.weight_power
        return Outcome((weight * error).mean(), {"error": error.mean()})


METHOD = MeanFlow
