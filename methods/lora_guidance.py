"""LoRA guidance distillation: LoRA-Enhanced Distillation on Guided Diffusion Models.

Golnari 2023, arXiv:2312.06899 (code: train_sd_distill_lora.py in microsoft/DeepSpeedExamples, by the author).

Classifier-free guidance at one fixed scale takes two passes of the network a step. LoRA weights on the network
learn what the two give, so that one pass does. This is the first stage of guided distillation (Meng et al. 2023)
with few trained parameters. The number of sampling steps stays what it was; the export has LoRA merged into the
weights.

Deviations: formulas and settings are those of the author's script; the paper's text was not at hand. There the
teacher is the LoRA network with LoRA off, in two calls without gradients; here it is the teacher itself in one
batched call. LoRA also goes on convolutions with `lora_targets: all`, for networks with little attention.
`trajectories` trains at points of guided trajectories instead of noised data, as AGD does (Jensen & Sadat 2025);
the script has no such thing. The loss compares the network's own outputs, which is eps for the author's networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import require_null
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import student_levels
from diffdistill.options import GuidedSampling, TeacherGuidance, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.imitating import ImitatingMethod

ABOUT = About(
    paper="Golnari 2023, arXiv:2312.06899",
    data="real images, which are noised; nothing with trajectories",
    kind="guidance",
    equations={
        "guided target and loss (author's train_sd_distill_lora.py)": "LoRAGuidance.error, core.guidance.guide",
        "LoRA on the attention layers": "players.lora.lora_view",
        "points of guided trajectories (AGD, arXiv:2503.07274)": "scaffold.chains.GuidedChains",
    },
    defaults={"lora": "student", "lora_rank": 4, "lora_targets": "to_q,to_k,to_v,to_out.0"},
)


@dataclass(frozen=True)
class Config(GuidedSampling, TeacherGuidance, student_lr=1e-4, guidance_scale=7.5):
    """LoRA guidance distillation's options; the student has the guidance scale for good."""

    trajectories: bool = option(False, "train at points of guided trajectories, without data")


class LoRAGuidance(ImitatingMethod):
    """The student imitates one scale, which is no input."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        require_null(teacher.denoiser, "guidance distillation")
        scales = (config.guidance_scale, config.guidance_scale) if config.trajectories else None
        super().__init__(teacher, config, student or teacher.player("student"), scales)

    def sampler(self) -> Sampler:
        levels = student_levels(self.schedule, self.config.sampling_steps, option="sampling_steps")
        return Sampler(self.student, levels.tolist(), DDIM())

    def error(self, target: Prediction, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Tensor:
        return F.mse_loss(self.student(x_t, t, cond).y, target.y)


METHOD = LoRAGuidance
