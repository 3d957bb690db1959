"""Progressive distillation: Progressive Distillation for Fast Sampling of Diffusion Models.

Salimans & Ho, ICLR 2022, arXiv:2202.00512 (code: google-research/diffusion_distillation).

The student learns to land with one DDIM step where the teacher lands with two. Then it becomes the teacher of
the next stage, with half as many steps, until `final_steps` are left. Every stage has a new optimizer whose
learning rate falls linearly to zero, and starts from the weights of the stage before.

Deviations: the grid is the teacher's own timesteps with trailing spacing (`schedule.levels(start_steps)`, of which
every stage keeps every second), so that stock DDIM repeats the student; the authors use a continuous cosine
schedule, evenly spaced. x is not clipped. A guided teacher (`guidance_scale`) is guided in the first stage, which
its student then reproduces without guidance. The preset "cifar10" is the authors' configuration but for the
starting steps: 512 of a discrete schedule stand for their 8192. Their ImageNet and LSUN networks predict x and eps
together, which no diffusers scheduler knows, so there is no preset for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.prediction import ROWS, diffuse
from diffdistill.core.schedule import student_grid, student_levels
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen, trainable_copy
from diffdistill.scaffold.halving import Halving, two_step_target, weighted_x0_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Salimans & Ho 2022, arXiv:2202.00512"
DATA = "real images, which are noised to where the steps begin"
EQUATIONS = {
    "target of two DDIM steps (Algorithm 2)": "halving.two_step_target",
    "truncated SNR and SNR + 1 weights (section 4)": "halving.weighted_x0_loss",
    "halving, optimizer restarted, learning rate to zero (Algorithm 2; authors' code)": "halving.Halving",
    "DDIM sampler (section 2.1, eq. 8)": "ode.ddim_step, players.FewStepSampler",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 600,
        "batch_size": 64,
        "start_steps": 32,
        "final_steps": 1,
        "stage_steps": 120,
        "student_lr": 5e-4,
    },
    "shapes": {
        "steps": 500,
        "batch_size": 64,
        "start_steps": 32,
        "final_steps": 1,
        "stage_steps": 100,
        "guidance_scale": 2.0,
        "student_lr": 5e-4,
    },
    "shapes-4step": {
        "steps": 300,
        "batch_size": 64,
        "start_steps": 32,
        "final_steps": 4,
        "stage_steps": 100,
        "guidance_scale": 2.0,
        "student_lr": 5e-4,
    },
    "cifar10": {
        "batch_size": 128,
        "start_steps": 512,
        "final_steps": 1,
        "stage_steps": 50000,
        "steps": 450000,
        "student_lr": 5e-5,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
}
PASSES = {"digits": 3}
SCALES = ["stage_steps"]
END_TO_END = {
    "kind": "trajectory",
    "options": {
        "start_steps": 16,
        "final_steps": 1,
        "stage_steps": 500,
        "steps": 2000,
        "student_lr": 2e-3,
        "lr_schedule": "constant",
        "ema": 0.0,
    },
}


@dataclass(frozen=True)
class Config:
    """Progressive distillation's options."""

    start_steps: int = option(
        16, "the teacher's DDIM steps in the first stage; final_steps times a power of two", at_least=2
    )
    final_steps: int = option(1, "the last stage's student has so many steps", at_least=1)
    stage_steps: int = option(1000, "training steps of each halving", at_least=1)
    student_lr: float = option(
        5e-5, "AdamW's learning rate at the start of a stage; it falls linearly to zero", above=0
    )
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    weight: Literal["truncated_snr", "snr_plus_one"] = option(
        "truncated_snr", "of the error in x0: max(1, SNR), or SNR + 1, which is the error in v"
    )
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)


class Stage(nn.Module):
    """The present teacher and how many training steps are done: what a checkpoint needs besides the student."""

    done: Tensor

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.teacher = frozen(denoiser)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))


class Progressive:
    """One player; the teacher of the present stage is its former self."""

    needs_data = True
    needs_pairs = False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        if teacher.denoiser.row is ROWS["epsilon"]:
            raise UserError(
                "teacher: it predicts the noise, which says nothing of the image at the noisiest step of a few; "
                "progressive distillation needs one that predicts v, x0 or a flow velocity"
            )
        self.config = config
        self.halving = Halving(config.start_steps, config.final_steps, config.stage_steps)
        self.schedule = teacher.denoiser.schedule
        self.first = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.whole = self.halving.whole
        self.student = (student or teacher.player("student")).eval()  # no dropout, as in the authors' configuration
        self.stage = Stage(frozen(trainable_copy(self.student)))
        self.grid = student_grid(self.schedule, config.start_steps)
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {"stage": self.stage}

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        def loss(batch: Batch) -> dict[str, Tensor]:
            return self.loss(batch, step)

        return [Turn("student", loss, self.halving.lr_factor(step), self.halving.starts(step))]

    def after_step(self, step: int) -> None:
        self.stage.done.fill_(step + 1)
        if self.halving.starts(step + 1):
            self.stage.teacher.load_state_dict(self.student.state_dict())

    def sampler(self) -> FewStepSampler:
        """DDIM with the steps of the student as it stands; before training, with those it will have."""
        done = int(self.stage.done)
        steps = self.halving.student_steps(done - 1) if done else self.config.final_steps
        levels = student_levels(self.schedule, self.config.start_steps)[:: self.config.start_steps // steps]
        return FewStepSampler(self.student, levels.tolist(), renoise=False)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        assert batch.x0 is not None
        stride = self.config.start_steps // self.halving.student_steps(step)
        draw = batch.generator("i")
        i = stride * torch.randint(self.config.start_steps // stride, (batch.size,), generator=draw, device=draw.device)
        grid = self.grid.to(i.device)
        t, mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        teacher = self.first if self.halving.stage(step) == 0 else self.stage.teacher
        return self.matching(teacher, diffuse(batch.x0, t, batch.randn("eps")), t, mid, s, batch.cond)

    def matching(
        self, teacher: nn.Module, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """One student step from t to s against two teacher steps over mid, at x_t (B, ...); angles (B,)."""
        target = two_step_target(teacher, x_t, t, mid, s, cond)
        loss = weighted_x0_loss(self.student(x_t, t, cond).x0, target, t, self.config.weight)
        return {"loss": loss, "x0_error": loss}


METHOD = Progressive
