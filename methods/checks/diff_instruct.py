"""Exact checks of diff_instruct."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.schedule import EDM
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    at_half_the_angle,
    differs,
    equal,
    gradient,
    mistake,
    two_points,
    without_stop_gradients,
)
from diffdistill.methods import diff_instruct
from diffdistill.methods.diff_instruct import Config, DiffInstruct
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "student_level": 1.373,
        "time_mean": -1.2,
        "time_std": 1.2,
        "steps": 2000,
    },
}


LEVELS = (0.2, 0.8, 1.4)
MU, S = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)  # the teacher's
M, B = torch.tensor([-0.3, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.6], dtype=torch.float64)  # the student's


def verify() -> Iterator[Check]:
    """Distribution matching with the weight sigma^2, on Gaussians whose every quantity is known."""
    for t in LEVELS:
        yield from _divergence_checks(t)
        yield from _denoising_checks(t)
        method, parts = _game(MU, S, Config())
        yield equal(f"zero at the optimum, t = {t}", 0.0, _slope(method, parts, (t,)), 1e-9, scale=1.0)
    method, parts = _game(M, B, Config())
    integral = torch.stack([math.tan(t) ** 2 * _kl_gradient(t) for t in LEVELS]).mean(0)
    yield equal("the mean over levels is the integral's gradient", integral, _slope(method, parts, LEVELS), 1e-9)
    yield from _level_checks()
    for ratio in (1, 3):
        method, _ = _game(M, B, Config(update_ratio=ratio))
        order = [[turn.player for turn in method.turns(k)] for k in range(2 * ratio)]
        expected_order = [(["student"] if k % ratio == 0 else []) + ["fake_score"] for k in range(2 * ratio)]
        yield equal(f"order of turns, update_ratio {ratio}", 1.0, float(order == expected_order), 0.0)


def _game(mean: Tensor, scale: Tensor, config: Config) -> tuple[DiffInstruct, AffineGame]:
    parts = affine_game(MU, S, mean, scale)
    method = DiffInstruct(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
    only_trains("student", trainable(method.players))
    return method, parts


def _slope(method: DiffInstruct, parts: AffineGame, levels: tuple[float, ...]) -> Tensor:
    """The gradient in (mean, scale), times 2: the loss is a mean over two dimensions, the divergence a sum."""
    z, eps = two_points(2)  # everything here has degree 2
    angle = torch.tensor(levels, dtype=torch.float64).repeat_interleave(len(z))
    z, eps = z.repeat(len(levels), 1), eps.repeat(len(levels), 1)
    loss = 2 * method.matching(method.sampler().one_step(z, {}), angle, eps, {}).loss
    return gradient(loss, parts.generator.mean, parts.generator.scale)


def _kl_gradient(t: float) -> Tensor:
    """KL between N(m, b^2 + sigma^2) and N(mu, s^2 + sigma^2), which is EDM's x + sigma eps."""
    wide, narrow = S**2 + math.tan(t) ** 2, B**2 + math.tan(t) ** 2
    return torch.cat([(M - MU) / wide, B * (1 / wide - 1 / narrow)])


def _divergence_checks(t: float) -> Iterator[Check]:
    expected = math.tan(t) ** 2 * _kl_gradient(t)
    method, parts = _game(M, B, Config())
    got = _slope(method, parts, (t,))
    yield equal(f"sigma^2 times the gradient of KL(q_t || p_t), t = {t}", expected, got, 1e-9)
    teacher, fake_score = method.teacher, method.fake_score
    with mistake(method, "teacher", fake_score), mistake(method, "fake_score", teacher):
        yield differs(f"the two scores swapped are caught, t = {t}", expected, _slope(method, parts, (t,)), 1e-3)
    with mistake(method, "fake_score", at_half_the_angle(fake_score)):
        wrong = _slope(method, parts, (t,))
        yield differs(f"the fake score asked at another level is caught, t = {t}", expected, wrong, 1e-3)
    with without_stop_gradients(diff_instruct):
        wrong = _slope(method, parts, (t,))
        yield differs(f"a gradient through the two networks is caught, t = {t}", expected, wrong, 1e-2)


def _denoising_checks(t: float) -> Iterator[Check]:
    """The fake score is exact, and so at the optimum of its own loss."""
    method, parts = _game(M, B, Config())
    z, eps = two_points(2)
    angle = torch.full((len(z),), t, dtype=torch.float64)
    big_u = math.cos(t) ** 2 * B**2 + math.sin(t) ** 2
    rate = math.cos(t) * math.sin(t) * (1 - B**2) / big_u  # of the exact velocity
    residual = (B * (rate * math.cos(t) + math.sin(t))) ** 2 + (rate * math.sin(t) - math.cos(t)) ** 2
    denoising = method.denoising(method.sampler().one_step(z, {}), angle, eps, {})
    yield equal(f"the fake score's loss at its optimum, t = {t}", residual.mean(), denoising, 1e-9)
    at_optimum = gradient(denoising, parts.score.means, parts.score.stds)
    yield equal(f"its gradient there is zero, t = {t}", 0.0, at_optimum, 1e-9, scale=1.0)


def _level_checks() -> Iterator[Check]:
    """Without a spread every level that is drawn is the median, the same angle for all schedules."""
    method, _ = _game(M, B, Config(time_std=0.0))
    batch = Batch(1, (2,), {}, None, torch.device("cpu"), (0, 0, 0))
    for schedule in (EDM(), EDM(data_std=1.0)):
        method.schedule = schedule
        drawn = torch.tan(method.times("student", batch))
        yield equal(f"the median sigma, data_std {schedule.data_std}", math.exp(-1.2) / 0.5, drawn, 1e-9)
