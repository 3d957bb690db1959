"""Guided distillation: On Distillation of Guided Diffusion Models.

Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, CVPR 2023, arXiv:2210.03142 (no code was published).

Stage one: a student that takes the guidance scale as an input learns to give in one pass what classifier-free
guidance gives in two. Stage two: progressive distillation (Salimans & Ho 2022) of that student halves its DDIM
steps again and again, with the scale drawn for each sample and given to both networks.

Guidance scales here are diffusers' a, 1 being none: a = 1 + w with the paper's w.

Deviations: from the formulas as they are known from the abstract and later papers; the paper's appendix was not at
hand, so there is no preset of the paper, and the default range of w, [0, 4] as for ImageNet, is from memory. The
scale enters beside the class embedding with frequencies of at most 2 (`adapters.GuidanceEmbedding`), not as
Fourier features beside the time. The grid of stage two is the teacher's own timesteps with trailing spacing. The
learning rate falls linearly to zero in stage one too, if stage two follows. The sampler is the deterministic one,
not the paper's stochastic variant. With guidance_min = guidance_max the student takes no scale.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import ROWS, diffuse
from diffdistill.core.schedule import student_grid, student_levels
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.scale_input import guidance_input
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.halving import Halving, two_step_target, weighted_x0_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Meng et al. 2023, arXiv:2210.03142"
DATA = "real images, which are noised"
EQUATIONS = {
    "stage one: x_w = (1 + w) x_c - w x_u, loss max(1, SNR) |x - x_w|^2": "GuidedDistillation.one_pass, guidance.guide",
    "w drawn uniformly for each sample, as an input": "GuidedDistillation.given, adapters.guidance_input",
    "stage two: two DDIM steps of the last student in one": "GuidedDistillation.half_steps, halving.two_step_target",
    "halving, optimizer restarted, learning rate to zero": "halving.Halving, GuidedDistillation.turns",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 600,
        "batch_size": 64,
        "guidance_max": 4.0,
        "guidance_scale": 1.5,
        "guidance_steps": 200,
        "start_steps": 16,
        "final_steps": 1,
        "stage_steps": 100,
        "student_lr": 5e-4,
    },
}
PASSES = {"digits": 3}
SCALES = ["guidance_steps", "stage_steps"]
END_TO_END = {
    "kind": "trajectory",
    "options": {
        "guidance_max": 2.0,
        "guidance_scale": 1.5,
        "guidance_steps": 500,
        "start_steps": 16,
        "final_steps": 1,
        "stage_steps": 500,
        "steps": 2500,
        "student_lr": 2e-3,
        "lr_schedule": "constant",
        "ema": 0.0,
    },
}


@dataclass(frozen=True)
class Config:
    """Guided distillation's options."""

    guidance_min: float = option(1.0, "guidance scales are drawn uniformly from here; 1 is none (w = 0)", at_least=0)
    guidance_max: float = option(5.0, "... to here; equal to guidance_min, the student takes no scale", at_least=0)
    guidance_scale: float | None = option(
        None, "the scale of samples and of the export; default: the middle of the range", at_least=0
    )
    guidance_steps: int = option(1000, "training steps of stage one, before the halving", at_least=1)
    start_steps: int = option(
        16, "DDIM steps of stage one's student; final_steps times a power of two, or 1: no stage two", at_least=1
    )
    final_steps: int = option(1, "the last halving's student has so many steps", at_least=1)
    stage_steps: int = option(1000, "training steps of each halving", at_least=1)
    student_lr: float = option(
        5e-5, "AdamW's learning rate at the start of a stage; it falls linearly to zero", above=0
    )
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    weight: Literal["truncated_snr", "snr_plus_one"] = option(
        "truncated_snr", "of the error in x0: max(1, SNR), or SNR + 1, which is the error in v"
    )

    def __post_init__(self) -> None:
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", (self.guidance_min + self.guidance_max) / 2)


class GuidedDistillation:
    """One player. A checkpoint also holds the student of the stage before, and how many steps are done."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = self.config = config
        if teacher.denoiser.row is ROWS["epsilon"]:
            raise UserError(
                "teacher: it predicts the noise, which says nothing of the image at the noisiest step of a few; "
                "guided distillation needs one that predicts v, x0 or a flow velocity"
            )
        assert c.guidance_scale is not None
        scale = c.guidance_scale
        if not c.guidance_min <= scale <= c.guidance_max:
            raise UserError(
                f"guidance_scale: {scale} is not from guidance_min ({c.guidance_min}) to guidance_max "
                f"({c.guidance_max})"
            )
        self.teacher = frozen(teacher.denoiser)
        require_null(self.teacher, "guided distillation")
        self.schedule = teacher.denoiser.schedule
        halves = c.start_steps != c.final_steps
        self.halving = Halving(c.start_steps, c.final_steps, c.stage_steps) if halves else None
        if self.halving:
            self.whole = c.guidance_steps + self.halving.whole
        self.takes_scale = c.guidance_min < c.guidance_max
        if student is None:
            student = teacher.player("student")
            student = guidance_input(student, default=scale) if self.takes_scale else student
        self.student = student.eval()  # no dropout
        self.previous = frozen(copy.deepcopy(student)) if halves else student
        self.grid = student_grid(self.schedule, c.start_steps)
        self.progress = nn.Module()
        self.progress.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {"progress": self.progress}
        if halves:
            self.state["previous"] = self.previous

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        if self.halving is None:
            return [Turn("student", self.one_pass_turn)]
        halving_step = step - self.config.guidance_steps
        if halving_step < 0:
            return [Turn("student", self.one_pass_turn, 1 - step / self.config.guidance_steps)]
        turn = partial(self.half_steps_turn, self.halving.student_steps(halving_step))
        return [Turn("student", turn, self.halving.lr_factor(halving_step), self.starts(step))]

    def starts(self, step: int) -> bool:
        """Whether a halving begins at this step."""
        halving_step = step - self.config.guidance_steps
        return self.halving is not None and (halving_step == 0 or self.halving.starts(halving_step))

    def after_step(self, step: int) -> None:
        self.progress.done.fill_(step + 1)  # type: ignore[operator]
        if self.starts(step + 1):
            self.previous.load_state_dict(self.student.state_dict())

    def sampler(self) -> FewStepSampler:
        """DDIM with the steps of the student as it stands; before training, with those it will have.

        A student of stage one takes any number of steps, here those of the first halving.
        """
        steps, done = self.config.final_steps, int(self.progress.done)  # type: ignore[arg-type]
        if self.halving is not None and done:
            steps = self.halving.student_steps(max(done - 1 - self.config.guidance_steps, 0))
        levels = student_levels(self.schedule, self.config.start_steps)[:: self.config.start_steps // steps]
        return FewStepSampler(self.student, levels.tolist(), renoise=False)

    def scales(self, batch: Batch) -> Tensor:
        """(B,) guidance scales."""
        draw = batch.generator("student/scale")
        u = torch.rand(batch.size, generator=draw, device=draw.device, dtype=torch.float64)
        return self.config.guidance_min + (self.config.guidance_max - self.config.guidance_min) * u

    def given(self, cond: Cond, scale: Tensor) -> Cond:
        """What the student and its former self are told."""
        return cond | {"guidance_scale": scale} if self.takes_scale else cond

    def one_pass_turn(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"))
        return self.one_pass(diffuse(batch.x0, t, batch.randn("student/eps")), t, batch.cond, self.scales(batch))

    def one_pass(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> dict[str, Tensor]:
        """Stage one: the guided x0 at x_t (B, ...), with scales (B,), in one pass."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale).x0
        x0 = self.student(x_t, t, self.given(cond, scale)).x0
        loss = weighted_x0_loss(x0, target, t, self.config.weight)
        return {"loss": loss, "x0_error": loss}

    def half_steps_turn(self, steps: int, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        stride, draw = self.config.start_steps // steps, batch.generator("student/i")
        i = stride * torch.randint(steps, (batch.size,), generator=draw, device=draw.device)
        x_t = diffuse(batch.x0, self.grid.to(i.device)[i], batch.randn("student/eps"))
        return self.half_steps(x_t, i, stride, batch.cond, self.scales(batch))

    def half_steps(self, x_t: Tensor, i: Tensor, stride: int, cond: Cond, scale: Tensor) -> dict[str, Tensor]:
        """Stage two: one step over `stride` points of the grid from its points i (B,), for the last student's two."""
        grid, given = self.grid.to(i.device), self.given(cond, scale)
        t, mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        target = two_step_target(self.previous, x_t, t, mid, s, given)
        loss = weighted_x0_loss(self.student(x_t, t, given).x0, target, t, self.config.weight)
        return {"loss": loss, "x0_error": loss}


METHOD = GuidedDistillation
