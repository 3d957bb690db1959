"""Exact checks of sdxs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.distances import dissimilarity
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    differs,
    equal,
    gradient,
    matching_checks,
    mistake,
)
from diffdistill.methods.sdxs import SDXS, Config
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch, Pair

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "student_level": 1.57,
        "time_low": 0.02,
        "time_high": 0.98,
        "boundary": 0.3,
        "boundary_steps": 700,
        "feature_weight": 1.0,
        "normalise": True,
        "steps": 2000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4, 0.1, 1.2]).double(), torch.tensor([0.5, 1.3, 0.9, 0.7]).double()
M, B = torch.tensor([-0.3, 0.5, 0.0, 0.9]).double(), torch.tensor([0.9, 0.6, 1.1, 0.4]).double()
F, BOUNDARY, STEPS = 0.7, 0.4, 10


def verify() -> Iterator[Check]:
    """Matching in closed form, SSIM by its sums, the boundary, and how the turn is put together."""
    yield from matching_checks(lambda parts, normalise: _sdxs(parts, Config(normalise=normalise)))
    yield from _ssim_checks()
    yield from _boundary_checks()
    yield from _turn_checks()


class _Seen(nn.Module):
    """A network with a layer that is what it reads."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seen = network, nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.network(self.seen(x_t), t)


def _teacher(parts: AffineGame) -> Teacher:
    denoiser = parts.teacher.denoiser
    seen = Denoiser(_Seen(denoiser.network), denoiser.schedule, denoiser.output, feature_layer="seen")
    return replace(parts.teacher, denoiser=seen)


def _sdxs(parts: AffineGame, config: Config) -> SDXS:
    method = SDXS(_teacher(parts), config, student=parts.student, fake_score=parts.fake_score)
    only_trains("student", trainable(method.players))
    return method


def _ssim(x: Tensor, y: Tensor, square: Tensor | None = None) -> Tensor:
    """Of two rows of numbers, with L^2 = `square` or y's mean square, by their sums."""
    square = y.square().mean() if square is None else square
    c1, c2 = (k**2 * square for k in (0.01, 0.03))
    n, (m, k) = len(x), (x.mean(), y.mean())
    v, w, both = ((a * b).sum() / n for a, b in ((x - m, x - m), (y - k, y - k), (x - m, y - k)))
    return (2 * m * k + c1) * (2 * both + c2) / ((m**2 + k**2 + c1) * (v + w + c2))


def _ssim_checks() -> Iterator[Check]:
    draw = generator("cpu", 0, "ssim")
    y, x = (torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=draw) + 0.5 for _ in range(2))

    def windowed(b: int, own: bool) -> Tensor:
        """Of a sample's maps, over their windows."""
        parts = []
        for c, i, j in itertools.product(range(3), range(3), range(2)):
            one, other = (z[b, c, i : i + 7, j : j + 7].flatten() for z in (x, y))
            parts.append(_ssim(one, other, None if own else y[b, c].square().mean()))
        return 1 - torch.stack(parts).mean()

    got = dissimilarity(x, y)
    yield equal("alike maps have a distance of 0", 0.0, dissimilarity(y, y), 1e-12, scale=1.0)
    yield equal(
        "SSIM over windows of 7 by 7, by its sums", torch.stack([windowed(b, False) for b in (0, 1)]), got, 1e-9
    )
    yield differs("constants of each window are caught", torch.stack([windowed(b, True) for b in (0, 1)]), got, 1e-6)
    small = dissimilarity(x[:, :1, :4, :7], y[:, :1, :4, :7])
    closed = 1 - torch.stack([_ssim(x[b, 0, :4, :7].flatten(), y[b, 0, :4, :7].flatten()) for b in range(2)])
    yield equal("a map smaller than a window is one", closed, small, 1e-9)
    whole = 1 - torch.stack([_ssim(x[b, 0].flatten(), y[b, 0].flatten()) for b in range(2)])
    vectors = dissimilarity(x[:, 0].flatten(1), y[:, 0].flatten(1))
    yield equal("of vectors, over the vector", whole, vectors, 1e-9)
    yield equal("of other maps, over the whole", whole, dissimilarity(x[:, :1, None], y[:, :1, None]), 1e-9)
    yield differs("a shift of the mean is seen", 0.0, dissimilarity(y + 0.5, y), 1e-3, scale=1.0)
    yield differs("a scale is seen", 0.0, dissimilarity(1.5 * y, y), 1e-3, scale=1.0)


def _game(step: int, scale: Tensor = B) -> tuple[SDXS, AffineGame, Batch]:
    parts = affine_game(MEAN, STD, M, scale)
    options = Config(boundary=BOUNDARY, boundary_steps=STEPS, feature_weight=F, feature_noise=0.2)
    batch = Batch(64, (4,), {}, None, torch.device("cpu"), (0, step, 0))
    z = batch.randn("pair").double()
    return _sdxs(parts, options), parts, replace(batch, pair=Pair(z, MEAN + STD * z, {}))


def _boundary_checks() -> Iterator[Check]:
    """alpha falls in a straight line, and the student's matching has noise above it."""
    method, _, _ = _game(0)
    steps = (0, 3, STEPS, 5 * STEPS)
    closed = torch.tensor([1.0, 1 - 0.3 * (1 - BOUNDARY), BOUNDARY, BOUNDARY]).double()
    yield equal("alpha falls from 1 to its end", closed, torch.tensor([method.alpha(s) for s in steps]), 1e-6)
    at_once = _sdxs(affine_game(MEAN, STD, M, B), Config(boundary=BOUNDARY, boundary_steps=0)).alpha(0)
    yield equal("without steps to fall in it is there at once", BOUNDARY, at_once, 0.0)
    for step in steps:
        method, _, batch = _game(step)
        c, u = method.config, method.schedule.fraction(method.times("student", batch))
        low = c.time_low + method.alpha(step) * (c.time_high - c.time_low)
        span = torch.stack([(u - low).clamp(max=0).min(), (c.time_high - u).clamp(max=0).min()])
        yield equal(f"noise of the matching is above alpha, step {step}", 0.0, span, 1e-6, scale=1.0)
        with mistake(method, "alpha", lambda step: 0.0):
            wrong = method.schedule.fraction(method.times("student", batch)).min() - low
        yield differs(f"noise of the whole range is caught, step {step}", 0.0, wrong.clamp(max=0), 1e-3, scale=1.0)


def _features_of_pairs(method: SDXS, parts: AffineGame, batch: Batch) -> Tensor:
    """The features' term by sums: the layer is what it reads."""
    t, eps = method.schedule.at_fraction(torch.tensor([0.2]).double()), batch.randn("features/eps").double()
    assert batch.pair is not None
    ours, theirs = parts.generator.mean + parts.generator.scale * batch.pair.z, batch.pair.x0
    both = ((torch.cos(t) * x + torch.sin(t) * eps) for x in (ours, theirs))
    return torch.stack([1 - _ssim(a, b) for a, b in zip(*both, strict=True)]).mean()


def _turn_checks() -> Iterator[Check]:
    """The turn's gradient is (1 - alpha) that of the matching and alpha F that of the features."""
    for step in (0, 4, STEPS):
        method, parts, batch = _game(step)
        weights = parts.generator.mean, parts.generator.scale
        x = method.sampler().one_step(batch.randn("z"), {})
        matched = method.matching(x, method.times("student", batch), batch.randn("student/eps"), {}).loss
        alpha = max(BOUNDARY, 1 - (1 - BOUNDARY) * step / STEPS)
        closed = alpha * F * gradient(_features_of_pairs(method, parts, batch), *weights)
        closed = closed + (1 - alpha) * gradient(matched, *weights)
        got = gradient(method.student_turn({}, batch).loss, *weights)
        yield equal(f"the turn's gradient, step {step}", closed, got, 1e-6)
        with mistake(method, "alpha", lambda step, other=0.9 * alpha: other):
            wrong = gradient(method.student_turn({}, batch).loss, *weights)
        yield differs(f"another boundary is caught, step {step}", closed, wrong, 1e-3)
        assert batch.pair is not None
        strange = replace(batch, pair=batch.pair._replace(x0=batch.pair.x0.flip(0)))
        wrong = gradient(method.student_turn({}, strange).loss, *weights)
        yield differs(f"the images of other pairs are caught, step {step}", closed, wrong, 1e-3)
    method, parts, batch = _game(0, STD)
    with torch.no_grad():
        parts.generator.mean.copy_(MEAN)
    at_rest = gradient(method.student_turn({}, batch).loss, parts.generator.mean, parts.generator.scale)
    yield equal("the teacher's own map is at rest", 0.0, at_rest, 1e-9, scale=1.0)
    yield equal("... and its features are alike", 0.0, method.student_turn({}, batch).loss, 1e-9, scale=1.0)
