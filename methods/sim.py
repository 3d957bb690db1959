"""SIM: One-Step Diffusion Distillation through Score Implicit Matching.

Luo, Huang, Geng, Kolter, Qi, NeurIPS 2024, arXiv:2410.16794 (code: maple-research-lab/SIM, inference only).

The student minimises E d(y), y = s_psi - s_phi the gap between its own score and the teacher's, over its noised
samples, for a distance d of choice and with the distribution that y is averaged over held fixed. The change of
s_psi with the student is intractable; for every u, E[u(x_t) . (s_psi(x_t) - grad log q(x_t | x))] = 0, and with
u = d'(y) its derivative gives the same gradient as the loss -d'(y) . (s_psi - grad log q(x_t | x)), in which x, x_t
and both networks' outputs, y too, move with the student and only the networks' parameters are fixed. The loss itself
is zero in expectation; `distance` is E d(y). With d = |y|^2 it is SiD's loss at alpha = 1, times 2 cos^2/sin^4.

In the normal form s_psi - s_phi = cos/sin^2 (D_psi - D_phi), and grad log q(x_t | x) is the score of a denoiser
that answers x. By default y is the gap of the denoisers themselves (`weight: denoiser`), which is another d at
each level, d(sin^2/cos y), and needs no 1/sin^2; `weight: score` is the formula of the paper with w(t) = 1.

Deviations: there is no training code, and the paper's w(t), noise levels, c and learning rates were not found in
what could be read: those here are SiD's, and c, in units of data of variance one, is 0.00054 sqrt(d) of improved
consistency training (arXiv:2310.14189) at CIFAR-10's d = 3072. Only the pseudo-Huber and the squared distance are
implemented. The fake score moves after the student, on the samples that the student was judged by. The loss is a
sum over elements, since d is of the whole sample. The student's input is what the stock scheduler draws.
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
from diffdistill.core.losses import pseudo_huber
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import check_range, edm_karras, edm_log_normal
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import fake_score_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Luo et al. 2024, arXiv:2410.16794"
DATA = "none"
EQUATIONS = {
    "score implicit matching's loss (section 3.2)": "SIM.divergence",
    "pseudo-Huber and squared distance and their gradients (section 3.3)": "distance, distance_gradient",
    "denoising loss of the fake score": "matching.fake_score_loss",
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
        "c": 0.0043,
    },
    "cifar10": {
        "batch_size": 256,
        "student_level": 2.5,
        "ema": 0.99965,
        "max_grad_norm": 0,
    },
}
PASSES = {"digits": 4}
END_TO_END = {
    "kind": "distribution",
    "options": {
        "time_low": 0.2,
        "c": 0.3,
        "student_lr": 1e-3,
        "fake_score_lr": 2e-3,
        "student_level": 1.373,
        "steps": 2000,
    },
}


@dataclass(frozen=True)
class Config:
    """SIM's options."""

    student_lr: float = option(1e-5, "AdamW's learning rate for the student", above=0)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the fake score", above=0)
    beta1: float = option(0.0, "AdamW's first beta, for both players", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay; 0 is Adam", at_least=0)
    distance: Literal["pseudo_huber", "l2"] = option("pseudo_huber", "sqrt(|y|^2 + c^2) - c, or |y|^2")
    c: float = option(0.03, "the pseudo-Huber distance's c, in the units of y over a whole sample", above=0)
    weight: Literal["denoiser", "score"] = option(
        "denoiser", "y: the gap of the denoisers, or of the scores, which grows as 1/sigma^2"
    )
    student_level: float | None = option(
        None, "the timestep or sigma at which the student reads pure noise; default: the noisiest", at_least=0
    )
    time_low: float = option(0.0, "the student's loss draws from EDM's grid of levels, from this fraction", at_least=0)
    time_high: float = option(0.8, "... to this one; 0.8 is sigma = 24.4", above=0, at_most=1)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher (1: none); never of the fake score", at_least=0
    )


class SIM:
    """Players: student and fake_score, one turn each; the student moves first."""

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
        self.schedule = teacher.denoiser.schedule
        self.needs_data, self.needs_pairs = False, False
        self.players: dict[str, nn.Module] = {"student": self.student, "fake_score": self.fake_score}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
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
        c = self.config
        self.fake_score.eval()  # its dropout would be noise in y
        t = edm_karras(self.schedule, batch.size, batch.generator("student/t"), c.time_low, c.time_high)
        x = self.sampler().one_step(batch.randn("z"), batch.cond)
        drawn.append(x.detach())
        loss, y = self.divergence(x, t, batch.randn("student/eps"), batch.cond)
        return {"loss": loss.mean(), "distance": distance(y.detach(), c.distance, c.c).mean()}

    def divergence(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(B,) -d'(y) . (s_psi - grad log q(x_t | x)), and y (B, ...); both networks stay in the graph."""
        x_t = diffuse(x, t, eps)
        x0_teacher, x0_fake = self.teacher(x_t, t, cond).x0, self.fake_score(x_t, t, cond).x0
        scale = torch.ones_like(t) if self.config.weight == "denoiser" else torch.cos(t) / torch.sin(t) ** 2
        y = expand(scale, x) * (x0_fake - x0_teacher)
        to_x = expand(scale, x) * (x0_fake - x)
        return -(distance_gradient(y, self.config.distance, self.config.c) * to_x).flatten(1).sum(1), y

    def fake_score_turn(self, drawn: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        self.fake_score.train()
        t = edm_log_normal(self.schedule, batch.size, batch.generator("fake_score/t"), -1.2, 1.2)
        return {"loss": self.denoising(drawn[0], t, batch.randn("fake_score/eps"), batch.cond)}

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.fake_score, x, t, eps, cond)


def distance(y: Tensor, kind: str, c: float) -> Tensor:
    """(B,) d of the whole sample y (B, ...)."""
    return y.flatten(1).square().sum(1) if kind == "l2" else pseudo_huber(y, torch.zeros_like(y), c)


def distance_gradient(y: Tensor, kind: str, c: float) -> Tensor:
    """(B, ...) d'(y), not detached: 2 y, or y/sqrt(|y|^2 + c^2), which is never longer than 1."""
    if kind == "l2":
        return 2 * y
    return y / expand(torch.sqrt(y.flatten(1).square().sum(1) + c**2), y)


METHOD = SIM
