"""LCM: Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference.

Luo, Tan, Huang, Li, Zhao, 2023, arXiv:2310.04378; LCM-LoRA: Luo et al. 2023, arXiv:2311.05556 (code: the
scripts train_lcm_distill_*.py of huggingface/diffusers, by the authors' recipe).

Consistency distillation of the *guided* teacher: f(x_t, a, c, t) is the same along a trajectory of the
probability-flow ODE guided by the scale a. x_r is one DDIM step of the guided teacher from x_t, over a 50th of
all times at once ("skipping"), and f(x_t) is pulled to what a slowly moving copy of f says at x_r. The scale is
drawn for each sample and is an input of the student, so that one student serves a range of scales in one pass.

Guidance scales here are diffusers' a, 1 being none: a = 1 + w with the paper's w. (The scripts apply
y_c + w (y_c - y_u) while their help text calls --w_min a scale; w in [5, 15] is a in [6, 16].)

Formulas were read in those scripts. Deviations: the scale enters beside the class embedding with frequencies of
at most 2, not beside the time with sinusoids of 1000 w. A LoRA student has that input beside its matrices; the script's
has none, and the script draws the scale all the same. The timesteps of c_skip and c_out are counted on the
scripts' grid of K steps up to 1000, for any schedule. Samplers take the network's x0 for f, whose c_skip is below
1e-5 on the grid. Dropout, which Stable Diffusion has none of, drops the same units in both passes of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.distances import elementwise
from diffdistill.core.ode import ddim_step, heun_step
from diffdistill.core.prediction import expand
from diffdistill.core.schedule import lcm_indices, student_levels
from diffdistill.errors import UserError
from diffdistill.options import ElementDistance, FollowingOptions, ScaleRange, option
from diffdistill.players.sampler import Sampler
from diffdistill.players.scale_input import DrawnGuidance, scale_player, scale_taken
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Luo et al. 2023, arXiv:2310.04378",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "consistency distillation loss with guidance and skipping (section 4.3)": "LCM.following",
        "guided probability-flow ODE, one step (section 4.2)": "LCM.less_noisy, players.scale_input.DrawnGuidance",
        "c_skip and c_out (section 4.1)": "LCM.scalings, LCM.f",
        "the scale drawn for each sample, and as an input (section 4.2)": (
            "options.ScaleRange.drawn, players.scale_input.guidance_input"
        ),
        "target's moving average (Algorithm 1)": "scaffold.following.FollowingMethod.after_step",
        "elementwise Huber distance": "LCM.distance",
        "multistep sampling (Algorithm 3)": "LCM.sampler, players.sampler.Renoise",
        "LCM-LoRA (arXiv:2311.05556)": "players.lora.lora_view",
    },
)


@dataclass(frozen=True)
class Config(FollowingOptions, ScaleRange, ElementDistance, student_lr=1e-4, weight_decay=0.01, guidance_max=1.0):
    """LCM's options; sampling steps are evenly spaced among the K."""

    ddim_steps: int = option(50, "K, the teacher's steps of which each training sample takes one", at_least=1)
    solver: Literal["ddim", "heun"] = option("ddim", "the teacher's step; heun: two passes, for few steps")
    timestep_scaling: float = option(10.0, "S: c_skip = 0.25/((S t)^2 + 0.25), t the timestep up to 1000", above=0)


class Skip(NamedTuple):
    """t, the point i of the grid that it is, and the guidance scale, all (B,)."""

    t: Tensor
    i: Tensor
    scale: Tensor


class LCM(FollowingMethod[Skip]):
    """A LoRA student is its own target."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = config
        if c.student_steps > c.ddim_steps:
            raise UserError(f"student_steps: {c.student_steps} must be at most ddim_steps ({c.ddim_steps})")
        lora = "student" in teacher.lora
        super().__init__(teacher, c, student or scale_player(teacher, c), slow_target=not lora)
        self.guidance = DrawnGuidance(self.teacher, c)
        levels = student_levels(self.schedule, c.ddim_steps, c.student_level, option="ddim_steps")
        self.levels = levels.tolist()
        for level in c.levels or ():
            if level not in self.levels:
                near = min(self.levels, key=lambda other: abs(other - level))
                raise UserError(
                    f"levels: {level:g} is none of the {c.ddim_steps} (ddim_steps) that are trained; {near:g} is near"
                )
        least = torch.tensor([self.schedule.t_min]).double()  # that the network knows
        self.grid = torch.cat([self.schedule.angle(levels), least])

    def sampler(self) -> Sampler:
        """Levels among the K, as evenly as whole indices are, as in diffusers' LCMScheduler."""
        if self.config.levels is not None:
            return super().sampler()
        indices = lcm_indices(self.config.ddim_steps, self.config.student_steps)
        return Sampler(self.student, [self.levels[i] for i in indices])

    def interval(self, step: int, batch: Batch) -> Skip:
        i = batch.integers(self.config.ddim_steps, "student/step")
        return Skip(self.grid.to(i.device)[i], i, self.config.drawn(batch.uniform("student/scale")))

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Skip, cond: Cond) -> Tensor:
        """One step of the guided teacher down the grid; x0 and eps are guided alike."""
        t, i, scale = interval
        r, guided = self.grid.to(i.device)[i + 1], partial(self.guidance, scale=scale)
        if self.config.solver == "ddim":
            return ddim_step(guided, x_t, t, r, cond)
        # A network cannot tell the noise at its least time; so the last step is Euler's, to 0, as EDM's is.
        return heun_step(guided, x_t, t, torch.where(i + 1 < self.config.ddim_steps, r, 0.0), cond)

    def following(self, x_t: Tensor, x_r: Tensor, interval: Skip, cond: Cond, seed: int = 0) -> Outcome:
        """Only f at the noisier point, x_t, gets a gradient."""
        i, extra = interval.i, scale_taken(self.config, interval.scale)
        f, target = self.both(
            seed,
            x_t,
            lambda: self.f(self.student, x_t, i, cond, extra),
            lambda: self.f(self.target, x_r, i + 1, cond, extra),
        )
        loss = self.distance(f.float() if f.dtype.itemsize < 4 else f, target.to(f))
        return Outcome(loss, {"consistency": loss})

    def scalings(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, (B,) float64 each, at the grid's points i; exactly 1 and 0 at the last one.

        t is the scripts' integer timestep there, 1000 (K - i)/K - 1 and 0.
        """
        steps = self.config.ddim_steps
        t = (1000 * (steps - i).double() / steps - 1).clamp_min(0)
        scaled = (self.config.timestep_scaling * t) ** 2
        return 0.25 / (scaled + 0.25), (scaled / (scaled + 0.25)).sqrt()

    def f(self, denoiser: Denoiser, x_t: Tensor, i: Tensor, cond: Cond, extra: Extra = NONE) -> Tensor:
        """(B, ...) c_skip x_t + c_out x0, in the normal form; for a VP teacher that is the native x_t."""
        c_skip, c_out = self.scalings(i)
        x0 = denoiser(x_t, self.grid.to(i.device)[i], cond, extra).x0
        f = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * x0
        return torch.where(expand(c_out, x_t) > 0, f, x_t)  # at t = 0 an x0 may be 0/0

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over all elements of the distance of x and y (B, ...)."""
        return elementwise(self.config.distance, x, y, self.config.huber_c)


METHOD = LCM
