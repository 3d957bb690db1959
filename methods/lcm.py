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
at most 2, not beside the time with sinusoids of 1000 w. With `lora_rank` the scale is fixed, since that student
has no input for it; the script draws it all the same. The timesteps of c_skip and c_out are counted on the
scripts' grid of K steps up to 1000, for any schedule. Samplers take the network's x0 for f, whose c_skip is below
1e-5 on the grid. Dropout, which Stable Diffusion has none of, drops the same units in both passes of the student.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.schedule import lcm_indices, student_levels
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.lora import lora
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.scale_input import guidance_input
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Luo et al. 2023, arXiv:2310.04378"
DATA = "real images, to place x_t where the trajectories pass"
EQUATIONS = {
    "consistency distillation loss with guidance and skipping (section 4.3)": "LCM.consistency",
    "guided probability-flow ODE, one DDIM step (section 4.2)": "LCM.less_noisy, guidance.guide",
    "c_skip and c_out (section 4.1)": "LCM.scalings, LCM.f",
    "the scale drawn for each sample, and as an input (section 4.2)": "LCM.scales, adapters.guidance_input",
    "target's moving average (Algorithm 1)": "LCM.after_step",
    "elementwise Huber distance": "LCM.distance",
    "multistep sampling (Algorithm 3)": "LCM.sampler, players.FewStepSampler",
    "LCM-LoRA (arXiv:2311.05556)": "adapters.lora",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 500,
        "batch_size": 64,
        "ddim_steps": 20,
        "guidance_max": 2.0,
        "guidance_scale": 1.0,
        "student_lr": 5e-4,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "sd15": {
        "steps": 1000,
        "batch_size": 12,
        "guidance_min": 6.0,
        "guidance_max": 16.0,
        "guidance_scale": 8.5,
        "student_lr": 1e-6,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
    "sd15-lora": {
        "steps": 1000,
        "batch_size": 12,
        "lora_rank": 64,
        "guidance_min": 8.5,
        "guidance_max": 8.5,
        "student_lr": 1e-6,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
}
PASSES = {"digits": 4}
ANY_STEPS = True
END_TO_END = {
    "kind": "trajectory",
    "options": {"guidance_max": 2.0, "guidance_scale": 1.5, "steps": 3000, "student_lr": 1e-3},
}


@dataclass(frozen=True)
class Config:
    """LCM's options."""

    guidance_min: float = option(1.0, "guidance scales are drawn uniformly from here; 1 is none (w = 0)", at_least=0)
    guidance_max: float = option(1.0, "... to here; equal to guidance_min, the student takes no scale", at_least=0)
    guidance_scale: float | None = option(
        None, "the scale of the exported student; default: the middle of the range", at_least=0
    )
    ddim_steps: int = option(50, "K, the teacher's steps of which each training sample takes one", at_least=1)
    student_steps: int = option(1, "sampling steps, evenly spaced among the K; training is the same", at_least=1)
    lora_rank: int = option(0, "train LoRA of that rank alone, at one fixed scale; 0: the whole network", at_least=0)
    lora_alpha: float | None = option(None, "LoRA is multiplied by lora_alpha / lora_rank; default: by 1", above=0)
    distance: Literal["huber", "l2"] = option("huber", "elementwise sqrt(d^2 + c^2) - c, or d^2")
    huber_c: float = option(0.001, "c of that", above=0)
    timestep_scaling: float = option(10.0, "S: c_skip = 0.25/((S t)^2 + 0.25), t the timestep up to 1000", above=0)
    target_ema: float = option(0.95, "the target's moving average", at_least=0, below=1)
    student_lr: float = option(1e-4, "AdamW's learning rate", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)

    def __post_init__(self) -> None:
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", (self.guidance_min + self.guidance_max) / 2)


class LCM:
    """One player. Its moving average, the target, lies in the checkpoint; with LoRA it is its own target."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = self.config = config
        if not c.guidance_min <= c.guidance_max:
            raise UserError(f"guidance_min: {c.guidance_min} must be at most guidance_max ({c.guidance_max})")
        assert c.guidance_scale is not None
        scale = c.guidance_scale
        if not c.guidance_min <= scale <= c.guidance_max:
            raise UserError(
                f"guidance_scale: {scale} is not in what is trained, {c.guidance_min} (guidance_min) to "
                f"{c.guidance_max} (guidance_max)"
            )
        if c.student_steps > c.ddim_steps:
            raise UserError(f"student_steps: {c.student_steps} must be at most ddim_steps ({c.ddim_steps})")
        self.takes_scale = c.guidance_min < c.guidance_max
        if self.takes_scale and c.lora_rank:
            raise UserError("guidance_max: with lora_rank the scale is fixed; give guidance_min the same value")
        self.teacher = frozen(teacher.denoiser)
        self.guides = self.takes_scale or scale != 1
        if self.guides:
            require_null(self.teacher, "a guidance scale")
        self.schedule = teacher.denoiser.schedule
        self.levels, self.grid = self._grid()
        self.student = student or self._student(teacher, scale)
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {}
        self.target = self.student
        if not c.lora_rank:
            self.target = self.state["target"] = copy.deepcopy(self.student).requires_grad_(False)

    def _grid(self) -> tuple[list[float], Tensor]:
        """The K descending levels, and their angles with the least one that the network knows, (K + 1,)."""
        schedule = self.schedule
        levels = student_levels(schedule, self.config.ddim_steps)
        return levels.tolist(), torch.cat([schedule.angle(levels), torch.tensor([schedule.t_min]).double()])

    def _student(self, teacher: Teacher, scale: float) -> Denoiser:
        c = self.config
        if c.lora_rank:
            return lora(teacher.start or teacher.denoiser, c.lora_rank, c.lora_alpha)
        student = teacher.player("student")
        return guidance_input(student, default=scale) if self.takes_scale else student

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.student_turn)]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """target <- mu target + (1 - mu) student."""
        if self.state:
            averages: list[Tensor] = list(self.target.parameters())
            torch._foreach_lerp_(averages, list(self.student.parameters()), 1 - self.config.target_ema)

    def sampler(self) -> FewStepSampler:
        """Levels among the K, as evenly as whole indices are, as in diffusers' LCMScheduler."""
        taken = lcm_indices(self.config.ddim_steps, self.config.student_steps)
        return FewStepSampler(self.student, [self.levels[i] for i in taken])

    def scales(self, u: Tensor) -> Tensor:
        """(B,) guidance scales for u (B,) uniform in [0, 1)."""
        return self.config.guidance_min + (self.config.guidance_max - self.config.guidance_min) * u

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        draw = batch.generator("student/step")
        i = torch.randint(self.config.ddim_steps, (batch.size,), generator=draw, device=draw.device)
        draw = batch.generator("student/scale")
        scale = self.scales(torch.rand(batch.size, generator=draw, device=draw.device, dtype=torch.float64))
        x_t = diffuse(batch.x0, self.grid.to(i.device)[i], batch.randn("student/eps"))
        return self.consistency(x_t, i, scale, batch.cond, seed_for(*batch.key, "student/dropout"))

    def consistency(self, x_t: Tensor, i: Tensor, scale: Tensor, cond: Cond, seed: int = 0) -> dict[str, Tensor]:
        """The loss at x_t (B, ...) on the grid's points i (B,), for the scales (B,).

        Only f at the noisier point, x_t, gets a gradient; both passes of f drop the units of `seed`.
        """
        own = cond | {"guidance_scale": scale} if self.takes_scale else cond
        with seeded(seed, x_t.device):
            f = self.f(self.student, x_t, i, own)
        with torch.no_grad():
            x_r = self.less_noisy(x_t, i, scale, cond)
            with seeded(seed, x_t.device):
                target = self.f(self.target, x_r, i + 1, own)
        loss = self.distance(f.float() if f.dtype.itemsize < 4 else f, target.to(f))
        return {"loss": loss, "consistency": loss}

    def less_noisy(self, x_t: Tensor, i: Tensor, scale: Tensor, cond: Cond) -> Tensor:
        """x_r (B, ...), one DDIM step of the guided teacher down the grid; x0 and eps are guided alike."""
        grid = self.grid.to(i.device)
        pred = guide(self.teacher, x_t, grid[i], cond, scale) if self.guides else self.teacher(x_t, grid[i], cond)
        return pred.at(grid[i + 1])

    def scalings(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, (B,) float64 each, at the grid's points i; exactly 1 and 0 at the last one.

        t is the scripts' integer timestep there, 1000 (K - i)/K - 1 and 0.
        """
        steps = self.config.ddim_steps
        t = (1000 * (steps - i).double() / steps - 1).clamp_min(0)
        scaled = (self.config.timestep_scaling * t) ** 2
        return 0.25 / (scaled + 0.25), (scaled / (scaled + 0.25)).sqrt()

    def f(self, denoiser: Denoiser, x_t: Tensor, i: Tensor, cond: Cond) -> Tensor:
        """(B, ...) c_skip x_t + c_out x0, in the normal form; for a VP teacher that is the native x_t."""
        c_skip, c_out = self.scalings(i)
        x0 = denoiser(x_t, self.grid.to(i.device)[i], cond).x0
        f = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * x0
        return torch.where(expand(c_out, x_t) > 0, f, x_t)  # at t = 0 an x0 may be 0/0

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.distance == "l2":
            return F.mse_loss(x, y)
        c = self.config.huber_c
        return (torch.sqrt((x - y).square() + c**2) - c).mean()


METHOD = LCM
