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

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.prediction import expand
from diffdistill.core.times import logit_normal
from diffdistill.errors import UserError
from diffdistill.options import TangentOptions, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.average import AverageMethod
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point

ABOUT = About(
    paper="Geng et al. 2025, arXiv:2505.13447",
    data="real images, to place x_t, and in mode training for the direction",
    kind="trajectory",
    needs=("images",),
    equations={
        "MeanFlow identity (eq. 6)": "scaffold.average.AverageMethod.residual",
        "its total derivative by a JVP (eq. 8)": "scaffold.tangent.TangentMethod.derivative",
        "loss with the adaptive weight (eq. 9 and section 4.3)": (
            "MeanFlow.regression, scaffold.average.AverageMethod.loss_of"
        ),
        "guidance inside (eq. 19-21)": "scaffold.average.AverageMethod.direction, MeanFlow.unguided",
        "times (section 4.3)": "MeanFlow.times, core.times.logit_normal",
        "two times as an input": "players.two_times.time_input",
        "sampling (Algorithm 2)": "scaffold.average.AverageMethod.sampler, players.sampler.DDIM",
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


class MeanFlow(AverageMethod):
    """Training with guidance inside, distillation, and both restricted to short jumps."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student, config.guidance_mix)
        self.check_jumps()

    def check_jumps(self) -> None:
        """UserError where the sampler's are longer than those that are trained."""
        longest, levels = self.config.longest_jump, self.schedule.angle(torch.tensor(self.levels))
        jump = -float(torch.diff(self.flow_time(levels), append=torch.zeros(1).double()).min())
        if jump > longest + 1e-3:
            raise UserError(
                f"student_steps: {len(levels)} make a jump of {jump:.3g}, and jumps over more than "
                f"{longest:g} (longest_jump) are not trained; give more steps"
            )

    def in_steps(self, steps: int) -> None:
        super().in_steps(steps)
        self.check_jumps()

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        means = {"t": c.time_mean, "r": c.time_mean if c.r_mean is None else c.r_mean}
        t, r = (batch.draw(f"student/{name}", partial(self.logit_normal, mean)) for name, mean in means.items())
        t, r = torch.maximum(t, r) if c.r_mean is None else t, torch.minimum(t, r)
        if c.longest_jump < 1:
            time = self.flow_time(t) - c.longest_jump * batch.uniform("student/jump")
            r = torch.atan2(time.clamp_min(0), (1 - time.clamp_min(0)) * self.std)
        return self.some_equal(t, r, batch)

    def logit_normal(self, mean: float, n: int, draw: torch.Generator) -> Tensor:
        return logit_normal(self.schedule, n, draw, mean, self.config.time_std)

    def unguided(self, t: Tensor, batch: Batch) -> Tensor:
        return super().unguided(t, batch) | (self.flow_time(t) > self.config.guidance_until)

    def regression(self, step: int, at: Point) -> Outcome:
        """|u - sg u_target|^2 of each sample, over (itself + c)^p without a gradient."""
        f = self.velocity(at, Extra(r=at.r))
        target = f.detach() - self.residual(f.detach(), at)
        return self.loss_of(expand(self.rho(at.t), f) * (f - target))


METHOD = MeanFlow
