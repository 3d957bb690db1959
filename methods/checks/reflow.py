"""Exact checks of reflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step, sample_ode
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import LinearFlow, TrigFlow
from diffdistill.core.times import u_shaped
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods.reflow import Config, Reflow
from diffdistill.scaffold.method import Batch, Pair
from diffdistill.scaffold.straightening import Line

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "reflow_steps": 2000,
        "distill_steps": 2000,
        "ode_steps": 16,
        "time_exponent": 0.0,
        "velocity_loss": "l2",
        "distance": "l2",
        "steps": 4000,
        "student_lr": 0.001,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
REAL: dict[str, Any] = {"line": Reflow.line}


class Straight(nn.Module):
    """The velocity of straight lines from z to mean + std z, per dimension, for TrigFlow."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2)."""
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        z = (x_t - cos * self.mean) / (cos * self.std + sin)
        return cos * z - sin * (self.mean + self.std * z)


def _method(network: nn.Module | None = None, **options: Any) -> Reflow:
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = Denoiser(network or Straight(MEAN, STD), TrigFlow(), OUTPUTS["v_prediction"])
    return Reflow(teacher, Config(**options), student=student)


def _batch(n: int = 64, step: int = 0) -> Batch:
    """Pairs of the teacher's exact map, whose lines do not cross in either dimension."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return Batch(n, (2,), {}, None, torch.device("cpu"), (0, step, 0), Pair(z, MEAN + STD * z, {}))


def _loss(method: Reflow, step: int = 0) -> Tensor:
    return method.turns(step)[0].loss(_batch(step=step)).loss


def verify() -> Iterator[Check]:
    """Sections 7.1's and 7.2's sanity items, and the mistakes that they must catch."""
    yield from _straight()
    yield from _weights()
    yield from _times()
    yield from _stages()


def _straight() -> Iterator[Check]:
    """The map of a Gaussian is monotone: its lines do not cross, and one velocity along each has no loss."""
    for label, options in (("l2", {}), ("huber", {"velocity_loss": "huber", "time_exponent": 4.0}),
                           ("with images", {"image_weight": 0.7, "image_over_time": True})):  # fmt: skip
        method = _method(**options)
        loss = _loss(method)
        yield equal(f"straight lines have no loss, {label}", 0.0, loss, 1e-10, scale=1.0)
        yield equal(f"... and no gradient, {label}", 0.0, gradient(loss, *method.student.parameters()), 1e-9, scale=1.0)
    method = _method()
    z = _batch().pair.z  # type: ignore[union-attr]
    for steps in (1, 3):
        x = sample_ode(ddim_step, method.student, method.schedule, z, steps, {})
        yield equal(f"{steps} Euler steps are the teacher's map", MEAN + STD * z, x, 1e-12)
    curved = _method(gaussian_teacher(MEAN.tolist(), STD).denoiser.network)
    yield differs("the teacher's own flow is not straight", 0.0, _loss(curved), 1e-2, scale=1.0)
    mixed = lambda self, *at: (lambda line: line._replace(eps=line.eps.flip(0)))(REAL["line"](self, *at))  # noqa: E731
    with mistake(Reflow, "line", mixed):
        yield differs("noise of other pairs is caught", 0.0, _loss(method), 1e-2, scale=1.0)
    swapped = lambda self, *at: (lambda line: line._replace(t=math.pi / 2 - line.t))(REAL["line"](self, *at))  # noqa: E731
    with mistake(Reflow, "line", swapped):
        yield equal(
            "times the other way round are other points of the same lines", 0.0, _loss(method), 1e-10, scale=1.0
        )
    off = _method(Straight(MEAN + 0.1, STD))
    line = off.line(0, _batch())
    cos, sin = torch.cos(line.t)[:, None], torch.sin(line.t)[:, None]
    # z is off by -0.1 cos/(cos s + sin), and u = (1 - s) z - mean.
    gap = -0.1 * cos / (cos * STD + sin) * (1 - STD) - 0.1
    yield equal("the loss of a student whose mean is off", gap.square().mean(), _loss(off), 1e-10)


def _weights() -> Iterator[Check]:
    """rf++'s loss, term by term, on a flow teacher's times."""
    n, size = 5, 3
    draw = torch.Generator().manual_seed(0)
    x, z, own = torch.randn(3, n, size, generator=draw, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    flow = LinearFlow()
    angle = flow.angle(t)
    scale = torch.sin(angle) / t  # of the normal form's x_t over the flow's
    x_t = scale[:, None] * ((1 - t)[:, None] * x + t[:, None] * z)
    student = Denoiser(_Says(own), flow, OUTPUTS["flow_prediction"])
    teacher = gaussian_teacher([0.0] * size, 1.0)
    c = 0.00054 * size
    huber = (torch.sqrt((own - (z - x)).square().sum(1) + c**2) - c) / size
    end = (1 - t)[:, None] * x + t[:, None] * z - t[:, None] * own
    image = (end - x).square().mean(1)
    for label, options, closed in (
        ("l2", {}, (own - (z - x)).square().mean(1)),
        ("huber", {"velocity_loss": "huber"}, (1 - t) * huber),
        ("images", {"velocity_loss": "huber", "image_weight": 0.7}, (1 - t) * huber + 0.7 * image),
        ("images over t", {"image_weight": 0.7, "image_over_time": True},
         (own - (z - x)).square().mean(1) + 0.7 * image / t),
    ):  # fmt: skip
        method = Reflow(teacher, Config(**options), student=student)
        method.schedule = flow
        got = method.error(student(x_t, angle, {}), Line(x, z, angle, {}))
        yield equal(f"the loss, {label}", closed, got, 1e-9)
        if label != "l2":
            yield differs(f"... is not the plain one, {label}", (own - (z - x)).square().mean(1), got, 1e-3)


class _Says(nn.Module):
    """An output that is given."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.y


def _times() -> Iterator[Check]:
    """The U-shaped density, by its distribution function."""
    n = 20000
    for a in (0.0, 4.0):
        u = TrigFlow().fraction(u_shaped(TrigFlow(), n, torch.Generator().manual_seed(0), a))
        for edge in (0.1, 0.3, 0.5):
            closed = edge
            if a:
                closed = (math.expm1(a * edge) + math.expm1(a) - math.expm1(a * (1 - edge))) / math.expm1(a) / 2
            got = (u < edge).double().mean()
            yield equal(f"the share of times below {edge}, a = {a}", closed, got, 0.04)
        yield equal(f"as many above the middle, a = {a}", 0.5, u.mean(), 0.02)


def _stages() -> Iterator[Check]:
    """The second stage makes one step of the first one's student, whose weights it holds."""
    method = _method(reflow_steps=2, distill_steps=2, ode_steps=3)
    assert method.stage.previous is not None
    with torch.no_grad():
        for p in method.stage.previous.parameters():
            p.zero_()  # what it would do if it were never told
    starts, steps = [], [len(method.sampler().levels)]
    for step in range(4):
        (turn,) = method.turns(step)
        starts.append(float(turn.restart))
        loss = turn.loss(_batch(step=step)).loss
        yield equal(f"no loss in step {step}", 0.0, loss, 1e-12, scale=1.0)
        method.after_step(step)
        steps.append(len(method.sampler().levels))
    yield equal("the second stage begins with a new optimizer", torch.tensor([0.0, 0, 1, 0]), torch.tensor(starts), 0.0)
    yield equal("training steps of both", 4.0, float(method.whole or 0), 0.0)
    batch = _batch()
    z = batch.randn("student/z")
    yield equal("its images are those of the reflowed student", MEAN + STD * z, method.ends(z, batch), 1e-6)
    with torch.no_grad():
        method.student.network.mean.add_(0.3)  # type: ignore[operator]
    loss = method.turns(3)[0].loss(batch).loss
    yield equal("the distance of one step from them", 0.3**2, loss, 1e-6)
    own = gradient(loss, method.student.network.mean)  # type: ignore[arg-type]
    yield equal("... and its gradient", torch.full((2,), 0.3), own, 1e-6)
    several = _method(student_steps=4, reflow_steps=2, distill_steps=2)
    counts = [len(several.sampler().levels)]
    for step in range(3):
        several.after_step(step)
        counts.append(len(several.sampler().levels))
    yield equal(
        "sampling steps before, in and after the first stage", torch.tensor([1, 4, 4, 1]), torch.tensor(counts), 0
    )
