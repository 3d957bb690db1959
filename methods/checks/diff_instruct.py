"""Exact checks of diff_instruct."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import EDM
from diffdistill.core.times import edm_log_normal
from diffdistill.exact.checks import AffineGame, Check, affine_game, differs, equal, gradient, two_points
from diffdistill.methods.diff_instruct import Config, DiffInstruct
from diffdistill.players.teacher import only_trains, trainable

# How it is trained in the plane, where its student must reach the limits of exact/plane.py.
PLANE = {"student_lr": 0.001, "fake_score_lr": 0.002, "student_level": 1.373, "steps": 2000}


def verify() -> Iterator[Check]:
    """Distribution matching with the weight sigma^2, on Gaussians whose every quantity is known."""
    mu, s = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)
    m, b = torch.tensor([-0.3, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.6], dtype=torch.float64)

    def game(mean: Tensor, scale: Tensor, ratio: int = 1) -> tuple[DiffInstruct, AffineGame]:
        parts = affine_game(mu, s, mean, scale)
        config = Config(update_ratio=ratio)
        method = DiffInstruct(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
        only_trains("student", trainable(method.players))
        return method, parts

    def slope(method: DiffInstruct, parts: AffineGame, z: Tensor, angle: Tensor, eps: Tensor) -> Tensor:
        """The gradient in (mean, scale), times 2: the loss is a mean over two dimensions, the divergence a sum."""
        loss = 2 * method.matching(method.sampler().one_step(z, {}), angle, eps, {}).loss
        return gradient(loss, parts.generator.mean, parts.generator.scale)

    z, eps = two_points(2)  # everything here has degree 2
    expected = []
    levels = (0.2, 0.8, 1.4)
    for t in levels:
        angle = torch.full((len(z),), t, dtype=torch.float64)
        sigma = math.tan(t)
        # KL between N(m, b^2 + sigma^2) and N(mu, s^2 + sigma^2), which is EDM's x + sigma eps
        wide, narrow = s**2 + sigma**2, b**2 + sigma**2
        kl = torch.cat([(m - mu) / wide, b * (1 / wide - 1 / narrow)])
        expected.append(sigma**2 * kl)
        method, parts = game(m, b)
        got = slope(method, parts, z, angle, eps)
        yield equal(f"sigma^2 times the gradient of KL(q_t || p_t), t = {t}", expected[-1], got, 1e-9)
        yield differs(f"the opposite sign is caught, t = {t}", expected[-1], -got, 1e-3)
        yield differs(f"the weight 1 is caught, t = {t}", kl, got, 1e-2)
        through = 2 * _through_both_networks(method, z, angle, eps)
        wrong = gradient(through, parts.generator.mean, parts.generator.scale)
        yield differs(f"a gradient through the two networks is caught, t = {t}", expected[-1], wrong, 1e-2)

        big_u = math.cos(t) ** 2 * b**2 + math.sin(t) ** 2
        rate = math.cos(t) * math.sin(t) * (1 - b**2) / big_u  # of the exact velocity
        residual = (b * (rate * math.cos(t) + math.sin(t))) ** 2 + (rate * math.sin(t) - math.cos(t)) ** 2
        denoising = method.denoising(method.sampler().one_step(z, {}), angle, eps, {})
        yield equal(f"the fake score's loss at its optimum, t = {t}", residual.mean(), denoising, 1e-9)
        at_optimum = gradient(denoising, parts.score.means, parts.score.stds)
        yield equal(f"its gradient there is zero, t = {t}", 0.0, at_optimum, 1e-9, scale=1.0)

        settled, parts = game(mu, s)
        zero = slope(settled, parts, z, angle, eps)
        yield equal(f"zero at the optimum, t = {t}", 0.0, zero, 1e-9, scale=1.0)

    method, parts = game(m, b)
    mixed = torch.tensor(levels, dtype=torch.float64).repeat_interleave(len(z))
    total = slope(method, parts, z.repeat(len(levels), 1), mixed, eps.repeat(len(levels), 1))
    yield equal("the mean over levels is the integral's gradient", torch.stack(expected).mean(0), total, 1e-9)

    for schedule in (EDM(), EDM(data_std=1.0)):
        drawn = torch.tan(edm_log_normal(schedule, 1, torch.Generator(), -1.2, 0.0))
        yield equal(f"the median sigma, data_std {schedule.data_std}", math.exp(-1.2) / 0.5, drawn, 1e-9)
    for ratio in (1, 3):
        method, _ = game(m, b, ratio)
        order = [[turn.player for turn in method.turns(k)] for k in range(2 * ratio)]
        wanted = [(["student"] if k % ratio == 0 else []) + ["fake_score"] for k in range(2 * ratio)]
        yield equal(f"order of turns, update_ratio {ratio}", 1.0, float(order == wanted), 0.0)


def _through_both_networks(method: DiffInstruct, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The mistake of leaving both networks in the graph: the same loss without its stop-gradients."""
    x = method.sampler().one_step(z, {})
    x_t = diffuse(x, t, eps)
    return ((method.fake_score(x_t, t, {}).x0 - method.teacher(x_t, t, {}).x0) * x).mean()
