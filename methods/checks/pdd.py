"""Exact checks of pdd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.policies import Heads
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import gaussian_teacher, mixture_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.exact.policies import TOP, elsewhere_check, loss_at, noise
from diffdistill.methods.pdd import PDD, Config
from diffdistill.players.policy import PolicyDenoiser, PolicySettings
from diffdistill.players.teacher import Teacher

_SHARED = {"student_lr": 0.002, "guidance_scale": 1.5, "intervals": 32, "states": 4}
# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one pass": {**_SHARED, "student_steps": 1, "steps": 800},
    "two or four passes": {**_SHARED, "student_steps": 2, "more_steps": (4,), "steps": 800},
}

N, STD = 16, 0.4
MEANS = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.2, 1.2]]).double()
WEIGHTS = torch.tensor([0.5, 0.3, 0.2]).double()
NODES = TOP * (1 - torch.arange(N + 1).double() / N)


class TeachersSteps(nn.Module):
    """At each head what the teacher's steps are from there on, as v; a step is several of the teacher's, or one."""

    def __init__(self, teacher: Teacher, solver_steps: int):
        super().__init__()
        self.denoise, self.solver_steps = teacher.denoiser, solver_steps
        self.offset = nn.Parameter(torch.zeros(N, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2 N) the heads' v, one after another; what comes before t is zero."""
        said, x = [], x_t
        for k in range(N):
            way = NODES[k] - NODES[k + 1]
            grid = NODES[k] - way * torch.arange(self.solver_steps + 1) / self.solver_steps
            end = solve(ddim_step, self.denoise, x, grid, {})
            v = (torch.cos(way) * x - end) / torch.sin(way) + self.offset[k]
            ahead = (NODES[k] <= t + 1e-9)[:, None]
            said.append(torch.where(ahead, v, 0.0))
            x = torch.where(ahead, torch.cos(way) * x - torch.sin(way) * v, x)
        return torch.cat(said, 1)


class Multiples(nn.Module):
    """Each head's v is a multiple of x_t."""

    def __init__(self, factors: Tensor):
        super().__init__()
        self.factors = nn.Parameter(factors.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2 N)."""
        return (self.factors[:, None] * x_t[:, None]).flatten(1)


def _game(teacher: Teacher, network: nn.Module, **options: Any) -> PDD:
    config = Config(**{"student_steps": 2, "intervals": N, **options})
    plain = Denoiser(network, teacher.denoiser.schedule, OUTPUTS["v_prediction"])
    settings = PolicySettings("heads", N, 1, config.passes)
    return PDD(teacher, config, student=PolicyDenoiser(plain, network, settings, NODES[:-1]))


def _exact(**options: Any) -> PDD:
    teacher = mixture_teacher(MEANS, STD, WEIGHTS)
    return _game(teacher, TeachersSteps(teacher, options.get("solver_steps", 1)), **options)


def verify() -> Iterator[Check]:
    """A pass makes the teacher's own steps, there and nowhere else there is no loss, and it is a closed form."""
    yield from _sampling_checks()
    yield from _rest_checks()
    yield from _linear_checks()


def _drawn(game: PDD, z: Tensor, passes: int) -> Tensor:
    sampler = game.in_passes(passes)
    x, t = sampler.input_at(passes - 1, z, {}, lambda j: z)
    return sampler.denoiser(x, t, {}).x0


def _sampling_checks() -> Iterator[Check]:
    """Whatever the number of passes: the teacher's N steps, or N times as many."""
    z = noise()
    for several in (1, 3):
        game = _exact(solver_steps=several)
        grid = TOP * (1 - torch.arange(several * N + 1).double() / (several * N))
        closed = solve(ddim_step, mixture_teacher(MEANS, STD, WEIGHTS).denoiser, z, grid, {})
        for passes in (1, 2, 4, 8, 16):
            name = f"{passes} passes are the teacher's {several * N} steps"
            yield equal(name, closed, _drawn(game, z, passes), 1e-10)
    fewer = _drawn(_exact(), z, 2)
    yield differs("a third of the steps is caught", closed, fewer, 1e-3)


def _rest_checks() -> Iterator[Check]:
    """The exact heads have no loss and no gradient, in every pass; the noise is in single precision."""
    for step in range(2):
        for options in ({}, {"more_steps": (4, 1)}, {"states": 3}, {"solver_steps": 3}):
            game = _exact(**options)
            loss = loss_at(game, step)
            name = f"step {step}, {options or 'two passes'}"
            yield equal(f"the loss of exact heads, {name}", 0.0, loss, 1e-11, scale=1.0)
            slope = gradient(loss, game.student.network.offset)
            yield equal(f"... and its gradient, {name}", 0.0, slope, 1e-6, scale=1.0)
    yield elsewhere_check(_exact())
    game = _exact(solver_steps=3)
    game.student.network.solver_steps = 1
    yield differs("one step for three is caught", 0.0, loss_at(game), 1e-5, scale=1.0)
    game = _exact()
    with mistake(Heads, "roll", lambda self, x, t, r, steps: x):
        yield differs("states that stay where the pass began are caught", 0.0, loss_at(game), 1e-3, scale=1.0)


def _linear_checks() -> Iterator[Check]:
    """Heads that are multiples of x_t, for a Gaussian teacher, whose v is one: all is a recursion of numbers."""
    std = 0.6
    teacher = gaussian_teacher([0.0, 0.0], std)
    cos, sin = torch.cos(NODES[:-1]), torch.sin(NODES[:-1])
    g = sin * cos * (1 - std**2) / (cos**2 * std**2 + sin**2)  # v = g x
    c, s = torch.cos(NODES.diff()), torch.sin(-NODES.diff())

    def states(factors: Tensor) -> Tensor:
        """(N,) x at each head, as multiples of the noise."""
        x = [torch.ones((), dtype=torch.float64)]
        for k in range(N - 1):
            x.append(c[k] * x[-1] - s[k] * factors[k])
        return torch.stack(x)

    def closed(factors: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in the factors, states held."""
        off, size = factors - g * states(factors), noise().square().mean()
        return size * off.square().mean(), 2 * size * off / N

    own = [torch.ones((), dtype=torch.float64)]
    for k in range(N - 1):
        own.append((c[k] - s[k] * g[k]) * own[-1])
    exact = g * torch.stack(own)
    tilted = exact + 0.3 * torch.linspace(-1, 1, N).double() ** 2
    for name, factors in (("the optimum", exact), ("tilted heads", tilted)):
        game = _game(teacher, Multiples(factors), student_steps=1)
        loss, slope = closed(factors)
        got = loss_at(game)
        yield equal(f"the loss of {name}", loss, got, 1e-6, scale=1e-3)
        yield equal(f"the gradient of {name}", slope, gradient(got, game.student.network.factors), 1e-6, scale=0.1)
    with mistake(torch, "no_grad", nullcontext):
        through = gradient(loss_at(game), game.student.network.factors)
        yield differs("a gradient through the states is caught", slope, through, 1e-2)

    def along(self: Any, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        """Where the teacher's own steps lead."""
        first, last = (int((NODES - angle[0]).abs().argmin()) for angle in (t, r))
        return solve(ddim_step, teacher.denoiser, x, NODES[first : last + 1], {}) if first < last else x

    with mistake(Heads, "roll", along):
        yield differs("states of the teacher for the student's are caught", loss, loss_at(game), 1e-2)
    # One head for all steps: states are p + h q, and the best h of a parabola has a loss.
    p, q = states(torch.zeros(N).double()), states(torch.ones(N).double()) - states(torch.zeros(N).double())
    best = ((g * p) * (1 - g * q)).sum() / (1 - g * q).square().sum()
    game = _game(teacher, Multiples(best.expand(N)), student_steps=1)
    least = closed(best.expand(N))[0]
    yield equal("the least loss of one head for all steps", least, loss_at(game), 1e-6)
    yield differs("... which is not none", 0.0, loss_at(game), 1e-3, scale=1.0)
