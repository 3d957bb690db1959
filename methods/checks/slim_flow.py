"""Exact checks of SlimFlow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods import slim_flow
from diffdistill.methods.checks.reflow import MEAN, STD, Straight
from diffdistill.methods.reflow import Config as ReflowConfig
from diffdistill.methods.reflow import Reflow
from diffdistill.methods.slim_flow import MIDDLE, Config, SlimFlow, annealed
from diffdistill.scaffold.method import Batch, Pair

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "anneal_steps": 500,
        "reflow_steps": 2000,
        "distill_steps": 2000,
        "guide_weight": 1.0,
        "distance": "l2",
        "steps": 4000,
        "student_lr": 0.001,
    },
}

ANNEAL, REFLOW = 8, 12
REAL: dict[str, Any] = {"line": SlimFlow.line, "guide": SlimFlow.guide}


class Lines(nn.Module):
    """The best velocity at an angle for x = mean + std z' that is correlated by rho with noise of variance 1.

    As the v of TrigFlow, per dimension. The regression of z' - x on x_t is affine, since all are Gaussians.
    """

    def __init__(self, rho: float):
        super().__init__()
        self.rho = rho
        self.shift, self.slope = (nn.Parameter(torch.zeros(2).double()) for _ in range(2))

    def both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cov(z' - x, x_t) and Var(x_t), each (B, 2)."""
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        shared = self.rho * STD
        covariance = cos * (shared - STD**2) + sin * (1 - shared)
        return covariance, cos**2 * STD**2 + 2 * cos * sin * shared + sin**2

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2) v of the x and z' = x + u that x_t = cos(t) x + sin(t) z' and the best velocity u say."""
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        covariance, variance = self.both(t)
        u = -MEAN + self.shift + (covariance / variance + self.slope) * (x_t - cos * MEAN)
        x = (x_t - sin * u) / (cos + sin)
        return cos * (x + u) - sin * x


@dataclass(frozen=True)
class Given(Batch):
    """A batch whose draws are these, for expectations without an error of sampling."""

    noise: Tensor | None = None
    angle: float = 0.0

    def randn(self, purpose: str) -> Tensor:
        """The noise, whatever it is for."""
        assert self.noise is not None
        return self.noise

    def draw(self, purpose: str, of: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """The angle, for all samples."""
        return torch.full((self.size,), self.angle, dtype=torch.float64)


def _method(network: nn.Module | None = None, **options: Any) -> SlimFlow:
    student = Denoiser(network or Straight(MEAN, STD), TrigFlow(), OUTPUTS["v_prediction"])
    stages = {"anneal_steps": ANNEAL, "reflow_steps": REFLOW, "distill_steps": 4}
    return SlimFlow(gaussian_teacher(MEAN.tolist(), STD), Config(**stages | options), student=student)


def _batch(step: int, n: int = 64) -> Batch:
    """Pairs of the teacher's exact map."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return Batch(n, (2,), {}, None, torch.device("cpu"), (0, step, 0), Pair(z, MEAN + STD * z, {}))


def _loss(method: SlimFlow | Reflow, step: int, batch: Batch | None = None) -> Tensor:
    return method.turns(step)[0].loss(_batch(step) if batch is None else batch).loss


def verify() -> Iterator[Check]:
    """Section 7.3's sanity items, and the mistakes that they must catch."""
    yield from _annealing()
    yield from _minimisers()
    yield from _reflow()
    yield from _guide()
    yield from _second_stage()


def _annealing() -> Iterator[Check]:
    """z' is standard normal at any beta, over all signs of both, and beta falls in a line."""
    z, fresh = two_points(2)
    for beta in (0.0, 0.3, 0.8, 1.0):
        mixed = annealed(z, fresh, beta)
        yield equal(f"z' has no mean, beta = {beta}", 0.0, mixed.mean(0), 1e-12, scale=1.0)
        yield equal(f"... and the covariance I, beta = {beta}", torch.eye(2), mixed.T @ mixed / len(mixed), 1e-12)
        yield equal(
            f"... and sqrt(1 - beta^2) of the pair's noise, beta = {beta}",
            math.sqrt(1 - beta**2), (mixed * z).mean(), 1e-12, scale=1.0,
        )  # fmt: skip
    method = _method()
    betas = torch.tensor([method.beta(step) for step in (0, ANNEAL // 4, ANNEAL // 2, ANNEAL, ANNEAL + 1)])
    yield equal("beta falls from 1 to 0 in a line", torch.tensor([1, 0.75, 0.5, 0, 0]), betas, 1e-7)
    batch = Given(len(z), (2,), {}, None, z.device, (0, 0, 0), Pair(z, MEAN + STD * z, {}), noise=fresh)
    with mistake(slim_flow, "annealed", lambda z, fresh, beta: (1 - beta) * z + beta * fresh):
        eps = method.line(ANNEAL // 2, batch).eps
        yield differs("a mean of the two, whose variance is less, is caught", torch.eye(2), eps.T @ eps / len(z), 0.1)
    yield equal("at beta 1 nothing is left of the pair's noise", fresh, method.line(0, batch).eps, 0.0)
    yield equal("at beta 0 nothing else", z, method.line(ANNEAL, batch).eps, 0.0)


def _minimisers() -> Iterator[Check]:
    """On a Gaussian the best velocity of the lines at each beta is affine and known, and so is the loss it leaves."""
    z, fresh = two_points(2)
    pair = Pair(z, MEAN + STD * z, {})
    for step in (0, ANNEAL // 4, ANNEAL // 2, ANNEAL):
        beta = 1 - step / ANNEAL
        rho = math.sqrt(1 - beta**2)
        for angle in (0.2, 0.8, 1.4):
            label = f"beta = {beta}, t = {angle}"
            at = Given(len(z), (2,), {}, None, z.device, (0, 0, 0), pair, noise=fresh, angle=angle)
            network = Lines(rho)
            method = _method(network)
            covariance, variance = network.both(torch.tensor([angle], dtype=torch.float64))
            left = (1 + STD**2 - 2 * rho * STD - covariance**2 / variance).mean()
            loss = _loss(method, step, at)
            yield equal(f"the loss at the closed form, {label}", left, loss, 1e-10, scale=1.0)
            slope = gradient(loss, network.shift, network.slope)
            yield equal(f"... is the least, {label}", 0.0, slope, 1e-9, scale=1.0)
            if step == 0:
                teacher = gaussian_teacher(MEAN.tolist(), STD).denoiser
                t = torch.full((len(z),), angle, dtype=torch.float64)
                x_t = diffuse(pair.x0, t, fresh)
                yield equal(f"... and the teacher's own flow, {label}", teacher(x_t, t, {}).v, network(x_t, t), 1e-10)
            elif step == ANNEAL:
                yield equal(f"... and there is none, {label}", 0.0, loss, 1e-10, scale=1.0)
            for wrong, said in ((0.0, "no annealing"), (0.5, "another beta")):
                if wrong != beta:
                    with mistake(SlimFlow, "beta", lambda self, step, wrong=wrong: wrong):
                        slope = gradient(_loss(method, step, at), network.shift, network.slope)
                    yield differs(f"{said} is caught, {label}", 0.0, slope, 1e-3, scale=1.0)


def _reflow() -> Iterator[Check]:
    """From the end of the annealing on the first stage is reflow."""
    step = ANNEAL
    for label, network in (("a straight flow", Straight(MEAN + 0.1, STD)), ("another", Lines(0.4))):
        own = _method(network)
        other = Reflow(gaussian_teacher(MEAN.tolist(), STD), ReflowConfig(), student=own.student)
        parameters = list(own.student.parameters())
        mine, theirs = _loss(own, step), _loss(other, step)
        yield equal(f"reflow's loss, bit by bit, {label}", theirs, mine, 0.0)
        yield equal(f"... and its gradient, {label}", gradient(theirs, *parameters), gradient(mine, *parameters), 0.0)
        yield differs(f"... and not before, {label}", _loss(other, step - 1), _loss(own, step - 1), 1e-3)


def _flow_times(batch: Batch) -> Tensor:
    """(B, 1) the flow times of the guide's points."""
    return (MIDDLE[0] + (MIDDLE[1] - MIDDLE[0]) * batch.uniform("student/middle"))[:, None]


def _guide() -> Iterator[Check]:
    """A straight guide of N(mean, std^2), and a student that is off."""
    batch = _batch(REFLOW)
    z = batch.randn("student/z")
    method = _method()
    right = MEAN + STD * z
    yield equal("a straight guide's target is the end of z's line", right, method.guide(right, z, batch), 1e-10)
    s = _flow_times(batch)
    off, scale = 0.4, 1.5
    wrong = MEAN + off + scale * STD * z
    # On the student's line y = (1 - s) wrong + s z; the guide's line through it has the noise z~.
    z_t = ((1 - s) * (wrong - MEAN) + s * z) / ((1 - s) * STD + s)
    yield equal(
        "... and of a student that is off, of another line", MEAN + STD * z_t, method.guide(wrong, z, batch), 1e-10
    )
    swapped = lambda self, x, z, batch: REAL["guide"](self, z, x, batch)  # noqa: E731
    with mistake(SlimFlow, "guide", swapped):
        yield differs("noise for data is caught", right, method.guide(right, z, batch), 1e-2)
    with mistake(slim_flow, "diffuse", lambda x, t, z: diffuse(MEAN + STD * z, t, z)):
        got = method.guide(wrong, z, batch)
        yield differs("the guide's own first step, an older variant, is another target", MEAN + STD * z_t, got, 1e-2)
    with mistake(slim_flow, "MIDDLE", (0.0, 1.0)):
        yield differs("all times are caught", MEAN + STD * z_t, method.guide(wrong, z, batch), 1e-2)


def _second_stage() -> Iterator[Check]:
    """Both terms and their gradients in the student's mean, of a student that is off by a constant."""
    off, weight = 0.3, 0.7
    method = _method(guide_weight=weight)
    with torch.no_grad():
        for p in method.reflowed.parameters():
            p.zero_()  # what it would do if it were never told
    for step in range(REFLOW):
        method.after_step(step)
    batch = _batch(REFLOW)
    yield equal("the reflowed student, distilled, has no loss", 0.0, _loss(method, REFLOW), 1e-10, scale=1.0)
    with torch.no_grad():
        method.student.network.mean.add_(off)  # type: ignore[operator]
    s = _flow_times(batch)
    gap = off * s / ((1 - s) * STD + s)  # of the guide's target from the student's x0
    loss = _loss(method, REFLOW)
    closed = off**2 + weight * gap.square().mean()
    yield equal("the loss of a student whose mean is off", closed, loss, 1e-6)  # z is float32
    mean = method.student.network.mean
    slope = off + weight * gap.mean(0)  # of the mean over two dimensions, the target held
    own = gradient(loss, mean)  # type: ignore[arg-type]
    yield equal("... and its gradient", slope, own, 1e-6)
    with mistake(torch, "no_grad", nullcontext), mistake(SlimFlow, "guide", REAL["guide"].__wrapped__):
        got = gradient(_loss(method, REFLOW), mean)  # type: ignore[arg-type]
    yield differs("a gradient through the guide is caught", slope, got, 1e-2)
    with mistake(method.stage, "previous", method.student):
        yield differs("the student as its own guide is caught", closed, _loss(method, REFLOW), 1e-2)
    alone = _method(guide_weight=0.0, reflow_steps=1)
    with torch.no_grad():
        alone.student.network.mean.add_(off)  # type: ignore[operator]
    yield equal("without the guide the pairs are left", off**2, _loss(alone, REFLOW), 1e-9)
