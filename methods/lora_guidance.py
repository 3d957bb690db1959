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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.core.schedule import student_levels
from diffdistill.core.times import native_uniform
from diffdistill.options import GuidedSampling, TeacherGuidance, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn

ABOUT = About(
    paper="Golnari 2023, arXiv:2312.06899",
    data="real images, which are noised; nothing with trajectories",
    kind="guidance",
    equations={
        "guided target and loss (author's train_sd_distill_lora.py)": "LoRAGuidance.imitation, core.guidance.guide",
        "LoRA on the attention layers": "players.lora.lora_view",
        "points of guided trajectories (AGD, arXiv:2503.07274)": "scaffold.chains.GuidedChains",
    },
    defaults={"lora": "student", "lora_rank": 4, "lora_targets": "to_q,to_k,to_v,to_out.0"},
)


@dataclass(frozen=True)
class Config(GuidedSampling, TeacherGuidance, student_lr=1e-4, guidance_scale=7.5):
    """LoRA guidance distillation's options; the student has the guidance scale for good."""

    trajectories: bool = option(False, "train at points of guided trajectories, without data")


class LoRAGuidance(Method):
    """One player; the chains of `trajectories` lie in the checkpoint."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.teacher = frozen(teacher.denoiser)
        require_null(self.teacher, "guidance distillation")
        self.student = student or teacher.player("student")
        self.players = {"student": self.student}
        if config.trajectories:
            scale = config.guidance_scale
            self.chains = self.state["chains"] = GuidedChains(teacher, config.trajectory_steps, scale, scale)
        else:
            self.needs = frozenset({Need.IMAGES})

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.on_trajectories if self.config.trajectories else self.on_data)]

    def sampler(self) -> Sampler:
        levels = student_levels(self.schedule, self.config.sampling_steps)
        return Sampler(self.student, levels.tolist(), DDIM())

    def on_data(self, batch: Batch) -> Outcome:
        """The loss on noised images."""
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"))
        return Outcome(self.imitation(diffuse(batch.images, t, batch.randn("student/eps")), t, batch.cond)[0])

    def on_trajectories(self, batch: Batch) -> Outcome:
        """The loss where the chains stand, which then move on."""
        points = self.chains.points(batch, self.teacher)
        loss, target = self.imitation(points.x_t, points.t, points.cond)
        self.chains.advance(batch, target)
        return Outcome(loss)

    def imitation(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Prediction]:
        """The loss of one pass against the guided two at x_t (B, ...), t (B,); and the guided prediction."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, torch.full_like(t, self.config.guidance_scale))
        return F.mse_loss(self.student(x_t, t, cond).y, target.y), target


METHOD = LoRAGuidance
