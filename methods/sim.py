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

import itertools
import math
from collections.abc import Iterator, Sequence
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
from diffdistill.exact.checks import AffineGame, Check, affine_game, differs, equal, gauss_hermite, gradient, two_points
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler, one_step_sampler
from diffdistill.players.teacher import Teacher, frozen, only_trains, trainable
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


def verify() -> Iterator[Check]:
    """Appendix B's row for SIM, on Gaussians in one dimension by quadrature and in two by formulas."""
    mu, s, m, b = (torch.tensor([v], dtype=torch.float64) for v in (0.7, 0.5, -0.3, 0.9))
    nodes, weights = gauss_hermite(100)
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    chance = torch.outer(weights, weights).flatten()

    def game(mean: Tensor, scale: Tensor, config: Config) -> tuple[SIM, AffineGame]:
        parts = affine_game(mu, s, mean, scale)
        method = SIM(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
        only_trains("student", trainable(method.players))
        return method, parts

    def expectation(method: SIM, angle: Tensor) -> Tensor:
        return (chance * method.divergence(method.sampler().one_step(z, {}), angle, eps, {})[0]).sum()

    for kind, weight, t in itertools.product(("l2", "pseudo_huber"), ("denoiser", "score"), (0.5, 0.9, 1.4)):
        config = Config(distance=kind, weight=weight, c=1.0)  # type: ignore[arg-type]
        angle = torch.full((len(z),), t, dtype=torch.float64)
        expected, name = _frozen_slopes(mu, s, m, b, t, kind, weight), f"{kind} of the {weight}s, t = {t}"
        method, parts = game(m, b, config)
        mean, scale = parts.generator.mean, parts.generator.scale
        loss = expectation(method, angle)
        got = gradient(loss, mean, scale)
        yield equal(f"gradient of E d(y), {name}", expected, got, 1e-6)
        yield equal(f"the loss is zero in expectation, {name}", 0.0, loss, 1e-9, scale=1.0)

        halved = _expectation_with_y_detached(method, z, angle, eps, chance)
        wrong = gradient(halved, mean, scale)
        yield equal(f"with y detached the mean's gradient is right, {name}", got[0], wrong[0], 1e-6)
        yield equal(f"with y detached the scale's gradient is half, {name}", got[1] / 2, wrong[1], 1e-6)
        yield differs(f"a detached y is caught by the scale, {name}", got[1], wrong[1], 0.4)

        settled, parts = game(mu, s, config)
        zero = gradient(expectation(settled, angle), parts.generator.mean, parts.generator.scale)
        yield equal(f"zero at the optimum, {name}", 0.0, zero, 1e-9, scale=1.0)

    yield from _formulas()


def _frozen_slopes(mu: Tensor, s: Tensor, m: Tensor, b: Tensor, t: float, kind: str, weight: str) -> Tensor:
    """(2,) d/dm and d/db of E d(y) by central differences: the x_t stay those of (m, b), the score moves."""
    nodes, weights = gauss_hermite(100)
    cos, sin2 = math.cos(t), math.sin(t) ** 2
    x_t = cos * m + (cos**2 * b**2 + sin2).sqrt() * nodes
    teacher = (cos * mu - x_t) / (cos**2 * s**2 + sin2)

    def e_d(mean: Tensor, scale: Tensor) -> Tensor:
        own = (cos * mean - x_t) / (cos**2 * scale**2 + sin2)
        y = (own - teacher) * (1 if weight == "score" else sin2 / cos)
        return (weights * (y**2 if kind == "l2" else torch.sqrt(1 + y**2) - 1)).sum()

    h = 1e-5
    return torch.stack([e_d(m + h, b) - e_d(m - h, b), e_d(m, b + h) - e_d(m, b - h)]) / (2 * h)


def _expectation_with_y_detached(method: SIM, z: Tensor, t: Tensor, eps: Tensor, chance: Tensor) -> Tensor:
    """The mistake of a stop-gradient on y."""
    x = method.sampler().one_step(z, {})
    y = method.divergence(x, t, eps, {})[1].detach()
    scale = 1 if method.config.weight == "denoiser" else torch.cos(t[0]) / torch.sin(t[0]) ** 2
    to_x = scale * (method.fake_score(diffuse(x, t, eps), t, {}).x0 - x)
    return -(chance * (distance_gradient(y, method.config.distance, method.config.c) * to_x)[:, 0]).sum()


def _formulas() -> Iterator[Check]:
    """The losses of single samples in two dimensions, each at its own level, from the Gaussians' formulas."""
    mu, s = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)
    m, b = torch.tensor([-0.3, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.6], dtype=torch.float64)
    z, eps = two_points(2)
    t = torch.linspace(0.2, 1.4, len(z), dtype=torch.float64)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    parts = affine_game(mu, s, m, b)
    x = m + b * z
    x_t = cos * x + sin * eps
    x0_teacher = mu + cos * s**2 / (cos**2 * s**2 + sin**2) * (x_t - cos * mu)
    x0_fake = m + cos * b**2 / (cos**2 * b**2 + sin**2) * (x_t - cos * m)
    sid = ((x0_teacher - x0_fake) * (x0_fake - x)).sum(1)  # SiD's loss at alpha = 1

    def loss(**options: str | float) -> Tensor:
        method = SIM(parts.teacher, Config(**options), student=parts.student, fake_score=parts.fake_score)  # type: ignore[arg-type]
        return method.divergence(x, t, eps, {})[0]

    yield equal("l2 of denoisers is 2 SiD(a = 1)", 2 * sid, loss(distance="l2"), 1e-9)
    factor = 2 * torch.cos(t) ** 2 / torch.sin(t) ** 4
    yield equal("l2 of scores is 2 cos^2/sin^4 SiD(a = 1)", factor * sid, loss(distance="l2", weight="score"), 1e-9)
    for c in (0.03, 1.0):
        size = torch.sqrt((x0_teacher - x0_fake).square().sum(1) + c**2)
        yield equal(f"the pseudo-Huber norm is of the whole sample, c = {c}", sid / size, loss(c=c), 1e-9)
        gap = torch.cos(t) / torch.sin(t) ** 2
        size = torch.sqrt(((x0_teacher - x0_fake) * gap[:, None]).square().sum(1) + c**2)
        yield equal(f"... of scores, c = {c}", gap**2 * sid / size, loss(c=c, weight="score"), 1e-9)
        y = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
        for kind in ("l2", "pseudo_huber"):
            slope = gradient(distance(y, kind, c).sum(), y)
            yield equal(f"d' is the gradient of d, {kind}, c = {c}", slope, distance_gradient(y, kind, c), 1e-12)

    method = SIM(parts.teacher, Config(), student=parts.student, fake_score=parts.fake_score)
    only_trains("fake_score", trainable(method.players))
    angle = torch.full((len(z),), 0.8, dtype=torch.float64)
    at_optimum = gradient(method.denoising(x, angle, eps, {}), parts.score.means, parts.score.stds)
    yield equal("the fake score's gradient at its optimum is zero", 0.0, at_optimum, 1e-9, scale=1.0)
    order = [turn.player for turn in method.turns(0)]
    yield equal("the student moves first", 1.0, float(order == ["student", "fake_score"]), 0.0)
