"""Exact checks of yonos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods.yonos import YONOS, Config
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch

# Samples N(mu, s^2), seen with noise: by the teacher with deviation FINE, by the student with that and MORE.
MU, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
FINE, MORE = torch.tensor([0.4, 0.3]).double(), torch.tensor([0.6, 0.9]).double()


def posterior(t: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a sample given x_t and an image of that noise: p, q, c (2,) of its mean p x_t + q image + c; its variance."""
    cos, sin = math.cos(t), math.sin(t)
    variance = 1 / (1 / STD**2 + cos**2 / sin**2 + 1 / noise**2)
    return variance * cos / sin**2, variance / noise**2, variance * MU / STD**2, variance


class Seen(nn.Module):
    """x0 as p x_t + q image + c per dimension, at every time."""

    def __init__(self, p: Tensor, q: Tensor, c: Tensor):
        super().__init__()
        self.p, self.q, self.c = (nn.Parameter(value.clone()) for value in (p, q, c))

    def forward(self, x_t: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """(B, 2) x0."""
        return self.p * x_t + self.q * image + self.c


@dataclass(frozen=True)
class At(Batch):
    """A batch at one angle, with that noise."""

    angle: float = 0.0
    noise: Tensor | None = None

    def draw(self, purpose: str, of: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The angle of all samples."""
        return torch.full((self.size,), self.angle, dtype=torch.float64)

    def randn(self, purpose: str) -> Tensor:
        """The noise."""
        assert self.noise is not None
        return self.noise


class _Game:
    """The exact teacher and the exact student at one angle, and samples whose moments are those of the Gaussians."""

    def __init__(self, t: float):
        schedule, self.t = TrigFlow(), t
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 8)
        z, fine, more, eps = signs.split(2, 1)
        x0 = MU + STD * z
        images = {"image": x0 + FINE * fine}, {"image": x0 + FINE * fine + MORE * more}
        coarse = (FINE**2 + MORE**2).sqrt()
        exact, own = (Seen(*posterior(t, noise)[:3]) for noise in (FINE, coarse))
        teacher, student = (Denoiser(network, schedule, OUTPUTS["sample"]) for network in (exact, own))
        self.teacher, self.network, self.left = teacher, own, posterior(t, coarse)[3] - posterior(t, FINE)[3]
        self.method = YONOS(Teacher(teacher, (2,), example_cond=images[0]), Config(), student=student)
        self.batch = At(
            len(x0), (2,), images[1], x0, torch.device("cpu"), (0, 0, 0), teacher_cond=images[0], angle=t, noise=eps
        )

    def loss(self, batch: Batch | None = None) -> Tensor:
        return self.method.student_turn(0, batch or self.batch).loss

    def slope(self, batch: Batch | None = None) -> Tensor:
        """The loss's gradient, which is 0 at the minimum."""
        return gradient(self.loss(batch), *self.network.parameters())


def verify() -> Iterator[Check]:
    """Section 8.5's sanity item: a Gaussian that is seen with more noise or with less."""
    for t in (0.3, 0.9, 1.5):
        game = _Game(t)
        yield equal(f"the denoiser of what the student sees is the minimum, t = {t}", 0.0, game.slope(), 1e-12, scale=1)
        left = (game.left / math.sin(t) ** 2).mean()
        yield equal(f"what is left is what the coarse image leaves open, t = {t}", left, game.loss(), 1e-12)
    game = _Game(0.9)
    for name, batch in (
        ("the teacher sees the coarse image", replace(game.batch, teacher_cond=game.batch.cond)),
        ("the student sees the fine one", replace(game.batch, cond=game.batch.seen_by_teacher)),
        ("each sees the other's", replace(game.batch, cond=game.batch.seen_by_teacher, teacher_cond=game.batch.cond)),
    ):
        yield differs(f"{name}: caught", 0.0, game.slope(batch), 1e-2, scale=1.0)
    fresh: Any = lambda x_t, *at: game.teacher(x_t.flip(0), *at)  # noqa: E731
    with mistake(game.method, "teacher", fresh):
        yield differs("the teacher at another noise is caught", 0.0, game.slope(), 1e-2, scale=1.0)
    for p in game.network.parameters():
        p.data += 0.1
    images = replace(game.batch, teacher_cond={"image": game.batch.images}, angle=0.9)
    yield differs("away from the minimum there is a gradient", 0.0, game.slope(), 1e-2, scale=1.0)
    yield differs("... towards the teacher's predictions", game.slope(), game.slope(images), 1e-2)
    yield from _one_step()


def _one_step() -> Iterator[Check]:
    """From pure noise one step gives the mean of what the image leaves open."""
    game = _Game(math.pi / 2)
    image, sampler = game.batch.cond["image"][:3], game.method.sampler()
    drawn = sampler((2,), {"image": image}, [torch.Generator().manual_seed(k) for k in range(3)])
    noise = FINE**2 + MORE**2
    mean = (MU / STD**2 + image / noise) / (1 / STD**2 + 1 / noise)
    yield equal("one step from pure noise is the mean of the samples for the image", mean, drawn, 1e-6)
