"""Exact checks of tbcm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import (
    ClassGaussians,
    FlowToData,
    GaussianMixture,
    class_gaussians_teacher,
    gaussian_teacher,
)
from diffdistill.exact.checks import AnyField, Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.tbcm import TBCM, Config
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "no images": {
        "states": 8,
        "route_shift": 1.0,
        "tangent_warmup": 300,
        "norm": "rms",
        "norm_c": 0.1,
        "max_grad_norm": 1.0,
        "guidance_min": 1.5,
        "guidance_max": 1.5,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "batch_size": 64,
        "steps": 2500,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
REAL: dict[str, Any] = {"derivative": TBCM.derivative, "__call__": DrawnGuidance.__call__}


class _Drawn(Batch):
    """A batch whose noise is that of `two_points`."""

    def randn(self, purpose: str) -> Tensor:
        return two_points(2)[0]


def verify() -> Iterator[Check]:
    """Section 2.4's sanity items, and the mistakes that they must catch."""
    yield from _states()
    yield from _times()
    yield from _tangent()
    yield from _calmed()
    yield from _loss()
    yield from _guided()


def _method(network: nn.Module, teacher: Teacher | None = None, **options: Any) -> TBCM:
    student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
    own = {"norm": "none", "derivative": "exact", "tangent_warmup": 0, "states": 9}
    return TBCM(teacher or gaussian_teacher(MEAN.tolist(), STD), Config(**{**own, **options}), student=student)


def _batch(**labels: Tensor) -> Batch:
    return _Drawn(16, (2,), labels, None, torch.device("cpu"), (0, 0, 0))


def _states() -> Iterator[Check]:
    """Of a Gaussian teacher the states are a product of DDIM's factors, and on the trajectory in the limit."""
    batch, z = _batch(), two_points(2)[0]
    method = _method(AnyField())
    t, at = method.times(batch)[0], method.walk(batch)
    sigma = torch.tan(t[1:])[..., None]
    around, states = sigma[0] * z, [sigma[0] * z]  # from pure noise the first step goes to the mean's own noise
    for a, b in pairwise(sigma):
        around = around * (1 + (b - a) * a / (STD**2 + a**2))
        states.append(around)
    closed = torch.cat([torch.cos(s)[:, None] * (MEAN + x) for s, x in zip(t[1:], states, strict=True)])
    yield equal("a state is the product of the DDIM steps before it", closed, at.x_t, 1e-10)
    yield equal("its time is the one drawn", t[1:].flatten(), at.t, 0.0)
    exact = GaussianMixture(MEAN[None], STD[None])
    yield equal("its direction is the teacher's there", exact(at.x_t, at.t), at.v, 1e-12)
    with mistake(DrawnGuidance, "__call__", lambda self, x, t, *rest: REAL["__call__"](self, x, 0.9 * t, *rest)):
        yield differs("... which it is not at another time", closed, method.walk(batch).x_t, 1e-2)
    gaps = []
    for states_ in (65, 257):
        fine = _method(AnyField(), states=states_).walk(batch)
        start = torch.full_like(fine.t, math.pi / 2)
        gaps.append((fine.x_t - exact.flow_map(z.repeat(states_ - 1, 1), start, fine.t)).square().mean().sqrt())
    yield equal("with four times the states they are four times nearer to the trajectory", 4.0, gaps[0] / gaps[1], 0.3)


def _times() -> Iterator[Check]:
    """The noise's time, and one in each cell of a flow's row that is shifted by 2.5, as its scheduler has it."""
    method, batch = _method(AnyField(), states=16), _batch()
    t, r = method.times(batch)
    ends = [1.0, 2.5 / 1000 / (1 + 1.5 / 1000)]
    row = ends[0] + (ends[1] - ends[0]) * torch.arange(16).double() / 15
    row = 2.5 * row / (1 + 1.5 * row)
    cells = torch.atan2(row, 1 - row)
    yield equal("the row", cells, method.cells, 1e-12)
    inside = (t[1:] <= cells[:-1, None]) & (t[1:] >= cells[1:, None])
    yield equal("one time in each cell", 1.0, float(inside.all()), 0.0)
    share = (t[1:] - cells[1:, None]) / (cells[:-1, None] - cells[1:, None])
    yield equal(
        "... uniform in it", torch.tensor([0.5, 1 / math.sqrt(12)]), torch.stack([share.mean(), share.std()]), 0.1
    )
    yield differs("... with times of its own for each sample", 0.0, share.std(1).mean(), 0.1, scale=1.0)
    yield equal("the first is the noise's, and all lead to 0", torch.tensor([math.pi / 2, 0.0], dtype=torch.float64),
                torch.stack([t[0].mean(), r.abs().max()]), 1e-12)  # fmt: skip


def _g(method: TBCM, at: Point, r: float = 1.0) -> Tensor:
    return method.tangent(method.velocity(at).detach(), at, r)


@torch.no_grad()
def _along(method: TBCM, at: Point, h: float) -> Tensor:
    t = at.t + h
    return method.student(GaussianMixture(MEAN[None], STD[None]).flow_map(at.x_t, at.t, t), t, {}).x0


def _tangent() -> Iterator[Check]:
    """g is cos(t) df/dt along the trajectory, and zero for the exact map, wherever the states are."""
    method, h = _method(AnyField()), 1e-4
    at = method.walk(_batch())
    slope = torch.cos(at.t)[:, None] * (_along(method, at, h) - _along(method, at, -h)) / (2 * h)
    yield equal("g is cos(t) df/dt along the trajectory", slope, _g(method, at), 1e-6)
    yield differs("... and not at half the warm-up", slope, _g(method, at, 0.5), 1e-2)
    exact = _method(FlowToData(MEAN, STD))
    yield equal("the exact map has g = 0 at every state", 0.0, _g(exact, at), 1e-10, scale=1.0)
    loss = exact.student_turn(0, _batch()).loss
    yield equal("... and no loss", 0.0, loss, 1e-18, scale=1.0)
    yield equal("... and no gradient", 0.0, gradient(loss, *exact.student.parameters()), 1e-9, scale=1.0)
    still = lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest)  # noqa: E731
    with mistake(TBCM, "derivative", still):
        yield differs("... which the derivative in t alone has not", 0.0, _g(exact, at), 1e-4, scale=1.0)


class _Calmed(nn.Module):
    """F = phi(t) x that makes g zero at the share r for data N(0, std^2), by the factor sin^(1/r) V^(1/2)."""

    def __init__(self, std: float, r: float):
        super().__init__()
        self.std, self.r = std, r
        nodes, weights = numpy.polynomial.legendre.leggauss(200)
        self.u, self.weights = torch.from_numpy(nodes / 2 + 0.5), torch.from_numpy(weights / 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2)."""

        def variance(t: Tensor) -> Tensor:
            return torch.cos(t) ** 2 * self.std**2 + torch.sin(t) ** 2

        at = t[:, None] * self.u
        pull = torch.cos(at) ** 2 * (1 - self.std**2) / variance(at) / self.r - 1
        inside = torch.sqrt(variance(at)) * torch.sin(at) ** (1 / self.r) * pull
        phi = t * (inside * self.weights).sum(1) / (torch.sqrt(variance(t)) * torch.sin(t) ** (1 / self.r))
        return phi[:, None] * x_t


def _calmed() -> Iterator[Check]:
    """r that ends below 1 moves the minimum: how far the one-step samples then spread, in closed form."""
    half = math.pi / 2
    x, top = torch.ones(1, 2).double(), torch.tensor([half]).double()
    # Section 2.4+ of the method notes: by an ODE solver, to three digits.
    table = {0.5: (0.5, 0.469, 0.417, 0.315), 1.0: (1.0, 0.968, 0.911, 0.785), 2.0: (2.0, 1.971, 1.919, 1.792)}
    for std, row in table.items():
        for r, spread in zip((1.0, 0.9, 0.75, 0.5), row, strict=True):
            method = _method(_Calmed(std, r), gaussian_teacher([0.0, 0.0], torch.full((2,), std).double()))
            at = method.walk(_batch())
            yield equal(f"g at the share {r} is zero for its own minimum, data of deviation {std}", 0.0,
                        _g(method, at, r), 1e-7, scale=1.0)  # fmt: skip
            if r < 1:
                yield differs(f"... and not at the share 1, {r}, {std}", 0.0, _g(method, at), 1e-3, scale=1.0)
            got = method.student(x, top, {}).x0[0, 0]
            yield equal(f"... whose samples spread by {spread}, r = {r}, data of deviation {std}", spread, got, 2e-3)
    plan = _method(AnyField(), tangent_warmup=10, final_share=0.75, calm_start=20, calm_steps=4)
    got = torch.tensor([plan.share(step) for step in (0, 5, 10, 20, 21, 24, 99)])
    yield equal("r rises, stays and falls", torch.tensor([0, 0.5, 1, 1, 0.9375, 0.75, 0.75]), got, 1e-12)
    stays = _method(AnyField(), tangent_warmup=10)
    yield equal("... or stays", 1.0, stays.share(10**6), 0.0)


def _loss() -> Iterator[Check]:
    """The loss is the weighted |g/(|g| + c)|^2 of all states, and its gradient passes through F alone."""
    method = _method(AnyField(), norm="l2", norm_c=0.3, states=4)
    method.weight.double()
    nn.init.constant_(method.weight.linear.bias, 0.7)
    batch = _batch()
    at = method.walk(batch)
    g = _g(method, at)
    g = g / (g.norm(dim=1, keepdim=True) + 0.3)
    expected = math.exp(-0.7) * (g.square().mean(1) / torch.tan(at.t)).mean()
    loss = method.turns(0)[0].loss(batch).loss
    yield equal("the loss", expected, loss, 1e-9)
    pull = -2 * math.exp(-0.7) * (g / torch.tan(at.t)[:, None])
    surrogate = (pull * method.velocity(at)).mean()
    own = list(method.student.parameters())
    yield equal("its gradient", gradient(surrogate, *own), gradient(loss, *own), 1e-9)
    yield equal("the adaptive weight's loss", expected + 0.7, method.turns(0)[1].loss(batch).loss, 1e-6)
    yield equal("no image is needed", 0.0, float(len(method.needs)), 0.0)


def _guided() -> Iterator[Check]:
    """Class by class the guided teacher is a Gaussian: a trajectory is that of its own class and scale."""
    means = torch.tensor([[0.7, -0.4], [-0.2, 0.3], [0.1, 0.1]]).double()
    teacher = class_gaussians_teacher(means, STD)
    method = _method(ClassGaussians(means, STD), teacher, guidance_min=2.0, guidance_max=5.0)
    labels = torch.tensor([0, 1]).repeat(8)
    batch = _batch(class_labels=labels)
    scales, at = method.config.drawn(batch.uniform("student/scale")), method.walk(batch)
    yield equal("scales lie between the two", 1.0, float(((scales >= 2) & (scales <= 5)).all()), 0.0)
    moved = (means[2] + scales[:, None] * (means[labels] - means[2])).repeat(8, 1)
    cos, sin = torch.cos(at.t)[:, None], torch.sin(at.t)[:, None]
    v = cos * sin * (1 - STD**2) / (cos**2 * STD**2 + sin**2) * (at.x_t - cos * moved) - sin * moved
    yield equal("the direction is that of its class at its scale", v, at.v, 1e-10)
    yield equal("the conditions are those of the trajectories", labels.repeat(8), at.cond["class_labels"], 0.0)
    told = at.extra.scale
    yield equal("the student is told the scales", scales.repeat(8), 0 * at.t if told is None else told, 0.0)
    with mistake(DrawnGuidance, "__call__", lambda self, *at: REAL["__call__"](self, *at[:-1], 1 + at[-1])):
        yield differs("... and guided by 1 + a it is another", v, method.walk(batch).v, 1e-2)
