"""SiD: Score identity Distillation, Exponentially Fast Distillation of Pretrained Diffusion Models.

Zhou, Zheng, Wang, Yin, Huang, ICML 2024, arXiv:2404.04057 (code: mingyuanzhou/SiD); guidance from Zhou, Wang,
Zheng, Huang, ICLR 2025, arXiv:2406.01561 (code: mingyuanzhou/SiD-LSG).

The student x = G(z, c) minimises the Fisher divergence F = E|D_phi - D_psi|^2 between its noised samples and the
teacher's, where D_psi, the fake score, is trained on the student's samples. F itself would need the change of
D_psi with the student; score identities give a loss that does not: with Delta = D_phi - D_psi,
<Delta, (D_phi - x) - alpha Delta>. Its gradient flows through x and through the inputs of both networks, whose
parameters stay fixed: without those paths it is Diff-Instruct's, whatever alpha. The value of the loss says
nothing (its expectation is (1 - alpha) F); `gap` is F.

With guidance (SiD-LSG) the teacher is evaluated at scale kappa_4 (`guidance_scale`), the fake score at
kappa_2 = kappa_3 (`fake_score_guidance`), and the fake score is trained at kappa_1
(`fake_score_training_guidance`), each with one batched call; it then learns without a class too.

Deviations: losses are means over elements, where the authors' are sums times 100, which Adam does not see.
Samples with nan are not dropped and gradients not cleaned: the trainer refuses what is not finite. Both turns
of a step have the same conditions, where the authors draw new ones. No augmentation of what the fake score sees.
The student's input is what the stock scheduler draws: of standard deviation sqrt(sigma^2 + 1) for an
EDMEulerScheduler and 1 for a VP teacher, where the authors' have sigma and SiD-LSG's sigma_t. For a teacher that is
not EDM's the noise levels are those of EDM at the same angle; SiD-LSG's are `times: native`. SiD-LSG weights a fake
score that predicts v by SNR/(SNR + 1); that is `fake_score_loss: epsilon` here. The weights of the loss are the
code's; the paper's text was not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import l1_normaliser, per_sample_mean
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import check_range, edm_karras, edm_log_normal, native_uniform
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Zhou et al. 2024, arXiv:2404.04057; guidance: arXiv:2406.01561"
DATA = "none"
EQUATIONS = {
    "the student's loss (the code's generator_loss)": "sid_loss, SiD.matching",
    "denoising loss of the fake score": "matching.fake_score_loss, SiD.denoising",
    "noise levels of both losses": "times.edm_karras, times.edm_log_normal, SiD.times",
    "long and short guidance (arXiv:2406.01561)": "guidance.guided, SiD.drop_labels",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "student_level": 872,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "cifar10": {
        "batch_size": 256,
        "steps": 1953125,
        "student_level": 2.5,
        "ema": 0.99965,
        "max_grad_norm": 0,
    },
    "imagenet64": {
        "batch_size": 8192,
        "steps": 122070,
        "student_lr": 4e-6,
        "fake_score_lr": 4e-6,
        "student_level": 2.5,
        "ema": 0.99716,
        "max_grad_norm": 0,
    },
    "lsg": {
        "batch_size": 512,
        "student_lr": 1e-6,
        "fake_score_lr": 1e-6,
        "alpha": 1.0,
        "student_level": 625,
        "times": "native",
        "time_low": 0.02,
        "time_high": 0.98,
        "fake_score_loss": "epsilon",
        "guidance_scale": 2.0,
        "fake_score_guidance": 2.0,
        "fake_score_training_guidance": 2.0,
        "ema": 0.99293,
        "max_grad_norm": 0,
    },
}
PASSES = {"digits": 5}
END_TO_END = {
    "kind": "distribution",
    "options": {
        "alpha": 1.0,
        "time_low": 0.2,
        "student_lr": 1e-3,
        "fake_score_lr": 2e-3,
        "student_level": 1.373,
        "steps": 2000,
    },
}


@dataclass(frozen=True)
class Config:
    """SiD's options."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    beta1: float = option(0.0, "AdamW's first beta, for both players", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay; 0 is Adam", at_least=0)
    alpha: float = option(1.2, "weight of |Delta|^2 in the student's loss; the authors' 1.0 to 1.2")
    normalise: bool = option(True, "divide the loss by mean|x - D_teacher|; false: the exact identity")
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; default: the noisiest", at_least=0
    )
    times: Literal["karras", "native"] = option(
        "karras", "levels of the losses: EDM's grid and log-normal; native: uniform in the teacher's own time"
    )
    time_low: float = option(
        0.0, "the student's loss (native times: both losses) draws its levels from this fraction, 0 is no noise",
        at_least=0,
    )  # fmt: skip
    time_high: float = option(0.8, "... to this one; 0.8 of EDM's grid is sigma = 24.4", above=0, at_most=1)
    fake_score_loss: Literal["v", "epsilon"] = option("v", "v: EDM's weight; epsilon: as for Stable Diffusion")
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher, kappa_4 (1: none)", at_least=0)
    fake_score_guidance: float = option(
        1.0, "guidance of the fake score in the student's loss, kappa_2 = kappa_3", at_least=0
    )
    fake_score_training_guidance: float = option(1.0, "guidance of the fake score in its own loss, kappa_1", at_least=0)
    label_dropout: float = option(
        0.1, "share of the fake score's samples without a class, if it is ever guided", at_least=0, below=1
    )


class SiD:
    """Players: student and fake_score, one turn each; the fake score moves first."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
    ):
        check_range(config.time_low, config.time_high)
        self.config = config
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.student = student or teacher.player("student")
        self.fake_score = fake_score or teacher.player("fake_score")
        self.evaluated = guided(self.fake_score, config.fake_score_guidance)
        self.trained = guided(self.fake_score, config.fake_score_training_guidance)
        self.schedule = teacher.denoiser.schedule
        self.needs_data, self.needs_pairs = False, False
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": self.fake_score}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("fake_score", self.fake_score_turn), Turn("student", self.student_turn)]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return one_step_sampler(self.student, self.config.student_level)

    def only_has_dropout(self, player: str) -> None:
        """Dropout in one of the two networks would be noise in their difference."""
        for name, module in self.players.items():
            module.train(name == player)

    # -- the fake score's turn ---------------------------------------------------------------------------

    def fake_score_turn(self, batch: Batch) -> dict[str, Tensor]:
        self.only_has_dropout("fake_score")
        with torch.no_grad():
            x = self.sampler().one_step(batch.randn("fake_score/z"), batch.cond)
        cond = self.drop_labels(batch.cond, batch.size, batch.generator("fake_score/labels"))
        t = self.times("fake_score", batch)
        return {"loss": self.denoising(x, t, batch.randn("fake_score/eps"), cond)}

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.trained, x, t, eps, cond, self.config.fake_score_loss)

    def drop_labels(self, cond: Cond, n: int, generator: torch.Generator) -> Cond:
        """The conditions, some replaced by the null condition where the fake score is guided."""
        c = self.config
        if c.fake_score_guidance == 1 and c.fake_score_training_guidance == 1:
            return cond
        assert self.fake_score.null is not None
        null = self.fake_score.null(cond)
        drop = torch.rand(n, generator=generator, device=generator.device) < c.label_dropout
        return {k: torch.where(drop.reshape(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in cond.items()}

    # -- the student's turn ------------------------------------------------------------------------------

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        self.only_has_dropout("student")
        x = self.sampler().one_step(batch.randn("student/z"), batch.cond)
        return self.matching(x, self.times("student", batch), batch.randn("student/eps"), batch.cond)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The student's loss at angles t (B,) with noise eps (B, ...), with both networks in the graph."""
        x_t = diffuse(x, t, eps)
        x0_teacher, x0_fake = self.teacher(x_t, t, cond).x0, self.evaluated(x_t, t, cond).x0
        loss = sid_loss(x, x0_teacher, x0_fake, self.config.alpha, self.config.normalise)
        return {"loss": loss, "gap": (x0_teacher - x0_fake).detach().square().mean()}

    def times(self, player: str, batch: Batch) -> Tensor:
        """(B,) the angles of a player's loss."""
        c, draw = self.config, batch.generator(f"{player}/t")
        if c.times == "native":
            return native_uniform(self.schedule, batch.size, draw, c.time_low, c.time_high)
        if player == "student":
            return edm_karras(self.schedule, batch.size, draw, c.time_low, c.time_high)
        return edm_log_normal(self.schedule, batch.size, draw, -1.2, 1.2)


def sid_loss(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, alpha: float, normalise: bool) -> Tensor:
    """<Delta, (D_phi - x) - alpha Delta>/n, Delta = D_phi - D_psi, as a mean; all (B, ...), none detached.

    n = mean|x - D_phi| of each sample, detached; 1 without the normaliser.
    """
    delta = x0_teacher - x0_fake
    products = per_sample_mean(delta * ((x0_teacher - x) - alpha * delta))
    return (products / l1_normaliser(x, x0_teacher)).mean() if normalise else products.mean()


METHOD = SiD
