"""Exact checks of perflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import OUTPUTS, Prediction, diffuse
from diffdistill.core.schedule import student_grid
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient, mistake
from diffdistill.methods.perflow import Config, PeRFlow
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "32 windows": {  # lines cross in the plane: with two windows a third of the spread is lost, with 16 a fourteenth
        "windows": 32,
        "student_steps": 32,
        "solver_steps": 2,
        "loss": "v",
        "guidance_scale": 1.5,
        "label_dropout": 0.0,
        "steps": 2500,
        "student_lr": 0.001,
    },
}

MEANS, STD = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
SCALE = 2.5
REAL: dict[str, Any] = {"line": PeRFlow.line, "solved": PeRFlow.solved}


class Windows(nn.Module):
    """The velocity of the lines that are straight in each window, for a Gaussian teacher's DDIM steps in it.

    In a window x - cos mu is a multiple of that at its beginning, y: x0 = mu + alpha y and eps = beta y.
    """

    def __init__(self, edges: Tensor, factors: Tensor, mu: Tensor):
        super().__init__()
        self.edges, self.factors, self.mu = edges, factors, nn.Parameter(mu.clone())

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 2) v."""
        window = ((self.edges[None, 1:-1] >= t[:, None] - 1e-12).sum(1)).clamp(max=len(self.factors) - 1)
        s, e, k = self.edges[window][:, None], self.edges[window + 1][:, None], self.factors[window]
        alpha = (torch.sin(s) * k - torch.sin(e)) / torch.sin(s - e)
        beta = (torch.cos(e) - torch.cos(s) * k) / torch.sin(s - e)
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        y = (x_t - cos * self.mu) / (cos * alpha + sin * beta)
        return cos * beta * y - sin * (self.mu + alpha * y)


class _Game:
    """A guided teacher, and the student that is straight in each of its windows."""

    def __init__(self, windows: int = 3, solver_steps: int = 2, scale: float = SCALE, **options: Any):
        self.teacher = class_gaussians_teacher(MEANS, STD)
        schedule = self.teacher.denoiser.schedule
        self.mu = MEANS[1] + scale * (MEANS[0] - MEANS[1])
        grid = student_grid(schedule, windows * solver_steps)
        cos, sin = torch.cos(grid)[:, None], torch.sin(grid)[:, None]
        each = (cos[1:] * cos[:-1] * STD**2 + sin[1:] * sin[:-1]) / (cos[:-1] ** 2 * STD**2 + sin[:-1] ** 2)
        self.factors = torch.stack([part.prod(0) for part in each.split(solver_steps)])
        self.edges = grid[::solver_steps]
        network = Windows(self.edges, self.factors, self.mu)
        own: dict[str, Any] = {"windows": windows, "solver_steps": solver_steps, "student_steps": windows}
        student = Denoiser(network, schedule, OUTPUTS["v_prediction"])
        self.method = PeRFlow(self.teacher, Config(guidance_scale=scale, **own, **options), student=student)

    def batch(self, n: int = 64, label: int = 0) -> Batch:
        x0 = MEANS[0] + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        cond = {"class_labels": torch.full((n,), label)}
        return Batch(n, (2,), cond, x0, torch.device("cpu"), (0, 2, 0))

    def loss(self) -> Tensor:
        return self.method.turns(0)[0].loss(self.batch()).loss


def verify() -> Iterator[Check]:
    """Section 13.17's sanity items, on a guided Gaussian."""
    yield from _lines()
    yield from _straight()
    yield from _sampling()
    yield from _dropped()


def _lines() -> Iterator[Check]:
    """The line goes through both ends of its window, the lower of which the teacher's steps lead to."""
    game = _Game()
    batch = game.batch(200)
    line = game.method.line(0, batch)
    window = batch.integers(3, "student/window")
    s, e = game.edges[window], game.edges[window + 1]
    x_s = diffuse(batch.images, s, batch.randn("student/eps"))
    x_e = torch.cos(e)[:, None] * game.mu + game.factors[window] * (x_s - torch.cos(s)[:, None] * game.mu)
    yield equal("at its beginning it is the noised data", x_s, diffuse(line.x0, s, line.eps), 1e-12)
    yield equal("at its end it is where the teacher's steps lead", x_e, diffuse(line.x0, e, line.eps), 1e-10)
    step = Prediction(x_s, s, line.eps, torch.zeros_like(s), torch.ones_like(s))
    ahead = s < math.pi / 2 - 1e-6  # where the noise says what the data are
    yield equal("one DDIM step with its noise is all of them", x_e[ahead], step.at(e)[ahead], 1e-9)
    inside = float(((line.t <= s) & (line.t >= e)).all())
    yield equal("t lies in the window", 1.0, inside, 0.0)
    share = (s - line.t) / (s - e)
    later = share > 1e-9
    yield equal("... half of them at its beginning", 0.5, float(later.double().mean()), 0.1)
    moments = torch.stack([share[later].mean(), share[later].std()])
    yield equal("... and the others uniformly", torch.tensor([0.5, 12**-0.5]), moments, 0.1)
    for name, attribute, value in (
        ("unguided steps", "guided", game.method.teacher),
        ("a teacher asked at another level", "guided", at_half_the_angle(game.method.guided)),
    ):
        with mistake(game.method, attribute, value):
            wrong = game.method.line(0, batch)
        yield differs(f"{name} are caught", x_e, diffuse(wrong.x0, e, wrong.eps), 1e-2)


def _straight() -> Iterator[Check]:
    """The student that is straight in each window has no loss, and the teacher itself has."""
    for kind in ("v", "velocity", "epsilon"):
        game = _Game(loss=kind)
        loss = game.loss()
        yield equal(f"straight windows have no loss, {kind}", 0.0, loss, 1e-16, scale=1.0)
        slope = gradient(loss, *game.method.student.parameters())
        yield equal(f"... and no gradient, {kind}", 0.0, slope, 1e-7, scale=1.0)
        with torch.no_grad():
            game.method.student.network.mu.add_(0.1)  # type: ignore[operator]
        line = game.method.line(0, game.batch())
        said = game.method.student(diffuse(line.x0, line.t, line.eps), line.t, line.cond)
        gaps = {"v": said.v - (torch.cos(line.t)[:, None] * line.eps - torch.sin(line.t)[:, None] * line.x0),
                "velocity": said.eps - said.x0 - line.eps + line.x0, "epsilon": said.eps - line.eps}  # fmt: skip
        yield equal(f"the loss of another one, {kind}", gaps[kind].square().mean(), game.loss(), 1e-12)
        game.method.student = guided(game.teacher.denoiser, SCALE)  # type: ignore[assignment]
        yield differs(f"the teacher's flow is not straight, {kind}", 0.0, game.loss(), 1e-4, scale=1.0)
        game = _Game(loss=kind)
        other = lambda self, x, window, cond: REAL["solved"](self, x, window, cond).flip(0)  # noqa: E731
        with mistake(PeRFlow, "solved", other):
            yield differs(f"ends of other samples are caught, {kind}", 0.0, game.loss(), 1e-2, scale=1.0)


def _sampling() -> Iterator[Check]:
    """One step a window, or two, are all of the teacher's; without windows to fit they are not."""
    game = _Game()
    z, cond = game.batch().randn("z").double(), game.batch().cond
    grid = student_grid(game.method.schedule, 6)
    closed = solve(ddim_step, guided(game.teacher.denoiser, SCALE), z, grid, cond)
    product = game.mu + game.factors.prod(0) * z
    yield equal("the teacher's six steps are the product of their factors", product, closed, 1e-10)
    for steps in (3, 6):
        game.method.in_steps(steps)
        sampler = game.method.sampler()
        x, t = sampler.input_at(steps - 1, z, cond, lambda j: z)
        yield equal(f"{steps} steps of the student are they", closed, sampler.denoiser(x, t, cond).x0, 1e-10)
    one = game.method.student(z, torch.full((len(z),), math.pi / 2).double(), cond).x0
    yield differs("... and one is not", closed, one, 1e-2)


def _dropped() -> Iterator[Check]:
    """A share of samples has no condition, the teacher's steps and the student's alike."""
    game = _Game(scale=1.0, label_dropout=0.3)
    labels = game.method.line(0, game.batch(2000)).cond["class_labels"]
    yield equal("the share of samples without a condition", 0.3, labels.double().mean(), 0.1)
    batch = game.batch(200)
    line = game.method.line(0, batch)
    window = batch.integers(3, "student/window")
    s, e = game.edges[window], game.edges[window + 1]
    mu = MEANS[line.cond["class_labels"]]
    x_s = diffuse(batch.images, s, batch.randn("student/eps"))
    x_e = torch.cos(e)[:, None] * mu + game.factors[window] * (x_s - torch.cos(s)[:, None] * mu)
    yield equal("the teacher follows the condition that the student has", x_e, diffuse(line.x0, e, line.eps), 1e-10)
