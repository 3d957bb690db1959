"""AGD, adapter guidance distillation: Efficient Distillation of Classifier-Free Guidance using Adapters.

Jensen & Sadat 2025, arXiv:2503.07274 (code: cristianpjensen/agd).

Classifier-free guidance takes two passes of the network a step. Here the network stays as it is, to the bit, and
small adapters on its layers, which know guidance scale, time and class, make one pass give what two gave, for
every scale in a range. They are trained at points of guided trajectories, where they will be used. The number of
sampling steps stays what it was; the adapters can be put on a student of few steps as well.

The trajectories are not stored. A batch is B chains of the guided sampler (`diffdistill/chains.py`), at staggered
steps: the guided output at their present points is the target, and it is also what moves them on. A training
step so costs one guided call and one pass of the student.

Deviations: the authors store trajectories of their 1000-step sampler and shuffle the points; here neighbouring
batches hold neighbouring points of the same chains, and the chains are DDIM's. What adapters add is multiplied
by (scale - 1), so that scale 1 is the base model to the bit. They share one embedding of scale, time and class,
whose features of the scale have periods of 2 pi and more; the authors' adapters have one each, with random
frequencies, on the base's own embeddings or on new ones. Their MLPs have ReLU and layer norm, these SiLU. The gate
of the authors' 'mlp_gate' begins at 1/2 with a random correction behind it; here its last layer begins at zero, as
that of the others. The loss compares the network's own outputs, which is eps for the authors' networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import Prediction
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.guidance_adapters import adapted, new_adapters
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Jensen & Sadat 2025, arXiv:2503.07274"
DATA = "none; conditions are drawn uniformly"
EQUATIONS = {
    "guided target and loss (section 3; authors' train.py)": "AdapterGuidance.matching, guidance.guide",
    "guided trajectories (section 3; authors' sample_trajectories.py)": "chains.GuidedChains",
    "adapters: additive, cross-attention, gated MLP (authors' models/)": "adapter_networks.KINDS",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "adapter": "attention",
        "adapted_layers": "blocks",
        "adapter_width": 20,
        "guidance_min": 1.75,
        "guidance_max": 2.25,
        "guidance_scale": 2.0,
        "trajectory_steps": 20,
        "student_lr": 1e-2,
        "warmup_steps": 20,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "imagenet256": {
        "steps": 5000,
        "batch_size": 64,
        "adapter": "additive",
        "adapter_width": 256,
        "guidance_min": 1.0,
        "guidance_max": 6.0,
        "trajectory_steps": 1000,
        "student_lr": 1e-4,
        "warmup_steps": 500,
        "lr_schedule": "cosine",
    },
    "stable-diffusion": {
        "steps": 5000,
        "batch_size": 64,
        "adapter": "attention",
        "adapter_width": 320,
        "guidance_min": 1.0,
        "guidance_max": 12.0,
        "trajectory_steps": 999,
        "student_lr": 1e-4,
        "warmup_steps": 500,
        "lr_schedule": "cosine",
    },
}
PASSES = {"digits": 3}


@dataclass(frozen=True)
class Config:
    """AGD's options."""

    adapter: Literal["additive", "attention", "mlp_gate"] = option(
        "additive", "additive: the same at all positions, blind to x; attention, mlp_gate: of the layer's input"
    )
    adapter_width: int = option(64, "hidden width of the adapters", at_least=2)
    adapted_layers: Literal["attention", "blocks"] = option(
        "attention", "attention: the attention layers; blocks: these and the residual blocks"
    )
    guidance_min: float = option(1.0, "guidance scales are drawn uniformly from here (1: none)", at_least=0)
    guidance_max: float = option(6.0, "... to here", at_least=0)
    guidance_scale: float = option(3.0, "the scale of samples and of the export, unless told otherwise", at_least=0)
    trajectory_steps: int = option(50, "DDIM steps of the guided trajectories that are trained on", at_least=1)
    sampling_steps: int = option(20, "DDIM steps of samples and of the export, one pass each", at_least=1)
    student_lr: float = option(1e-4, "AdamW's learning rate for the adapters", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    loss: Literal["l2", "l1"] = option("l2", "mean square or mean absolute error of the network's output")


class AdapterGuidance:
    """One player: the student is the teacher's own network with adapters, which alone are trained."""

    needs_data = False
    needs_pairs = False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        if config.guidance_min <= config.guidance_max and not (
            config.guidance_min <= config.guidance_scale <= config.guidance_max
        ):
            raise UserError(
                f"guidance_scale: {config.guidance_scale} is not in what is trained, {config.guidance_min} "
                f"(guidance_min) to {config.guidance_max} (guidance_max)"
            )
        self.config = config
        self.teacher = frozen(teacher.denoiser)
        self.schedule = teacher.denoiser.schedule
        self.chains = GuidedChains(teacher, config.trajectory_steps, config.guidance_min, config.guidance_max)
        if student is None:
            adapters = new_adapters(teacher, config.adapter, config.adapter_width, config.adapted_layers)
            student = adapted(self.teacher, adapters, config.guidance_scale)
        self.student = student
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {"chains": self.chains}

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.student_turn)]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return FewStepSampler(self.student, self.schedule.levels(self.config.sampling_steps).tolist(), renoise=False)

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        points = self.chains.points(batch, self.teacher)
        loss, target = self.matching(*points)
        self.chains.advance(batch, target)
        return {"loss": loss}

    def matching(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> tuple[Tensor, Prediction]:
        """The loss of one pass against the guided two at x_t (B, ...), with scales (B,); and the guided prediction."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale)
        got = self.student(x_t, t, {**cond, "guidance_scale": scale})
        error = F.mse_loss if self.config.loss == "l2" else F.l1_loss
        return error(got.y, target.y), target


METHOD = AdapterGuidance


def _network(method: AdapterGuidance) -> AdaptedNetwork:
    assert isinstance(method.student.network, AdaptedNetwork)
    return method.student.network
