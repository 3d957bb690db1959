"""Exact checks of tdd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import DiscreteVP
from diffdistill.exact.checks import Check, differs, equal, mistake
from diffdistill.exact.segments import Jumps, edge_checks, fixed_point_checks, loss_checks
from diffdistill.methods.tdd import TDD, Config
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "two steps": {
        "steps_min": 2,
        "steps_max": 2,
        "solver_steps": 64,
        "eta": 0.0,
        "label_dropout": 0.0,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.001,
        "steps": 2500,
        "student_lr": 0.001,
    },
}

SCALE = 2.5
REAL: dict[str, Any] = {"ends": TDD.ends}
# One time for each t: those of a sampler of three steps, none of which has another within its reach.
ONE = {"solver_steps": 6, "steps_min": 3, "steps_max": 3, "eta": 0.0, "reach": 0.2, "label_dropout": 0.0}


def _made(**options: Any) -> Callable[[Teacher, Denoiser], TDD]:
    config = Config(**{**ONE, "guidance_scale": SCALE, **options})
    return lambda teacher, student: TDD(teacher, config, student=student)


def verify() -> Iterator[Check]:
    """Section 1.5's sanity items, on a guided Gaussian: exact with one time for each t, and not with several."""
    yield from fixed_point_checks(_made(), SCALE, "one time for each t")
    for distance in ("l2", "huber"):
        yield from loss_checks(_made(distance=distance, huber_c=0.3), SCALE, distance)
    several = Jumps(_made(reach=1.0), SCALE)
    several.minimise()
    worst = max(float(several.loss(i).detach()) for i in range(6))
    yield differs("with several times for one t no student is exact", 0.0, worst, 1e-5, scale=1.0)
    yield from _targets()
    yield from _dropped()
    yield from edge_checks()


def _vp(**options: Any) -> TDD:
    """On Stable Diffusion's timesteps, with the authors' grid."""
    schedule = DiscreteVP.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    own = Jumps(_made(), SCALE).teacher
    denoiser = own.denoiser.with_network(own.denoiser.network, None)
    denoiser.schedule = schedule
    return TDD(Teacher(denoiser, (2,), 1), Config(**options), student=denoiser)


def _targets() -> Iterator[Check]:
    """Against a rewrite of the authors' rule, timestep by timestep."""
    method = _vp()
    grid = [999 - 4 * k for k in range(250)]
    times = sorted({0} | {grid[k * 250 // n] for n in range(4, 9) for k in range(1, n)})
    yield equal("the times of 4 to 8 steps, and 0", torch.tensor(times).double(), method.targets[0], 0.0)
    for i in (0, 1, 62, 63, 124, 200, 249):
        r = grid[i + 1] if i < 249 else 0
        b = max(s for s in times if s <= r)
        allowed = [s for s in times if b - 260 <= s <= b]
        n = 2000
        index = torch.full((n,), i)
        with mistake(method, "config", Config(eta=0.0)):
            s = method.ends(0, index, _batch(n, i))[1]
        got = method.schedule.native(s).time.round() * (s > 0)
        known = torch.tensor([float((got == k).double().mean()) for k in allowed]).double()
        yield equal(f"step {i}: each of its times as often", torch.full((len(allowed),), 1 / len(allowed)), known, 0.15)
        shorter = method.ends(0, index, _batch(n, i))[1]
        ratio = (method.schedule.native(shorter).time / got.clamp_min(1))[got > 0]
        if len(ratio):
            inside = float(((ratio <= 1 + 1e-9) & (ratio >= 0.7 - 2e-3)).all())
            yield equal(f"... and s is at most 0.3 below, step {i}", 1.0, inside, 0.0)
            yield equal(f"... evenly, step {i}", 0.85, ratio.mean(), 0.01)
    below = max(float((method.ends(0, torch.arange(250), _batch(250, k))[1] - method.grid[1:]).max()) for k in range(9))
    yield equal("s is never above r", 0.0, max(below, 0.0), 1e-9, scale=1.0)


def _batch(n: int, key: int) -> Batch:
    return Batch(n, (2,), {"class_labels": torch.zeros(n, dtype=torch.int64)}, None, torch.device("cpu"), (0, key, 0))


def _dropped() -> Iterator[Check]:
    """A share of samples has no condition, and of those the guided step is the plain one of "no class"."""
    jumps = Jumps(_made(label_dropout=0.2), SCALE)
    batch = _batch(4000, 3)
    labels = jumps.method.prepared(0, batch).cond["class_labels"]
    yield equal("the share of samples without a condition", 0.2, labels.double().mean(), 0.06)
    jumps.cond = {"class_labels": torch.ones(len(jumps.z), dtype=torch.int64)}
    x_t, x_r, at = jumps.at(2)
    cos = [torch.cos(a)[:, None] for a in (at.t, at.r)]
    none = cos[1] * jumps.means[1] + jumps.factor(2, 3) * (x_t - cos[0] * jumps.means[1])
    yield equal("without a condition the teacher's step is not guided", none, x_r, 1e-10)
    with mistake(TDD, "ends", lambda self, *rest: (lambda top, s: (top, 0 * s))(*REAL["ends"](self, *rest))):
        landed = jumps.at(1)[2].e
    yield differs("jumps to 0 alone are caught", jumps.at(1)[2].e, landed, 1e-2)
