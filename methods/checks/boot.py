"""Exact checks of boot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import AffinePerAngle, class_gaussians_teacher
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient, mistake, two_points
from diffdistill.methods.boot import Boot, Config
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "no images": {
        "solver_steps": 64,
        "ramp_steps": 1000,
        "guidance_scale": 1.5,
        "steps": 4000,
        "student_lr": 0.002,
    },
}

MEANS, STD = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
SCALE = 2.5
REAL: dict[str, Any] = {"target": Boot.target, "y": Boot.y}


def _told(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
    return network(x, extra.r)


class _Game:
    """A guided Gaussian teacher; the student's y_s is affine in the noise, with coefficients of its own at each s."""

    def __init__(self, **options: Any):
        self.teacher = class_gaussians_teacher(MEANS, STD)
        self.mu = MEANS[1] + SCALE * (MEANS[0] - MEANS[1])
        own: dict[str, Any] = {"solver_steps": 6, "guidance_scale": SCALE, **options}
        schedule = self.teacher.denoiser.schedule
        n = own["solver_steps"]
        self.affine = AffinePerAngle(torch.linspace(math.pi / 2, 0, n + 1, dtype=torch.float64)[1:], 2)
        student = Denoiser(self.affine, schedule, OUTPUTS["sample"], extra_call=_told)
        self.method = Boot(self.teacher, Config(**own), student=student)
        self.grid = self.method.grid
        self.z, _ = two_points(2)
        self.cond = {"class_labels": torch.zeros(len(self.z), dtype=torch.int64)}

    def at(self, i: int) -> tuple[Tensor, Tensor]:
        return self.grid[i].expand(len(self.z)), self.grid[i + 1].expand(len(self.z))

    def minimise(self) -> None:
        """Fits y to its target, from noise downwards."""
        for i in range(len(self.grid) - 1):
            self.affine.fit(i, self.z, self.method.target(self.z, *self.at(i), self.cond))

    def states(self) -> list[Tensor]:
        """x at each angle of the grid, by the teacher's steps from the noise."""
        denoise, x = guided(self.teacher.denoiser, SCALE), self.z
        states = [x]
        for i in range(len(self.grid) - 1):
            states.append(ddim_step(denoise, states[-1], *self.at(i), self.cond))
        return states


def verify() -> Iterator[Check]:
    """Section 7.7's sanity items, and the mistakes that they must catch."""
    yield from _fixed_point()
    yield from _loss()
    yield from _ramp()


def _fixed_point() -> Iterator[Check]:
    """y is the signal of the teacher's own DDIM trajectory, exactly, and tends to that of the ODE."""
    game = _Game()
    game.minimise()
    states = game.states()
    for i in range(6):
        _, s = game.at(i)
        signal = (states[i + 1] - torch.sin(s)[:, None] * game.z) / torch.cos(s)[:, None]
        yield equal(f"y after {i + 1} steps is the signal of the teacher's state", signal,
                    game.method.y(game.z, s, game.cond), 1e-10)  # fmt: skip
    first = game.method.target(game.z, *game.at(0), game.cond)
    said = guided(game.teacher.denoiser, SCALE)(game.z, game.at(0)[0], game.cond).x0
    yield equal("from pure noise it is what the teacher says of it", said, first, 1e-12)
    end = game.method.y(game.z, torch.zeros(len(game.z)).double(), game.cond)
    whole = solve(ddim_step, guided(game.teacher.denoiser, SCALE), game.z, game.grid, game.cond)
    yield equal("y_0 is the sample of the teacher's six steps", whole, end, 1e-10)
    for name, wrong in (
        ("a teacher that is not guided", game.teacher.denoiser),
        ("a teacher asked at another level", at_half_the_angle(guided(game.teacher.denoiser, SCALE))),
    ):
        other = _Game()
        with mistake(other.method, "teacher", wrong):
            other.minimise()
        got = other.method.y(game.z, torch.zeros(len(game.z)).double(), game.cond)
        yield differs(f"{name} is caught", whole, got, 1e-2)
    errors = []
    for steps in (50, 100):
        fine = _Game(solver_steps=steps)
        fine.minimise()
        got = fine.method.y(fine.z, torch.zeros(len(fine.z)).double(), fine.cond)
        errors.append((got - fine.mu - STD * fine.z).norm())
    yield equal("it tends to mu + s eps with order 1", 1.0, torch.log2(errors[0] / errors[1]), 0.05)


def _loss() -> Iterator[Check]:
    """Value and gradient against their closed forms, at random parameters."""
    game, draw = _Game(), torch.Generator().manual_seed(0)
    for p in game.affine.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    n = 400
    cond = {"class_labels": torch.zeros(n, dtype=torch.int64)}
    batch = Batch(n, (2,), cond, None, torch.device("cpu"), (0, 0, 0))
    i, z = (batch.uniform("student/t") * 6).long(), batch.randn("z").double()
    slope, offset = game.affine.slope, game.affine.offset
    with torch.no_grad():
        t, s, before = game.grid[i], game.grid[i + 1], (i - 1).clamp_min(0)
        y_t = torch.where((i == 0)[:, None], 0.0, slope[before] * z + offset[before])
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        x_t = cos * y_t + sin * z
        d = game.mu + cos * STD**2 / (cos**2 * STD**2 + sin**2) * (x_t - cos * game.mu)
        k = (torch.tan(s) / torch.tan(t))[:, None]
        gap = slope[i] * z + offset[i] - (1 - k) * d - k * y_t
        expected = torch.zeros(2, 6, 2, dtype=torch.float64)
        expected[0].index_add_(0, i, gap * z / n)
        expected[1].index_add_(0, i, gap / n)
    loss = game.method.turns(0)[0].loss(batch).loss
    yield equal("the loss", gap.square().mean(), loss, 1e-6)
    yield equal("its gradient, through y_s alone", expected, gradient(loss, slope, offset), 1e-6)
    through = lambda self, *at: REAL["target"].__wrapped__(self, *at)  # noqa: E731
    with mistake(torch, "no_grad", nullcontext), mistake(Boot, "target", through):
        slopes = gradient(game.method.turns(0)[0].loss(batch).loss, slope, offset)
    yield differs("a gradient through the target is caught", expected, slopes, 1e-3)
    late = lambda self, x, t, s, cond: REAL["target"](self, x, t, t, cond)  # noqa: E731
    with mistake(Boot, "target", late):
        slopes = gradient(game.method.turns(0)[0].loss(batch).loss, slope, offset)
    yield differs("a target that stays at t is caught", expected, slopes, 1e-3)


def _ramp() -> Iterator[Check]:
    """The grid opens from noise downwards."""
    method = _Game(ramp_steps=12).method
    steps = torch.tensor([method.open_steps(k) for k in (0, 2, 6, 11, 12, 99)])
    yield equal("steps that are trained", torch.tensor([1, 1, 3, 5, 6, 6]), steps, 0.0)
    seen: list[Tensor] = []
    batch = Batch(
        200, (2,), {"class_labels": torch.zeros(200, dtype=torch.int64)}, None, torch.device("cpu"), (0, 6, 0)
    )

    def watched(self: Boot, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        seen.append(t)
        return REAL["target"](self, x, t, s, cond)

    with mistake(Boot, "target", watched):
        method.turns(6)[0].loss(batch)
    yield equal("at half of it, the noisier half", method.grid[:3].flip(0), seen[0].unique(), 1e-12)
