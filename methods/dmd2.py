"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis.

Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman, NeurIPS 2024, arXiv:2405.14867 (code: tianweiy/DMD2).

The student x = G(z, c) follows the gradient of KL(q_t || p_t) between its own noised samples and the
teacher's, at all noise levels: the teacher's score minus that of a "fake score" network, which is trained on
the student's samples. The fake score takes `update_ratio` steps for each of the student's (two time-scale
update rule). A discriminator head on the fake score's bottleneck, which reads noised real and generated
images, adds a GAN loss. There is no regression on teacher pairs.

A student of several steps (`student_steps`) is trained on inputs that its own sampler makes (backward
simulation): a level is drawn, the sampler runs down to it without gradients, and that level's pass gives x.

Deviations: the normaliser is clamped at 1e-5 where the authors replace nan by 0. The discriminator reads the middle
block (on EDM networks theirs stops at the encoder's end), and real and generated images share its times, and the
classes of the real ones. Times are continuous fractions of EDM's grid, where theirs are its 1000 points. There is
no warm-up of 500 steps in the presets. "sdxl-4step" holds the authors' settings for SDXL, which nobody has run
here. With `normalise: false` the gradient is the exact one of the KL divergence, which `verify` compares with its
closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gan_discriminator_loss, gan_generator_loss, gradient_injection
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import student_levels
from diffdistill.core.times import check_range, native_uniform
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.discriminator import DiscriminatorHead
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import generator
from diffdistill.scaffold.matching import distribution_matching_gradient, fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Yin et al. 2024, arXiv:2405.14867"
DATA = "none for distribution matching; real images when gan_weight > 0"
EQUATIONS = {
    "distribution matching gradient (section 3; DMD, arXiv:2311.18828)": "matching.distribution_matching_gradient",
    "denoising loss of the fake score (section 3)": "matching.fake_score_loss",
    "two time-scale update rule (section 4.2)": "DMD2.turns",
    "GAN loss on noised images, head on the fake score (section 4.3)": "DMD2.logits, losses.gan_*",
    "multi-step student and backward simulation (sections 4.4, 4.5)": "DMD2.generate",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "update_ratio": 1,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "student_level": 750,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.99,
    },
    "digits-4step": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "update_ratio": 1,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "student_steps": 4,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.99,
    },
    "shapes": {
        "steps": 400,
        "batch_size": 32,
        "update_ratio": 1,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "guidance_scale": 2.0,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.97,
    },
    "shapes-4step": {
        "steps": 400,
        "batch_size": 32,
        "update_ratio": 1,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "guidance_scale": 2.0,
        "student_steps": 4,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.97,
    },
    "sdxl-4step": {
        "update_ratio": 5,
        "student_lr": 5e-7,
        "fake_score_lr": 5e-7,
        "fake_score_loss": "epsilon",
        "guidance_scale": 8.0,
        "gan_weight": 5e-3,
        "student_steps": 4,
    },
    "imagenet64": {
        "batch_size": 40,
        "update_ratio": 5,
        "student_lr": 2e-6,
        "fake_score_lr": 2e-6,
        "gan_weight": 3e-3,
    },
}

PASSES = {"digits": 4, "digits-4step": 5.5}
END_TO_END = {
    "kind": "distribution",
    "options": {"update_ratio": 1, "student_lr": 1e-3, "fake_score_lr": 2e-3, "beta1": 0.0, "steps": 3000},
}


@dataclass(frozen=True)
class Config:
    """DMD2's options."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score and its head", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for all players", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    update_ratio: int = option(5, "steps of the fake score for one of the student", at_least=1)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher (1: none); never of the fake score", at_least=0
    )
    student_steps: int = option(1, "the student's sampling steps, at the teacher's own evenly spaced times", at_least=1)
    student_level: float | None = option(
        None, "the timestep or sigma at which a one-step student reads pure noise; default: the noisiest", at_least=0
    )
    time_low: float = option(0.02, "distribution matching draws its times uniformly from here", at_least=0, below=1)
    time_high: float = option(0.98, "... to here, as fractions of the teacher's own time", above=0, at_most=1)
    normalise: bool = option(True, "divide the gradient by mean|x - D_teacher|; false: the exact KL gradient")
    fake_score_loss: Literal["v", "epsilon"] = option("v", "v: EDM's weight, as for ImageNet; epsilon: as for SD")
    gan_weight: float = option(0.0, "weight of the GAN loss in the student's; needs data", at_least=0)
    discriminator_weight: float = option(0.01, "weight of the GAN loss in the fake score's", at_least=0)


class DMD2:
    """Players: student; fake_score with the discriminator head, which share a loss and an optimizer."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
    ):
        check_range(config.time_low, config.time_high)
        if config.student_level is not None and config.student_steps > 1:
            raise UserError(
                f"student_level: {config.student_level} is for one step, and student_steps is {config.student_steps}"
            )
        self.config = config
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        # Without dropout, as the authors: in one of the two networks it would be noise in their difference.
        self.student = (student or teacher.player("student")).eval()
        self.fake_score = (fake_score or teacher.player("fake_score")).eval()
        self.schedule = teacher.denoiser.schedule
        self.needs_data, self.needs_pairs = config.gan_weight > 0, False
        critic = nn.ModuleDict({"denoiser": self.fake_score})
        if self.needs_data:
            self.head = _head(self.fake_score, teacher)
            critic["head"] = self.head
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": critic}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves first, every `update_ratio`-th step; the fake score moves in every step.

        Where both move, the samples that the student was judged by are those the fake score learns from.
        """
        drawn: list[Tensor] = []
        student = [Turn("student", partial(self.student_turn, drawn))] if step % self.config.update_ratio == 0 else []
        return [*student, Turn("fake_score", partial(self.fake_score_turn, drawn))]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        c = self.config
        if c.student_steps > 1:
            return FewStepSampler(self.student, student_levels(self.schedule, c.student_steps).tolist())
        return one_step_sampler(self.student, c.student_level)

    def generate(self, batch: Batch) -> Tensor:
        """x (B, ...) of the level drawn for this step, the same in all processes; gradients flow through its pass."""
        sampler = self.sampler()
        draw = generator("cpu", *batch.key[:2], "student/level")  # without the rank
        k = int(torch.randint(len(sampler.levels), (), generator=draw))
        with torch.no_grad():
            x_t, t = sampler.input_at(k, batch.randn("z"), batch.cond, lambda j: batch.randn(f"z {j}"))
        return self.student(x_t, t, batch.cond).x0

    # -- the student's turn ------------------------------------------------------------------------------

    def student_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        c = self.config
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"), c.time_low, c.time_high)
        x = self.generate(batch)
        drawn.append(x.detach())
        logs = self.matching(x, t, batch.randn("student/eps"), batch.cond)
        if self.needs_data:
            t = native_uniform(self.schedule, batch.size, batch.generator("student/gan t"))
            adversarial = gan_generator_loss(self.logits(x, t, batch.randn("student/gan eps"), batch.cond))
            logs["loss"] = logs["loss"] + c.gan_weight * adversarial
            logs["gan"] = adversarial
        return logs

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Distribution matching at angles t (B,) with noise eps (B, ...)."""
        x_t = diffuse(x, t, eps)
        grad, gap = distribution_matching_gradient(
            x, x_t, t, cond, self.teacher, self.fake_score, self.config.normalise
        )
        # The normalised gradient has no unit. The authors' is that of images, data_std x, and other terms' weights
        # are relative to it.
        unit = self.schedule.data_std if self.config.normalise else 1.0
        return {"loss": unit * gradient_injection(x, grad), "gap": gap.mean()}

    # -- the fake score's turn ---------------------------------------------------------------------------

    def fake_score_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            x = drawn[0] if drawn else self.generate(batch)
        t = native_uniform(self.schedule, batch.size, batch.generator("fake_score/t"))
        loss = self.denoising(x, t, batch.randn("fake_score/eps"), batch.cond)
        logs = {"loss": loss, "denoising": loss}
        if self.needs_data:
            assert batch.x0 is not None
            t = native_uniform(self.schedule, batch.size, batch.generator("fake_score/gan t"))
            real = self.logits(batch.x0, t, batch.randn("fake_score/gan eps real"), batch.cond)
            fake = self.logits(x, t, batch.randn("fake_score/gan eps fake"), batch.cond)
            logs["gan"] = gan_discriminator_loss(real, fake)
            logs["loss"] = loss + self.config.discriminator_weight * logs["gan"]
        return logs

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.fake_score, x, t, eps, cond, self.config.fake_score_loss)

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) the discriminator's logits of x noised to t."""
        return self.head(self.fake_score.features(diffuse(x, t, eps), t, cond))


def _head(fake_score: Denoiser, teacher: Teacher) -> DiscriminatorHead:
    if fake_score.feature_layer is None:
        raise UserError("gan_weight: this teacher's network has no bottleneck for a discriminator; use 0")
    parameter = next(fake_score.parameters())
    cond = teacher.random_cond(1, torch.Generator(parameter.device).manual_seed(0))
    with torch.no_grad():
        t = torch.ones(1, dtype=torch.float64, device=parameter.device)
        features = fake_score.features(torch.zeros(1, *teacher.shape).to(parameter), t, cond)
    return DiscriminatorHead(features.shape[1], features.shape[2]).to(parameter)


METHOD = DMD2
