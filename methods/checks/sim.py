"""Exact checks of sim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    at_half_the_angle,
    differs,
    equal,
    gauss_hermite,
    gradient,
    mistake,
    two_points,
)
from diffdistill.methods import sim
from diffdistill.methods.sim import SIM, Config, distance, distance_gradient
from diffdistill.players.teacher import only_trains, trainable

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "time_low": 0.2,
        "time_high": 0.8,
        "c": 0.3,
        "student_level": 1.373,
        "steps": 2000,
    },
}


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

        with mistake(sim, "distance_gradient", _of_detached):
            wrong = gradient(expectation(method, angle), mean, scale)
        yield equal(f"with y detached the mean's gradient is right, {name}", got[0], wrong[0], 1e-6)
        yield equal(f"with y detached the scale's gradient is half, {name}", got[1] / 2, wrong[1], 1e-6)
        yield differs(f"a detached y is caught by the scale, {name}", expected[1], wrong[1], 0.4)
        teacher, fake_score = method.teacher, method.fake_score
        with mistake(method, "fake_score", teacher), mistake(method, "teacher", fake_score):
            wrong = gradient(expectation(method, angle), mean, scale)
        yield differs(f"the two scores swapped are caught, {name}", expected, wrong, 1e-3)
        with mistake(method, "fake_score", at_half_the_angle(fake_score)):
            wrong = gradient(expectation(method, angle), mean, scale)
        yield differs(f"the fake score asked at another level is caught, {name}", expected, wrong, 1e-3)

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


def _of_detached(y: Tensor, kind: str, c: float) -> Tensor:
    """The mistake of a stop-gradient on y."""
    return distance_gradient(y.detach(), kind, c)


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
