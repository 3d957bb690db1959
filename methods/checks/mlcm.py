"""Exact checks of mlcm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.exact.checks import Check, differs, equal, mistake, two_points
from diffdistill.exact.segments import Jumps, edge_checks, fixed_point_checks, loss_checks, reward_checks
from diffdistill.methods.mlcm import MLCM, Config
from diffdistill.players import scale_input
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.segments import Jump

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "no images": {
        "stages": "4, 2, 1",
        "stage_steps": 1000,
        "solver_steps": 32,
        "states": 8,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.001,
        "steps": 3000,
        "batch_size": 64,
        "student_lr": 0.0007,
    },
}

SCALE = 2.5
STAGES = (4, 2, 1)
LAST = 20  # the first training step of the last stage
REAL: dict[str, Any] = {"guide": scale_input.guide, "next": MLCM.next}


class _Drawn(Batch):
    """A batch whose noise is that of `two_points`."""

    def randn(self, purpose: str) -> Tensor:
        return two_points(2)[0]


class Walked(Jumps):
    """The states are those of the method's own walk, from the noise z."""

    method: Any

    @property
    def batch(self) -> Batch:
        """As a training step has it."""
        return _Drawn(len(self.z), (2,), self.cond, None, torch.device("cpu"), (0, 0, 0))

    def at(self, i: int, step: int = 0, x0: Tensor | None = None) -> tuple[Tensor, Tensor, Jump]:
        """The i-th state of each trajectory, what its target is made of, and the jump."""
        index, batch = torch.full((len(self.z),), i), self.method.prepared(step, self.batch)
        top, e = self.method.ends(step, index, batch)
        r = self.grid[self.method.next(step, index)]
        jump = Jump(self.grid[index], r, top, e, self.each(self.scale))
        x_t = self.method.noised(batch, jump, self.eps)
        return x_t, self.method.less_noisy(x_t, batch.images, self.eps, jump, self.cond), jump


def _made(**options: Any) -> Callable[[Teacher, Denoiser], MLCM]:
    own = {"solver_steps": 8, "stages": STAGES, "stage_steps": 10, "guidance_scale": SCALE, "states": 1, **options}
    return lambda teacher, student: MLCM(teacher, Config(**own), student=student)


def verify() -> Iterator[Check]:
    """Sections 1.6 and 1.6+, on a guided Gaussian, in every stage."""
    yield from _states()
    for stage, segments in enumerate(STAGES):
        label = f"{segments} segments"
        yield from fixed_point_checks(_made(), SCALE, label, 10 * stage, Walked)
        yield from loss_checks(_made(huber_c=0.3), SCALE, label, 10 * stage, Walked)
    yield from _clean_end()
    yield from _several()
    yield from edge_checks()
    yield from reward_checks(_made(reward_weight=0.4, distance="l2"), SCALE, LAST, Walked)


def _states() -> Iterator[Check]:
    """The products of the guided teacher's steps from noise on, and none of the noised images."""
    jumps = Walked(_made(), SCALE)
    walked, top = jumps.method.walk(jumps.batch), torch.cos(jumps.grid[0]) * jumps.mu
    start = jumps.method.sampler().start(jumps.z)[0]
    closed = torch.stack(
        [torch.cos(t) * jumps.mu + jumps.factor(0, j) * (start - top) for j, t in enumerate(jumps.grid)]
    )
    yield equal("a state is the product of the guided steps before it", closed, walked, 1e-10)
    more: Any = lambda *at: REAL["guide"](*at[:-1], 1 + at[-1])  # noqa: E731
    with mistake(scale_input, "guide", more):
        yield differs("... and another if the scale is 1 + a", closed, jumps.method.walk(jumps.batch), 1e-2)
    for i in (0, 3, 7):
        x_t, x_r, _ = jumps.at(i)
        yield equal(f"step {i} goes from one state to the next", closed[i : i + 2], torch.stack([x_t, x_r]), 1e-10)
    with mistake(MLCM, "noised", FollowingMethod.noised):
        yield differs("the clean ends, noised, are caught", closed[3], jumps.at(3)[0], 1e-2)


def _clean_end() -> Iterator[Check]:
    """In the last stage the target is where the trajectory ends, whatever the student says there."""
    jumps, draw = Walked(_made(), SCALE), torch.Generator().manual_seed(1)
    targets: dict[int, list[Tensor]] = {LAST - 1: [], LAST: []}
    for _ in range(2):
        for p in jumps.affine.parameters():
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        for step, seen in targets.items():
            x_t, x_r, at = jumps.at(1, step)
            seen.append(jumps.method.jumped(0, x_t, x_r, at, jumps.cond)[1])
    start = jumps.method.sampler().start(jumps.z)[0]
    end = jumps.mu + jumps.factor(0, 8) * (start - torch.cos(jumps.grid[0]) * jumps.mu)
    yield equal("the last stage's target is the clean end", end, targets[LAST][0], 1e-10)
    yield equal("... and does not hear the student", targets[LAST][0], targets[LAST][1], 0.0)
    yield differs("before it the target is the student's own", targets[LAST - 1][0], targets[LAST - 1][1], 1e-2)
    with mistake(MLCM, "next", lambda self, step, i: i + 1):
        x_t, x_r, at = jumps.at(1, LAST)
        target = jumps.method.jumped(0, x_t, x_r, at, jumps.cond)[1]
        yield differs("consistency in place of the clean end is caught", end, target, 1e-2)


def _several() -> Iterator[Check]:
    """Several steps of a trajectory are trained on, each with its own conditions, drawn apart."""
    jumps = Walked(_made(states=3), SCALE)
    labels = {"class_labels": torch.arange(len(jumps.z)) % 2}
    batch = _Drawn(len(jumps.z), (2,), labels, None, torch.device("cpu"), (0, 0, 2), total=18)
    states, made = jumps.method.walk(batch), jumps.method.prepared(0, batch)
    yield equal("the clean ends of each, several times", states[-1].repeat_interleave(3, 0), made.images, 0.0)
    yield equal("under its conditions", labels["class_labels"].repeat_interleave(3), made.cond["class_labels"], 0.0)
    counted = torch.tensor([made.size, made.first])
    yield equal("three times as many samples, and before them", torch.tensor([48, 6]), counted, 0.0)
    at = jumps.method.interval(0, made)
    x_t = jumps.method.noised(made, at, made.images)
    i = (at.t[:, None] == jumps.grid).int().argmax(1)
    yield equal("each state is of its own trajectory", states[i, torch.arange(48) // 3], x_t, 0.0)
    yield differs("... at times of their own", 0.0, at.t.reshape(16, 3).std(1).mean(), 0.05, scale=1.0)
