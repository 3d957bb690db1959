"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation.

Nguyen, Tran, CVPR 2024, arXiv:2312.05239 (code: VinAIResearch/SwiftBrush).

Variational score distillation (Wang et al. 2023, arXiv:2305.16213) of a network instead of a 3D scene: the
student x = G(z, c) moves along the difference of two guided noise predictions of its noised samples, the
teacher's and that of a "LoRA teacher", which is the teacher with low-rank weights that learn the student's
distribution. Both are guided, so the LoRA teacher also learns without its condition. No images are needed.

Formulas and settings were read in the authors' code. Deviations: LoRA on all linear layers and convolutions,
where the authors adapt the queries and values of a text-to-image network's attention (`lora_targets` "to_q,to_v"
is theirs); the condition is dropped sample by sample, not for a whole batch. The teacher is a network of its
own, not the LoRA teacher with its adapters switched off. For schedules other than variance-preserving ones,
sigma_t and alpha_t are those of the normal form, sin t and cos t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, choose
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gradient_injection, per_sample_mean
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import check_range, native_uniform
from diffdistill.options import option
from diffdistill.players.lora import lora
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Nguyen & Tran 2024, arXiv:2312.05239"
DATA = "none"
EQUATIONS = {
    "variational score distillation loss of the student (section 3)": "SwiftBrush.matching",
    "denoising loss of the LoRA teacher (section 3)": "SwiftBrush.denoising",
    "guidance of both networks; conditions dropped for it": "guidance.guided, SwiftBrush.dropped",
    "one update each in turn (Algorithm 1)": "SwiftBrush.turns",
    "low-rank weights on the teacher": "adapters.lora",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "student_lr": 3e-4,
        "student_level": 750,
        "lora_lr": 3e-3,
        "lora_rank": 16,
        "lora_alpha": 16,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.99,
    },
    "sd21": {
        "batch_size": 16,
        "guidance_scale": 4.5,
        "student_lr": 1e-6,
        "lora_lr": 1e-3,
        "lora_rank": 64,
        "lora_alpha": 108,
        "lora_targets": "to_q,to_v",
        "max_grad_norm": 1.0,
    },
}
PASSES = {"digits": 4}
END_TO_END = {
    "kind": "distribution",
    "options": {"student_lr": 5e-4, "lora_lr": 2e-3, "lora_rank": 32, "lora_alpha": 32, "beta1": 0.0, "steps": 2000},
}


@dataclass(frozen=True)
class Config:
    """SwiftBrush's options."""

    student_lr: float = option(1e-6, "AdamW's learning rate for the student", above=0)
    lora_lr: float = option(1e-3, "AdamW's learning rate for the LoRA teacher", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for both", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    guidance_scale: float = option(1.0, "classifier-free guidance of both teachers (1: none)", at_least=0)
    lora_rank: int = option(64, "rank of the LoRA teacher's own weights", at_least=1)
    lora_alpha: float = option(108.0, "they are multiplied by lora_alpha / lora_rank", above=0)
    lora_targets: str | None = option(None, "layers with LoRA, by the end of their name, 'to_q,to_v' say; default: all")
    label_drop: float = option(
        0.1, "share of conditions dropped in the LoRA teacher's training, if the teacher knows 'no class'",
        at_least=0, at_most=1,
    )  # fmt: skip
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; default: the noisiest", at_least=0
    )
    time_low: float = option(0.02, "the student's loss draws its times uniformly from here", at_least=0, below=1)
    time_high: float = option(0.98, "... to here, as fractions of the teacher's own time", above=0, at_most=1)


class SwiftBrush:
    """Players: student; lora_teacher, of which only the low-rank weights are trained."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        *,
        student: Denoiser | None = None,
        lora_teacher: Denoiser | None = None,
    ):
        check_range(config.time_low, config.time_high)
        self.config = config
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        # Without dropout: in one of the two teachers it would be noise in their difference.
        self.student = (student or teacher.player("student")).eval()
        targets = None if config.lora_targets is None else [name.strip() for name in config.lora_targets.split(",")]
        start = teacher.start or teacher.denoiser
        self.lora_teacher = (lora_teacher or lora(start, config.lora_rank, config.lora_alpha, targets)).eval()
        self.guided_lora_teacher = guided(self.lora_teacher, config.guidance_scale)
        self.schedule = teacher.denoiser.schedule
        self.players: dict[str, nn.Module] = {"student": self.student, "lora_teacher": self.lora_teacher}
        self.state: dict[str, nn.Module] = {}
        self.needs_data = self.needs_pairs = False

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.lora_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One each; the LoRA teacher learns from the samples that the student was judged by."""
        drawn: list[Tensor] = []
        return [
            Turn("student", partial(self.student_turn, drawn)),
            Turn("lora_teacher", partial(self.lora_turn, drawn)),
        ]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return one_step_sampler(self.student, self.config.student_level)

    def student_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        c = self.config
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"), c.time_low, c.time_high)
        x = self.sampler().one_step(batch.randn("z"), batch.cond)
        drawn.append(x.detach())
        return self.matching(x, t, batch.randn("student/eps"), batch.cond)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """x (B, ...) is pushed along sigma_t^2 (eps_lora - eps_teacher), both guided, at angles t (B,).

        Since sigma_t (eps_lora - eps_teacher) is alpha_t (D_teacher - D_lora), that is the gradient of the
        KL divergence at t times sigma_t^3 / alpha_t, if nothing is guided.
        """
        with torch.no_grad():
            x_t = diffuse(x, t, eps)
            gap = self.teacher(x_t, t, cond).eps - self.guided_lora_teacher(x_t, t, cond).eps
            grad = expand(torch.sin(t) ** 2, gap) * gap
        return {"loss": gradient_injection(x, grad), "gap": gap.square().mean()}

    def lora_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        t = native_uniform(self.schedule, batch.size, batch.generator("lora/t"))
        cond = self.dropped(batch.cond, torch.rand(batch.size, generator=batch.generator("lora/drop"), device=t.device))
        loss = self.denoising(drawn[0], t, batch.randn("lora/eps"), cond)
        return {"loss": loss, "denoising": loss}

    def dropped(self, cond: Cond, u: Tensor) -> Cond:
        """The conditions, or the null ones where u (B,), uniform in [0, 1), is below `label_drop`."""
        if self.lora_teacher.null is None:
            return cond
        return choose(u < self.config.label_drop, self.lora_teacher.null(cond), cond)

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """The mean of |alpha_t (eps_lora - eps)|^2 on the student's samples x (B, ...), which get no gradient."""
        x = x.detach()
        error = per_sample_mean((self.lora_teacher(diffuse(x, t, eps), t, cond).eps - eps).square())
        return (expand(torch.cos(t) ** 2, error) * error).mean()


METHOD = SwiftBrush
