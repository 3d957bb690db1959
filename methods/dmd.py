"""DMD: One-step Diffusion with Distribution Matching Distillation.

Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, CVPR 2024, arXiv:2311.18828. There is no code of the
authors'; that of DMD2 (tianweiy/DMD2) continues it. Formulas and settings are those of the paper's text.

The student x = G(z, c) follows the gradient of KL(q_t || p_t) between its own noised samples and the teacher's,
at all noise levels: the teacher's score minus that of a "fake score" network, which takes one step on the
student's samples for each of the student's own. That divergence is content with one mode of several, and
training with it alone drifts. So a regression loss holds the student to the teacher's deterministic sampler on
noise-image pairs that were made beforehand (`diffdistill pairs`), which keeps all modes.

Deviations: the normaliser is clamped at 1e-5. The gradient is Algorithm 2's, which leaves out the factor alpha_t of
eq. 7 and 8 (for EDM it is 1). With `normalise: false` the gradient is the exact one of the KL
divergence, which `verify` compares with its closed form. The student keeps its time input, at a fixed level.
LPIPS is the `lpips` package's, the paper has PIQ's; the default, l2, needs neither. The regression has as many
samples a step as the matching, and they are not matched too (the paper does both differently for LAION alone).
Mixed precision, which the paper has for ImageNet, is left to `mixed_precision`. The presets' batch sizes are those
of one of the paper's seven processes; "digits" is ours, and its pairs are given with --pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gradient_injection
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import check_range, native_uniform
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import distribution_matching_gradient, fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Yin et al. 2023, arXiv:2311.18828"
DATA = "none; noise-image pairs of the teacher when regression_weight > 0"
EQUATIONS = {
    "one-step generator (section 3.1)": "players.FewStepSampler.one_step",
    "distribution matching gradient (eq. 7, its weight eq. 8; Algorithm 2)": "matching.distribution_matching_gradient",
    "denoising loss of the fake score (eq. 6; Algorithm 3)": "matching.fake_score_loss",
    "regression loss on noise-image pairs (eq. 9)": "DMD.regression, pairs.make_pairs",
    "guidance of the real score alone (section 3.4)": "guidance.guided",
    "training procedure (Algorithm 1)": "DMD.turns, DMD.student_turn",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "steps": 400,
        "batch_size": 64,
        "regression_weight": 1.0,
        "student_lr": 3e-4,
        "fake_score_lr": 1e-3,
        "student_level": 750,
        "lr_schedule": "cosine",
        "beta1": 0.0,
        "ema": 0.99,
    },
    "cifar10": {
        "steps": 300000,
        "batch_size": 56,
        "distance": "lpips",
        "student_lr": 5e-5,
        "fake_score_lr": 5e-5,
        "warmup_steps": 500,
    },
    "cifar10-unconditional": {
        "steps": 300000,
        "batch_size": 56,
        "distance": "lpips",
        "regression_weight": 0.5,
        "student_lr": 5e-5,
        "fake_score_lr": 5e-5,
        "warmup_steps": 500,
    },
    "imagenet64": {
        "steps": 350000,
        "batch_size": 48,
        "distance": "lpips",
        "student_lr": 2e-6,
        "fake_score_lr": 2e-6,
        "warmup_steps": 500,
    },
}
PASSES = {"digits": 5}
END_TO_END = {
    "kind": "distribution",
    "options": {"student_lr": 1e-3, "fake_score_lr": 2e-3, "beta1": 0.0, "steps": 2000},
}


@dataclass(frozen=True)
class Config:
    """DMD's options."""

    regression_weight: float = option(0.25, "weight of the regression on pairs; 0: none, and no pairs", at_least=0)
    distance: Literal["l2", "huber", "lpips"] = option(
        "l2", "the regression's; l2: mean square; huber: of the whole sample; lpips: VGG features, pip install lpips"
    )
    huber_c: float | None = option(None, "pseudo-Huber's c; default: 0.00054 sqrt(dimensions)", above=0)
    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    beta1: float = option(0.9, "AdamW's first beta, for both", at_least=0, below=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher (1: none), never of the fake score; that of the pairs", at_least=0
    )
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise, a pair's too; default: the noisiest",
        at_least=0,
    )  # fmt: skip
    time_low: float = option(0.02, "distribution matching draws its times uniformly from here", at_least=0, below=1)
    time_high: float = option(0.98, "... to here, as fractions of the teacher's own time", above=0, at_most=1)
    normalise: bool = option(True, "divide the gradient by mean|x - D_teacher|; false: the exact KL gradient")
    fake_score_loss: Literal["v", "epsilon"] = option("v", "v: EDM's weight; epsilon: as for SD")


class DMD:
    """Players: student, fake_score."""

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
        self.schedule = teacher.denoiser.schedule
        # Dropout is off for all networks (appendix B).
        self.student = (student or teacher.player("student")).eval()
        self.fake_score = (fake_score or teacher.player("fake_score")).eval()
        self.needs_data, self.needs_pairs = False, config.regression_weight > 0
        self.distance = None
        if self.needs_pairs:
            self.distance = distance(config.distance, teacher.shape, self.schedule.data_std, config.huber_c)
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": self.fake_score}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One each; the fake score learns from the samples that the student was judged by."""
        drawn: list[Tensor] = []
        return [
            Turn("student", partial(self.student_turn, drawn)),
            Turn("fake_score", partial(self.fake_score_turn, drawn)),
        ]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return one_step_sampler(self.student, self.config.student_level)

    def student_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """One pass for the fresh noise and the pairs' together."""
        c, z, cond = self.config, batch.randn("z"), batch.cond
        if self.needs_pairs:
            assert batch.pair is not None
            z = torch.cat([z, batch.pair.z])
            cond = {key: torch.cat([value, batch.pair.cond[key]]) for key, value in cond.items()}
        both = self.sampler().one_step(z, cond)
        x, x_ref = both[: batch.size], both[batch.size :]
        drawn.append(x.detach())
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"), c.time_low, c.time_high)
        logs = self.matching(x, t, batch.randn("student/eps"), batch.cond)
        if batch.pair is not None and self.needs_pairs:
            logs["regression"] = self.regression(x_ref, batch.pair.x0)
            logs["loss"] = logs["loss"] + c.regression_weight * logs["regression"]
        return logs

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Distribution matching of samples x (B, ...) at angles t (B,) with noise eps (B, ...)."""
        x_t = diffuse(x, t, eps)
        grad, gap = distribution_matching_gradient(
            x, x_t, t, cond, self.teacher, self.fake_score, self.config.normalise
        )
        # The normalised gradient has no unit. The authors' is that of images, data_std x, and other terms' weights
        # are relative to it.
        unit = self.schedule.data_std if self.config.normalise else 1.0
        return {"loss": unit * gradient_injection(x, grad), "gap": gap.mean()}

    def regression(self, x_ref: Tensor, y_ref: Tensor) -> Tensor:
        """The mean distance of G(z_ref) from what the teacher's sampler makes of z_ref, both (B, ...)."""
        assert self.distance is not None
        return self.distance(x_ref, y_ref).mean()

    def fake_score_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        t = native_uniform(self.schedule, batch.size, batch.generator("fake_score/t"))
        loss = self.denoising(drawn[0], t, batch.randn("fake_score/eps"), batch.cond)
        return {"loss": loss, "denoising": loss}

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.fake_score, x, t, eps, cond, self.config.fake_score_loss)


METHOD = DMD
