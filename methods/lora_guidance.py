"""LoRA guidance distillation: LoRA-Enhanced Distillation on Guided Diffusion Models.

Golnari 2023, arXiv:2312.06899 (code: train_sd_distill_lora.py in microsoft/DeepSpeedExamples, by the author).

Classifier-free guidance at one fixed scale takes two passes of the network a step. LoRA weights on the network
learn what the two give, so that one pass does. This is the first stage of guided distillation (Meng et al. 2023)
with few trained parameters. The number of sampling steps stays what it was; the export has LoRA merged into the
weights.

Deviations: formulas and settings are those of the author's script; the paper's text was not at hand. There the
teacher is the LoRA network with LoRA off, in two calls without gradients; here it is the teacher itself in one
batched call. LoRA also goes on convolutions with `lora_layers: all`, for networks with little attention.
`trajectories` trains at points of guided trajectories instead of noised data, as AGD does (Jensen & Sadat 2025);
the script has no such thing. The loss compares the network's own outputs, which is eps for the author's networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.core.schedule import student_levels
from diffdistill.core.times import native_uniform
from diffdistill.options import option
from diffdistill.players.lora import lora
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Golnari 2023, arXiv:2312.06899"
DATA = "real images, which are noised; none with trajectories"
EQUATIONS = {
    "guided target and loss (author's train_sd_distill_lora.py)": "LoRAGuidance.matching, guidance.guide",
    "LoRA on the attention layers": "adapters.lora",
    "points of guided trajectories (AGD, arXiv:2503.07274)": "chains.GuidedChains",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 400,
        "batch_size": 64,
        "guidance_scale": 2.0,
        "lora_rank": 8,
        "lora_layers": "all",
        "student_lr": 1e-3,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "sd21": {
        "batch_size": 1,
        "guidance_scale": 7.5,
        "lora_rank": 4,
        "lora_layers": "attention",
        "student_lr": 5e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
}
PASSES = {"digits": 3}

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Config:
    """LoRA guidance distillation's options."""

    guidance_scale: float = option(7.5, "the scale that the student has for good (1: none)", at_least=0)
    lora_rank: int = option(4, "rank of the trained weights", at_least=1)
    lora_alpha: float | None = option(None, "they are multiplied by lora_alpha / lora_rank; default: by 1", above=0)
    lora_layers: Literal["attention", "all"] = option(
        "attention", "attention: projections of the attention layers; all: every linear layer and convolution"
    )
    trajectories: bool = option(False, "train at points of guided trajectories, without data")
    trajectory_steps: int = option(50, "DDIM steps of these", at_least=1)
    sampling_steps: int = option(20, "DDIM steps of samples and of the export, one pass each", at_least=1)
    student_lr: float = option(1e-4, "AdamW's learning rate", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)


class LoRAGuidance:
    """One player; the chains of `trajectories` lie in the checkpoint."""

    needs_pairs = False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        self.config = config
        self.teacher = frozen(teacher.denoiser)
        require_null(self.teacher, "guidance distillation")
        self.schedule = teacher.denoiser.schedule
        targets = _ATTENTION if config.lora_layers == "attention" else None
        self.student = student or lora(teacher.start or teacher.denoiser, config.lora_rank, config.lora_alpha, targets)
        self.needs_data = not config.trajectories
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {}
        if config.trajectories:
            scale = config.guidance_scale
            self.chains = self.state["chains"] = GuidedChains(teacher, config.trajectory_steps, scale, scale)

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.student_turn)]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(
            self.student, student_levels(self.schedule, self.config.sampling_steps).tolist(), renoise=False
        )

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        if self.config.trajectories:
            points = self.chains.points(batch, self.teacher)
            loss, target = self.matching(points.x_t, points.t, points.cond)
            self.chains.advance(batch, target)
            return {"loss": loss}
        assert batch.x0 is not None
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"))
        return {"loss": self.matching(diffuse(batch.x0, t, batch.randn("student/eps")), t, batch.cond)[0]}

    def matching(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Prediction]:
        """The loss of one pass against the guided two at x_t (B, ...), t (B,); and the guided prediction."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, torch.full_like(t, self.config.guidance_scale))
        return F.mse_loss(self.student(x_t, t, cond).y, target.y), target


METHOD = LoRAGuidance
