"""Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models.

Luo, Hu, Zhang, Sun, Li, Zhang, NeurIPS 2023, arXiv:2305.18455 (code: pkulwj1994/diff_instruct).

The student x = G(z, c) follows the gradient of the integral of KL(q_t || p_t) over noise levels, weighted by w(t):
the fake score's denoiser less the teacher's, D_fake - D_teacher, is pushed into x, and no gradient passes through
either network. Against EDM's x_t = x + sigma eps the score gap is (D_fake - D_teacher)/sigma^2, so the code's
gradient has the weight w = sigma^2. In the normal form sigma is tan(t), the gradient of KL(q_t || p_t) with
respect to x is cot(t)^2 (D_fake - D_teacher), and w = tan(t)^2. There is no normaliser, no regression and no GAN.

Deviations: the fake score moves after the student, on the samples that the student was judged by; the authors' moves
first, and both draw their own. Both networks of the gap are evaluated without dropout, where the authors' have it
with one mask for both. Losses are means over elements, not sums, which Adam does not see. Gradients are not cleaned
of nan: the trainer refuses what is not finite. No augmentation of what the fake score sees. The student's input is
what the stock scheduler draws, for an EDMEulerScheduler of standard deviation sqrt(sigma^2 + 1) instead of sigma.
For a teacher that is not EDM's the noise levels are those of EDM at the same angle. Guidance of the teacher and
`update_ratio` are additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gradient_injection
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import edm_log_normal
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Luo et al. 2023, arXiv:2305.18455"
DATA = "none"
EQUATIONS = {
    "gradient of the integral KL divergence (the code's gloss)": "DiffInstruct.matching",
    "denoising loss of the fake score": "matching.fake_score_loss",
    "noise levels, ln sigma ~ N(-1.2, 1.2^2)": "times.edm_log_normal",
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
        "batch_size": 128,
        "student_level": 1.0,
        "ema": 0.99982,
        "max_grad_norm": 0,
    },
}
PASSES = {"digits": 4}
END_TO_END = {
    "kind": "distribution",
    "options": {"student_lr": 1e-3, "fake_score_lr": 2e-3, "student_level": 1.373, "steps": 2000},
}


@dataclass(frozen=True)
class Config:
    """Diff-Instruct's options."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    beta1: float = option(0.0, "AdamW's first beta, for both players", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay; 0 is Adam", at_least=0)
    update_ratio: int = option(1, "steps of the fake score for one of the student", at_least=1)
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; default: the noisiest", at_least=0
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher (1: none); never of the fake score", at_least=0
    )
    time_mean: float = option(-1.2, "mean of ln sigma, at data of standard deviation 0.5, in both losses")
    time_std: float = option(1.2, "standard deviation of ln sigma", above=0)


class DiffInstruct:
    """Players: student and fake_score, one turn each; the student moves first."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        *,
        student: Denoiser | None = None,
        fake_score: Denoiser | None = None,
    ):
        self.config = config
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.student = student or teacher.player("student")
        self.fake_score = fake_score or teacher.player("fake_score")
        self.schedule = teacher.denoiser.schedule
        self.needs_data, self.needs_pairs = False, False
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": self.fake_score}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves first, every `update_ratio`-th step; the fake score moves in every step."""
        drawn: list[Tensor] = []
        student = [Turn("student", partial(self.student_turn, drawn))] if step % self.config.update_ratio == 0 else []
        return [*student, Turn("fake_score", partial(self.fake_score_turn, drawn))]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        return one_step_sampler(self.student, self.config.student_level)

    def times(self, player: str, batch: Batch) -> Tensor:
        """(B,) the angles of a player's loss."""
        c = self.config
        return edm_log_normal(self.schedule, batch.size, batch.generator(f"{player}/t"), c.time_mean, c.time_std)

    def student_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        self.fake_score.eval()  # its dropout would be noise in the gap
        x = self.sampler().one_step(batch.randn("z"), batch.cond)
        drawn.append(x.detach())
        return self.matching(x, self.times("student", batch), batch.randn("student/eps"), batch.cond)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """A loss whose gradient in x (B, ...) is D_fake - D_teacher at angles t (B,), as a mean."""
        with torch.no_grad():
            x_t = diffuse(x, t, eps)
            gap = self.fake_score(x_t, t, cond).x0 - self.teacher(x_t, t, cond).x0
        return {"loss": gradient_injection(x, gap), "gap": gap.square().mean()}

    def fake_score_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        self.fake_score.train()
        with torch.no_grad():
            x = drawn[0] if drawn else self.sampler().one_step(batch.randn("z"), batch.cond)
        return {"loss": self.denoising(x, self.times("fake_score", batch), batch.randn("fake_score/eps"), batch.cond)}

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.fake_score, x, t, eps, cond)


METHOD = DiffInstruct
