"""Exact checks of flash_dmd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import student_levels
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture, LearnedGaussian, gaussian_teacher
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    differs,
    equal,
    gauss_hermite,
    gradient,
    matching_checks,
    mistake,
)
from diffdistill.methods.flash_dmd import Config, FlashDMD
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.simulation import drawn_level

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step, matched and judged": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "discriminator_lr": 0.001,
        "beta1": 0.0,
        "update_ratio": 1,
        "student_steps": 1,
        "student_level": 1.57,
        "fake_scores": "shared",
        "gan_weight": 0.1,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2000,
    },
}

MU, S, T, SLOPE, WEIGHT = 0.7, 0.5, 0.8, -1.3, 0.4
"""A teacher N(mu, s^2), the angle of the matching, a discriminator's slope and weight."""


def verify() -> Iterator[Check]:
    """Matching is DMD's; which levels have which loss, and where either is at rest."""

    def make(parts: AffineGame, normalise: bool) -> FlashDMD:
        config = Config(normalise=normalise, student_steps=1, fake_scores="shared")
        return FlashDMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from matching_checks(make)
    yield from _division_checks()
    yield from _subset_checks()
    yield from _discriminator_checks()
    yield from _turn_checks()


class _Linear(nn.Module):
    """The discriminator a x."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(SLOPE, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.slope * images[:, 0]


class _Signs(Batch):
    """z, the three noises of a simulation, and eps as all 2^5 signs, which are exact for moments of second order."""

    def randn(self, purpose: str) -> Tensor:
        """(32, 1), another column for each purpose."""
        column = ["z", "z 1", "z 2", "z 3"].index(purpose) if purpose.startswith("z") else 4
        return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 5)[:, column : column + 1]


def _batch(step: int) -> Batch:
    return _Signs(32, (1,), {}, None, torch.device("cpu"), (0, step, 0))


class _Levels:
    """A student of four levels, affine at each, of which the fake score knows the samples of the level k."""

    def __init__(self, **options: Any):
        teacher = gaussian_teacher([MU], S)
        self.schedule = teacher.denoiser.schedule
        self.angles = self.schedule.angle(student_levels(self.schedule, 4))
        self.network = AffinePerAngle(self.angles, 1)
        self.network.slope.data[:, 0] = torch.tensor([0.3, 0.5, 0.6, 0.8]).double()
        self.network.offset.data[:, 0] = torch.tensor([0.2, -0.1, 0.3, 0.1]).double()
        student = Denoiser(self.network, self.schedule, OUTPUTS["sample"])
        self.score = LearnedGaussian(1).double()
        fake_score = Denoiser(self.score, self.schedule, OUTPUTS["v_prediction"])
        config = Config(
            fake_scores="shared", update_ratio=1, normalise=False, gan_weight=WEIGHT, matched_steps=2, **options
        )
        self.method = FlashDMD(teacher, config, student=student, fake_score=fake_score)
        self.method.adversary.discriminator = _Linear()  # type: ignore[assignment]

    def read(self, k: int) -> Tensor:
        """(32, 1) what level k reads, for all signs of its noises."""
        batch, x = _batch(0), _batch(0).randn("z")
        for j in range(1, k + 1):
            cos, sin = torch.cos(self.angles[j]), torch.sin(self.angles[j])
            x = cos * (self.network.slope[j - 1] * x + self.network.offset[j - 1]) + sin * batch.randn(f"z {j}")
        return x.detach()

    def closed(self, matched: int, judged: int) -> Tensor:
        """(8,) the gradient in slopes and offsets."""
        slopes, offsets = torch.zeros(2, 4, dtype=torch.float64)
        cos2, sin2 = math.cos(T) ** 2, math.sin(T) ** 2
        x_t = self.read(matched)
        x = (self.network.slope[matched] * x_t + self.network.offset[matched]).detach()
        mean, variance = x.mean(), x.var(unbiased=False)
        big_v, big_u = cos2 * S**2 + sin2, cos2 * variance + sin2
        pull = cos2 * (mean / big_u - MU / big_v) + cos2 * (1 / big_v - 1 / big_u) * x
        offsets[matched], slopes[matched] = pull.mean(), (pull * x_t).mean()
        x_t = self.read(judged)
        x = (self.network.slope[judged] * x_t + self.network.offset[judged]).detach()
        push = -WEIGHT * SLOPE * torch.sigmoid(-SLOPE * x)
        offsets[judged] += push.mean()
        slopes[judged] += (push * x_t).mean()
        return torch.cat([slopes, offsets])

    def got(self, step: int, matched: int) -> Tensor:
        """The same of the method's own turn."""
        x = (self.network.slope[matched] * self.read(matched) + self.network.offset[matched]).detach()
        self.score.mean.data[:], self.score.log_std.data[:] = x.mean(), x.std(unbiased=False).log()
        at = torch.full((32,), T, dtype=torch.float64)
        with mistake(self.method, "times", lambda player, batch: at):
            loss = self.method.turns(step)[0].loss(_batch(step)).loss
        return gradient(loss, self.network.slope, self.network.offset)


def _division_checks() -> Iterator[Check]:
    """Levels 0 and 1 have the divergence's gradient alone, 2 and 3 the discriminator's alone."""
    game, seen = _Levels(), set()
    for step in range(24):
        batch = _batch(step)
        matched, judged = drawn_level(2, batch), 2 + drawn_level(2, batch, "student/judged level")
        if (matched, judged) in seen:
            continue
        seen.add((matched, judged))
        closed, name = game.closed(matched, judged), f"level {matched} is matched and level {judged} judged"
        yield equal(f"the student's gradient where {name}", closed, game.got(step, matched), 1e-9)
        with mistake(game.method, "judged_levels", lambda: range(2)):
            yield differs("a GAN on the matched levels is caught", closed, game.got(step, matched), 1e-2)
        with mistake(game.method, "matched_levels", lambda: range(4)):
            yield differs("... and matching of all levels", game.closed(3, 3), game.got(step, matched), 1e-2)
        with mistake(game.method.adversary, "as_images", lambda x: -x):
            yield differs("... and another sign of the images", closed, game.got(step, matched), 1e-2)
    yield equal("every pair of levels is drawn", 4.0, float(len(seen)), 0.0)
    one = FlashDMD(gaussian_teacher([MU], S), Config(student_steps=1, fake_scores="shared"))
    both = one.matched_levels(), one.judged_levels()
    yield equal("with one step both losses are of it", 1.0, float(both == (range(1), range(1))), 0.0)
    halves = [FlashDMD(gaussian_teacher([MU], S), Config(student_steps=n)) for n in (2, 3, 4)]
    divided = [(each.matched_levels().stop, each.judged_levels().start) for each in halves]
    yield equal("half of the steps are matched", 1.0, float(divided == [(1, 1), (2, 2), (2, 2)]), 0.0)
    networks = torch.tensor([len(each.fake_scores) for each in halves])
    yield equal("there is a fake score for each of them", torch.tensor([1, 2, 2]), networks, 0.0)


def _subset_checks() -> Iterator[Check]:
    """Matched at some of the noise alone it is DMD all the same: at rest at the teacher's."""
    mu, s, m, b = (torch.tensor([value]).double() for value in (MU, S, -0.3, 0.9))
    batch = Batch(4000, (1,), {}, None, torch.device("cpu"), (0, 0, 0))
    for name, mean, scale in (("the teacher's", mu, s), ("others", m, b)):
        parts = affine_game(mu, s, mean, scale)
        config = Config(student_steps=1, fake_scores="shared", normalise=False, time_low=0.5)
        method = FlashDMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
        only_trains("student", trainable(method.players))
        t = method.times("student", batch)
        least = torch.stack([method.schedule.fraction(t).min(), method.schedule.fraction(t).max()])
        yield equal("the matching's times are those of the options", torch.tensor([0.5, 0.98]), least, 0.01)
        x, eps = (batch.randn(purpose).double() for purpose in ("z", "eps"))
        loss = method.matching(method.sampler().one_step(x, {}), t, eps, {}).loss
        row = equal if name == "the teacher's" else differs
        slope = gradient(loss, parts.generator.mean, parts.generator.scale)
        yield row(f"at rest with much noise alone: {name}", 0.0, slope, 1e-9 if row is equal else 1e-2, scale=1.0)


class _Ratio(nn.Module):
    """log p/q of Gaussians, and a multiple h of its images."""

    def __init__(self, m: float, b: float):
        super().__init__()
        self.p, self.q = GaussianMixture([[MU]], [S]), GaussianMixture([[m]], [b])
        self.h = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        t = torch.full((len(images),), 1e-4, dtype=torch.float64)
        p, q = (each.log_density(images, t) for each in (self.p, self.q))
        return p - q + self.h * images[:, 0]


def _discriminator_checks() -> Iterator[Check]:
    """With d = log p/q, by quadrature: the student's gradient, and that d is at rest."""
    nodes, weights = gauss_hermite(60)
    adversary = _Levels().method.adversary

    def expected(loss: Callable[..., Tensor], *samples: Tensor) -> Tensor:
        rows = zip(*samples, strict=True)
        return (weights * torch.stack([loss(*(x.reshape(1, 1) for x in each)) for each in rows])).sum()

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        batch = Batch(1, (1,), {}, real, torch.device("cpu"), (0, 0, 0))
        return adversary.turn(batch, lambda: fake).loss

    def judged(x: Tensor) -> Tensor:
        return adversary.student_loss(x, _batch(0))

    for name, m, b in (("another Gaussian", 0.2, 0.9), ("the teacher's", MU, S)):
        ratio = _Ratio(m, b)
        adversary.discriminator = ratio  # type: ignore[assignment]
        mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
        x, real = mean + b * nodes, MU + S * nodes
        got = gradient(expected(judged, x), mean)
        fixed = x.detach()
        logit = adversary.logits(fixed[:, None]).detach()
        score = -(fixed - MU) / S**2 + (fixed - m) / b**2
        closed = -(weights * torch.sigmoid(-logit) * score).sum()
        yield equal(f"the gradient of the GAN, {name}", closed, got, 1e-6, scale=1.0)
        adversary.samples.clear()
        yield equal(
            f"log p/q is at rest, {name}", 0.0, gradient(expected(critic, real, fixed), ratio.h), 1e-4, scale=1.0
        )
        if name == "the teacher's":
            yield equal("... where the student's gradient is zero", 0.0, got, 1e-9, scale=1.0)
            continue
        yield differs("... and not with real and generated swapped", 0.0,
                      gradient(expected(critic, fixed, real), ratio.h), 1e-2, scale=1.0)  # fmt: skip
    d = adversary.logits(fixed[:, None]).detach()
    one = F.softplus(-d).mean()
    yield equal("a logit of 0 costs the student log 2", math.log(2), one, 1e-9)


def _turn_checks() -> Iterator[Check]:
    for ratio in (1, 2):
        method = FlashDMD(gaussian_teacher([0.0], 1.0), Config(update_ratio=ratio, fake_scores="shared"))
        order = [[turn.player for turn in method.turns(k)] for k in range(2 * ratio)]
        expected = [(["student"] if k % ratio == 0 else []) + ["fake_score", "discriminator"] for k in range(2 * ratio)]
        yield equal(f"order of turns, update_ratio {ratio}", 1.0, float(order == expected), 0.0)
