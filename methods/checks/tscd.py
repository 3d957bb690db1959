"""Exact checks of tscd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffdistill.core.denoiser import Denoiser
from diffdistill.exact.checks import Check, differs, equal, mistake
from diffdistill.exact.segments import Jumps, edge_checks, fixed_point_checks, loss_checks, reward_checks
from diffdistill.methods.tscd import TSCD, Config
from diffdistill.players.sampler import DDIM, Renoise
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Outcome

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "stages": "4, 2, 1",
        "stage_steps": 1000,
        "solver_steps": 32,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.001,
        "last_distance": 1.0,
        "steps": 3000,
        "student_lr": 0.0007,
    },
}

SCALE = 2.5
STAGES = (4, 2, 1)
REAL: dict[str, Any] = {"ends": TSCD.ends}


def _made(**options: Any) -> Callable[[Teacher, Denoiser], TSCD]:
    own = {"solver_steps": 8, "stages": STAGES, "stage_steps": 10, "guidance_scale": SCALE, **options}
    return lambda teacher, student: TSCD(teacher, Config(**own), student=student)


def verify() -> Iterator[Check]:
    """Section 1.4's sanity items, on a guided Gaussian, in every stage."""
    for stage, segments in enumerate(STAGES):
        yield from fixed_point_checks(_made(), SCALE, f"{segments} segments", 10 * stage)
        yield from loss_checks(_made(huber_c=0.3), SCALE, f"{segments} segments", 10 * stage)
    yield from _merging()
    yield from _weights()
    yield from _sampling()
    yield from edge_checks()
    rewarded = _made(reward_weight=0.4, distance="l2", last_distance=1.0)
    yield from reward_checks(rewarded, SCALE, 10 * (len(STAGES) - 1))


def _merging() -> Iterator[Check]:
    """Segments are half open: a step that ends at a border jumps there, one that begins there leaves it."""
    jumps = Jumps(_made(), SCALE)
    grid = jumps.grid
    for stage, places in enumerate(([2, 2, 4, 4, 6, 6, 8, 8], [4, 4, 4, 4, 8, 8, 8, 8], [8] * 8)):
        ends = torch.stack([jumps.at(i, 10 * stage)[2].e[0] for i in range(8)])
        yield equal(f"the ends of stage {stage}", grid[places], ends, 0.0)
        yield equal(f"... to its last step, {stage}", grid[places],
                    torch.stack([jumps.at(i, 10 * stage + 9)[2].e[0] for i in range(8)]), 0.0)  # fmt: skip
        if stage < 2:
            wrong = lambda self, step, i, batch: REAL["ends"](self, step, (i + 1).clamp(max=7), batch)  # noqa: E731
            with mistake(TSCD, "ends", wrong):
                ends = torch.stack([jumps.at(i, 10 * stage)[2].e[0] for i in range(8)])
            yield differs(f"a border counted to the segment below is caught, stage {stage}", grid[places], ends, 1e-2)
    yield equal("training steps of all stages", 30.0, float(jumps.method.whole or 0), 0.0)
    method: Any = jumps.method
    segments = torch.tensor([method.segments(step) for step in (0, 9, 10, 29, 30, 1000)])
    yield equal("after the last stage it goes on", torch.tensor([4, 4, 2, 1, 1, 1]), segments, 0.0)


def _weights() -> Iterator[Check]:
    """Of distance and GAN, stage by stage."""
    own = Config(solver_steps=8, stages=STAGES, stage_steps=10, last_distance=0.4, gan_weight=0.6)
    jumps = Jumps(_made(), SCALE)
    method, at = jumps.method, jumps.at(0)[2]
    with mistake(method, "config", own):
        got = torch.tensor([method.weights(step) for step in (0, 10, 20, 99)])
    closed = torch.tensor([[1, 0.2], [0.7, 0.4], [0.4, 0.6], [0.4, 0.6]])
    yield equal("the distance's falls and the GAN's rises", closed, got, 1e-6)
    for step, weight in ((0, 1.0), (10, 0.75), (20, 0.5)):
        method.reached = (torch.ones(2, 2), torch.zeros(2, 2), at)
        batch = Batch(2, (2,), {}, None, torch.device("cpu"), (0, step, 0))
        got = method.whole_loss(Outcome(torch.tensor(2.0)), batch).loss
        yield equal(f"the loss of step {step} has its stage's weight", 2 * weight, got, 1e-6)


def _sampling() -> Iterator[Check]:
    """In a stage, its segments' steps compose; after the last one, one step is all of the teacher's."""
    jumps = Jumps(_made(student_steps=2), SCALE)
    closed = jumps.mu + jumps.factor(0, 8) * jumps.z
    for stage, segments in enumerate(STAGES):
        jumps.minimise(10 * stage)
        jumps.method.stepped(10 * stage)
        sampler = jumps.method.sampler()
        taken = float(len(sampler.levels))
        yield equal(f"sampling steps after stage {stage}", float(max(segments, 2)), taken, 0.0)
        if segments > 1:
            yield equal(f"stage {stage} samples where its segments begin", jumps.grid[: 8 : 8 // segments],
                        torch.tensor(sampler.levels, dtype=torch.float64), 1e-12)  # fmt: skip
            yield equal(f"... without noise, stage {stage}", 1.0, float(sampler.step == DDIM()), 0.0)
            x, t = sampler.input_at(segments - 1, jumps.z, jumps.cond, lambda j: jumps.z)
        else:
            yield equal("the last stage's sampler adds noise", 1.0, float(sampler.step == Renoise()), 0.0)
            x, t = sampler.start(jumps.z)
        got = sampler.denoiser(x, t, jumps.cond).x0
        yield equal(f"{segments} steps are the teacher's eight", closed, got, 1e-10)
