"""Exact checks of a step's target by way of a point inside of it, on a Gaussian whose every step is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step, inverse_ddim
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.core.schedule import student_levels
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.options import MidpointOptions
from diffdistill.players.teacher import trainable_copy
from diffdistill.scaffold import matching
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome

MU, S, WEIGHT, C = 0.7, 0.5, 0.3, 0.001
"""A teacher N(mu, s^2), the weight of the target, c of its Huber distance."""

FAR = torch.tensor([-1.3, -0.4, 0.2, 1.1], dtype=torch.float64)
"""Of the samples, from the mean of x_t."""


def spread(t: Tensor) -> Tensor:
    """The standard deviation of x_t."""
    return (torch.cos(t) ** 2 * S**2 + torch.sin(t) ** 2).sqrt()


def exact_step(t: Tensor, s: Tensor) -> Tensor:
    """What multiplies x_t - cos(t) mu on the trajectory from t to s."""
    return spread(s) / spread(t)


def euler_step(t: Tensor, s: Tensor) -> Tensor:
    """The same of one DDIM step of the exact teacher."""
    gain = torch.cos(t) * S**2 / spread(t) ** 2
    return (torch.cos(s) - torch.sin(s) / torch.tan(t)) * gain + torch.sin(s) / torch.sin(t)


class ExactSteps(nn.Module):
    """The x0 with which a DDIM step from any angle to the end of its segment is exact, for TrigFlow.

    `angles` (n,) are the segments' beginnings, descending; they end at the next one's, the last at 0. `off` (2,) adds
    that share of x_t - cos(t) mu to x0, at the beginnings and elsewhere.
    """

    ends: Tensor

    def __init__(self, angles: Tensor):
        super().__init__()
        self.register_buffer("ends", torch.cat([angles.double(), torch.zeros(1, dtype=torch.float64)]))
        self.off = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 1) x0 at x_t (B, 1) and the angles t (B,)."""
        at = (t[:, None] - self.ends).abs().min(1).values < 1e-9
        s = torch.where(self.ends < t[:, None] - 1e-9, self.ends, 0.0).max(1).values
        far = x_t - torch.cos(t)[:, None] * MU
        x_s = torch.cos(s)[:, None] * MU + exact_step(t, s)[:, None] * far
        return inverse_ddim(x_s, x_t, t, s) + torch.where(at, self.off[0], self.off[1])[:, None] * far


class _Game:
    """The k-th of n steps of an exact student, from t to s, and the target of them with all points at t_m."""

    def __init__(self, method: Callable[..., MatchingMethod], config: Callable[..., MidpointOptions], n: int, k: int):
        teacher = gaussian_teacher([MU], S)
        schedule = teacher.denoiser.schedule
        angles = schedule.angle(student_levels(schedule, n))
        self.network = ExactSteps(angles)
        student = Denoiser(self.network, schedule, OUTPUTS["sample"])
        options = config(student_steps=n, midpoint_weight=WEIGHT, update_ratio=1)
        self.method = method(teacher, options, student=student, fake_score=trainable_copy(teacher.denoiser))
        self.t, self.s = (end.double() for end in torch.cat([angles, torch.zeros(1)])[k : k + 2])
        batches = [Batch(4, (1,), {}, None, torch.device("cpu"), (0, step, 0)) for step in range(64)]
        # Where no step trains the k-th level, another's batch stands for it, and its checks do not hold.
        self.batch = next((batch for batch in batches if self.method.level(batch) == k), batches[0])

    def outcome(self, t_m: Tensor, far: Tensor) -> Outcome:
        """With t_m (B,) for samples that are `far` (B,) from the mean."""
        t = self.t.expand(len(far))
        with mistake(self.method, "midpoints", lambda t, s, batch: t_m.expand(len(far))):
            predicted: Prediction = self.method.student((torch.cos(t) * MU + far)[:, None], t, {})
            return self.method.with_midpoint(Outcome(torch.zeros(()).double()), predicted, self.batch)

    def loss(self, t_m: Tensor) -> Tensor:
        return self.outcome(t_m, FAR).loss

    def slopes(self, t_m: Tensor, far: Tensor) -> Tensor:
        """(2,) in what is off."""
        return gradient(self.outcome(t_m, far).loss, self.network.off)


def midpoint_checks(method: Callable[..., MatchingMethod], config: Callable[..., MidpointOptions]) -> Iterator[Check]:
    """The target's size and gradient by Euler's error of the teacher's step, its limits, and the bias that it has."""
    make = partial(_Game, method, config)
    for n, k, way in ((1, 0, 0.4), (2, 0, 0.5), (2, 1, 0.3)):
        yield from _target_checks(make(n, k), way, f"step {k + 1} of {n}")
    yield from _place_checks(make(2, 0))
    for n in (1, 2, 4):
        yield _bias_check(make(n, 0), n)


def _target_checks(game: _Game, way: float, name: str) -> Iterator[Check]:
    t, s, method = game.t, game.s, game.method
    t_m = torch.lerp(t, s, way)
    error = (euler_step(t, t_m) * exact_step(t_m, s) - exact_step(t, s)) * FAR
    size = (torch.sqrt(error**2 + C**2) - C).mean()
    yield equal(
        f"the target is off by Euler's error of the teacher's step, {name}", WEIGHT * size, game.loss(t_m), 1e-9
    )
    moved = torch.sin(t - s) / torch.sin(t)  # of x_s by x0
    closed = torch.stack(
        [-(error / torch.sqrt(error**2 + C**2) * FAR).mean() * moved * WEIGHT, torch.zeros(()).double()]
    )
    yield equal(f"its gradient is in the student's own step alone, {name}", closed, game.slopes(t_m, FAR), 1e-9)
    with mistake(torch, "no_grad", nullcontext):
        yield differs(f"a gradient of the target is caught, {name}", closed, game.slopes(t_m, FAR), 1e-3)
    for wrong, mistaken in (
        ("the student in the teacher's place", mistake(method, "followed", method.student)),
        (
            "another end of the steps",
            mistake(matching, "ddim_step", lambda d, x, a, b, c: ddim_step(d, x, a, 0.9 * b, c)),
        ),
    ):
        with mistaken:
            yield differs(f"{wrong} is caught, {name}", WEIGHT * size, game.loss(t_m), 1e-3)
    ratio = game.loss(t - 0.01) / game.loss(t - 0.005)  # of squares, where errors are below c
    yield equal(f"it goes to zero with the teacher's step, by 16 for its half, {name}", 16.0, ratio, 0.1)

    def exact(denoise: object, x: Tensor, a: Tensor, b: Tensor, cond: object) -> Tensor:
        return torch.cos(b)[:, None] * MU + exact_step(a, b)[:, None] * (x - torch.cos(a)[:, None] * MU)

    with mistake(matching, "ddim_step", exact):
        yield equal(f"and is zero where the teacher's step is exact, {name}", 0.0, game.loss(t_m), 1e-9, scale=1.0)


def _place_checks(game: _Game) -> Iterator[Check]:
    """Where the point inside lies, here in fractions of the greatest angle."""
    batch = Batch(4096, (1,), {}, None, torch.device("cpu"), (0, 0, 0))
    t, s = (end.expand(4096) for end in (game.t, game.s))
    t_m, top = game.method.midpoints(t, s, batch), game.method.schedule.t_max
    margin = game.method.config.midpoint_margin * top
    ends = torch.stack([t_m.min() - game.s, game.t - t_m.max()])
    yield equal("points lie from a margin above the end to one below the beginning", margin, ends, 0.02)
    yield equal("and evenly", (game.t + game.s) / 2, t_m.mean(), 0.02)
    near = game.method.midpoints(s + 0.01, s, batch)
    yield equal("in a step shorter than two margins it is the middle", s + 0.005, near, 1e-9)


def _bias_check(game: _Game, n: int) -> Check:
    """An exact student does not stay: of all targets its first step comes to the median, that of the middle.

    Given in parts of what one step of the teacher's is off by, from the first of n levels to the second.
    """
    t, s = game.t, game.s
    t_m = torch.lerp(t, s, (torch.arange(64).double() + 0.5) / 64)
    far = torch.ones_like(t_m)
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        game.network.off.data[0] = middle
        low, high = (low, middle) if game.slopes(t_m, far)[0] > 0 else (middle, high)
    bias = game.network.off.data[0] * torch.sin(t - s) / torch.sin(t)
    between = torch.lerp(t, s, 0.5)
    whole = euler_step(t, s) - exact_step(t, s)
    closed = (euler_step(t, between) * exact_step(between, s) - exact_step(t, s)) / whole
    # c rounds the median off, the more the nearer to it the errors are.
    return equal(f"its bias is {float(closed):.0%} of one step's of the teacher: {n} steps", closed, bias / whole, 5e-2)
