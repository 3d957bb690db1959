"""Exact checks of pcm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.exact.checks import Check, differs, equal, mistake
from diffdistill.exact.segments import Jumps, edge_checks, fixed_point_checks, loss_checks
from diffdistill.methods.pcm import PCM, Config
from diffdistill.players.teacher import Teacher

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "two phases": {
        "phases": 2,
        "solver_steps": 64,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.001,
        "steps": 2500,
        "student_lr": 0.001,
    },
}

SCALE = 2.5
REAL: dict[str, Any] = {"ends": PCM.ends}


def _made(**options: Any) -> Callable[[Teacher, Denoiser], PCM]:
    config = Config(**{"solver_steps": 6, "phases": 3, "guidance_scale": SCALE, **options})
    return lambda teacher, student: PCM(teacher, config, student=student)


def verify() -> Iterator[Check]:
    """Section 13.9's sanity items, on a guided Gaussian."""
    for phases in (1, 2, 3, 6):
        yield from fixed_point_checks(_made(phases=phases), SCALE, f"{phases} phases")
    for distance in ("l2", "huber"):
        yield from loss_checks(_made(distance=distance, huber_c=0.3), SCALE, distance)
    yield from _edges()
    yield from _sampling()
    yield from edge_checks()


def _edges() -> Iterator[Check]:
    """Also a step that ends at an edge, and one that begins there, jump to the lower edge of their own phase."""
    jumps = Jumps(_made(), SCALE)
    grid = jumps.grid
    ends = torch.stack([jumps.at(i)[2].e[0] for i in range(6)])
    tops = torch.stack([jumps.at(i)[2].top[0] for i in range(6)])
    yield equal("the edges", grid[[2, 2, 4, 4, 6, 6]], ends, 0.0)
    yield equal("the phases' noisiest angles", grid[[0, 0, 2, 2, 4, 4]], tops, 0.0)
    with mistake(PCM, "ends", lambda self, step, i, batch: REAL["ends"](self, step, i + 1 - (i == 5).long(), batch)):
        ends = torch.stack([jumps.at(i)[2].e[0] for i in range(6)])
    yield differs("a step that ends at an edge counted to the phase below is caught", grid[[2, 2, 4, 4, 6, 6]], ends,
                  1e-2)  # fmt: skip
    _, x_r, at = jumps.at(1)
    got = jumps.method.jump(jumps.method.target, x_r, at.r, at.e, jumps.cond)
    yield equal("at the edge the target is x_r itself", x_r, got, 0.0)


def _sampling() -> Iterator[Check]:
    """K steps are all N of the teacher's; without phases to compose they are not."""
    jumps = Jumps(_made(), SCALE)
    jumps.minimise()
    sampler = jumps.method.sampler()
    levels = torch.tensor(sampler.levels, dtype=torch.float64)
    yield equal("it samples at the phases' noisiest angles", jumps.grid[:-1:2], levels, 1e-12)
    x, t = sampler.input_at(2, jumps.z, jumps.cond, lambda j: jumps.z)
    got = sampler.denoiser(x, t, jumps.cond).x0
    x = solve(ddim_step, guided(jumps.teacher.denoiser, SCALE), jumps.z, jumps.grid, jumps.cond)
    closed = jumps.mu + jumps.factor(0, 6) * jumps.z
    yield equal("the teacher's six steps are the product of their factors", closed, x, 1e-10)
    yield equal("three steps of the student are they", closed, got, 1e-10)
    renoised, t = sampler.input_at(0, jumps.z, jumps.cond, lambda j: jumps.z)
    one = sampler.denoiser(renoised, t, jumps.cond).x0
    yield differs("... and one is not", closed, one, 1e-2)
    spread = Config(guidance_scale=3.0, guidance_spread=0.5)
    ends = torch.stack([spread.drawn(torch.tensor(u)) for u in (0.0, 0.5, 1.0)])
    yield equal("scales are drawn on both sides of guidance_scale", torch.tensor([2.5, 3.0, 3.5]), ends, 1e-6)
