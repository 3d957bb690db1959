"""Exact checks of mdt_dist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import LinearFlow, Schedule, TrigFlow
from diffdistill.exact.analytic import FlowToData, GaussianMixture, class_gaussians_teacher, gaussian_teacher
from diffdistill.exact.checks import AnyField, Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.mdt_dist import Config, MDTDist
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "both terms": {
        "guidance_scale": 1.5,
        "tangent_warmup": 700,
        "max_grad_norm": 1.0,
        "student_lr": 0.0005,
        "steps": 3000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
ANGLES = (0.2, 0.9, 1.5, math.pi / 2)
REAL: dict[str, Any] = {"derivative": MDTDist.derivative}


def verify() -> Iterator[Check]:
    """Section 7.5's sanity items, and the mistakes that they must catch."""
    yield from _exact_map()
    yield from _warmed()
    yield from _as_the_paper()
    yield from _own_samples()
    yield from _scales()


def _method(
    network: nn.Module, teacher: Teacher | None = None, schedule: Schedule | None = None, **options: Any
) -> Any:
    kind = "v_prediction" if schedule is None else "flow_prediction"
    student = Denoiser(network, schedule or TrigFlow(), OUTPUTS[kind])
    own = Config(**{"derivative": "exact", "norm": "none", "tangent_warmup": 0, "matching_weight": 1.0, **options})
    return MDTDist(teacher or gaussian_teacher(MEAN.tolist(), STD), own, student=student)


class _Double(Batch):
    """A batch whose noise is in float64."""

    def randn(self, purpose: str) -> Tensor:
        """(B, 2) as the batch's own."""
        return super().randn(purpose).double()


def _batch(**cond: Tensor) -> Batch:
    return _Double(16, (2,), cond, None, torch.device("cpu"), (0, 0, 0))


def _at(method: MDTDist, angle: float, **cond: Tensor) -> Point:
    """Where images of the teacher's lie, and where its path goes on."""
    x0, eps = two_points(2)
    t = torch.full((16,), angle, dtype=torch.float64)
    x_t = diffuse(MEAN + STD * x0, t, eps)
    return Point(x_t, t, method.teacher(x_t, t, cond).v, torch.zeros_like(t), cond)


def _gap(method: MDTDist, at: Point) -> Tensor:
    return method.gap(method.velocity(at).detach(), at)


def _exact_map() -> Iterator[Check]:
    """u = (z - Phi(z; t to 0))/s satisfies u = v - s du/ds; with d/(|d| + c) it does not."""
    method = _method(FlowToData(MEAN, STD))
    for angle in ANGLES:
        at, where = _at(method, angle), f"at {angle:.3g}"
        yield equal(f"the exact average velocity misses nothing {where}", 0.0, _gap(method, at), 1e-10, scale=1.0)
        yield equal(f"... and has no loss {where}", 0.0, method.regression(0, at).loss, 1e-18, scale=1.0)
        yield differs(
            f"... but with half the direction {where}", 0.0, _gap(method, at._replace(v=at.v / 2)), 1e-3, scale=1
        )
        still = lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest)  # noqa: E731
        with mistake(MDTDist, "derivative", still):
            yield differs(f"... and with the derivative in s alone {where}", 0.0, _gap(method, at), 1e-3, scale=1.0)
        limited, whole = (_method(FlowToData(MEAN, STD), **o) for o in ({"derivative_c": 0.1}, {"norm": "rms"}))
        yield differs(f"du/ds over its norm moves the minimum {where}", 0.0, _gap(limited, at), 1e-2, scale=1.0)
        loss = whole.regression(99, at).loss
        yield equal(f"... and the whole over its own does not {where}", 0.0, loss, 1e-18, scale=1.0)


def _warmed() -> Iterator[Check]:
    """The whole divided by its norm, and du/ds that counts more and more."""
    plain, ruled = _method(AnyField()), _method(AnyField(), norm="rms", norm_c=0.3, tangent_warmup=10)
    at = _at(plain, 0.9)
    f = plain.velocity(at).detach()
    apart = plain.rho(at.t)[:, None] * (f - at.v)
    change = _gap(plain, at) - apart
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        gap = apart + share * change
        gap = gap / (gap.square().mean(1, keepdim=True).sqrt() + 0.3)
        yield equal(f"the loss of step {step}", gap.square().mean(), ruled.regression(step, at).loss, 1e-9)


def _as_the_paper() -> Iterator[Check]:
    """For any flow-matching network loss and gradient are those of the authors' code in its own coordinates."""
    cases: list[tuple[float, float | None]] = [(1.0, None), (0.5, None), (0.5, 0.1)]
    for std, c in cases:
        network, schedule = AnyField(), LinearFlow(data_std=std, time_scale=1.0)
        other = Denoiser(_Other(), schedule, OUTPUTS["flow_prediction"])
        method = _method(network, Teacher(other, (2,)), schedule, derivative_c=c)
        x0, eps = two_points(2)
        x0 = MEAN + STD * x0
        for time in (0.3, 0.8, 1.0):
            s = torch.full((16,), time, dtype=torch.float64)
            z = (1 - time) * std * x0 + time * eps
            v = other.network(z, s).detach()
            u, d = jvp(network, (z, s), (v, torch.ones_like(s)))[:2]
            d = d if c is None else d / (d.norm(dim=1, keepdim=True) + c)
            paper = (u - (v - time * d).detach()).square().mean()
            t = schedule.angle(s)
            x_t = diffuse(x0, t, eps)
            at = Point(x_t, t, method.teacher(x_t, t, {}).v, torch.zeros_like(t), {})
            got = method.regression(0, at).loss
            where = f"s = {time}, data of deviation {std}, c = {c}"
            yield equal(f"the loss is the authors', {where}", paper, got, 1e-10)
            slopes = gradient(paper, *network.parameters())
            yield equal(f"... and its gradient, {where}", slopes, gradient(got, *network.parameters()), 1e-9)
            with mistake(MDTDist, "rho", lambda self, t: torch.ones_like(t)):
                wrong = method.regression(0, at).loss
            if time < 1:
                yield differs(f"... which a loss without the change of coordinates is not, {where}", paper, wrong, 1e-3)


class _Other(nn.Module):
    """Another smooth field than `AnyField`."""

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        return torch.sin(z.flip(1) + s[:, None]) - 0.3 * z


def _own_samples() -> Iterator[Check]:
    """Of a student that is exact for another law, the samples are pulled by that law's velocity less the teacher's.

    The student's derivative is along the teacher's path, so that the difference comes through the map to clean data.
    """
    mean, std = torch.tensor([-0.2, 0.5]).double(), torch.tensor([0.8, 0.9]).double()
    method, batch = _method(FlowToData(mean, std)), _batch()
    x = method.student(*method.sampler().start(batch.randn("matching/z")), {}).x0
    t, eps = method.angles(batch, "matching/t", 1.0, 1.0), batch.randn("matching/eps")
    x_t = diffuse(x.detach(), t, eps)
    own, teachers = (GaussianMixture(m[None], s[None])(x_t, t) for m, s in ((mean, std), (MEAN, STD)))
    rho, spread = (
        torch.sin(t) + torch.cos(t),
        torch.sqrt(torch.cos(t)[:, None] ** 2 * std**2 + torch.sin(t)[:, None] ** 2),
    )
    plain = rho[:, None] * (own - teachers)  # of flow velocities
    gap = plain * rho[:, None] * std / spread
    term = method.second_term(batch)
    yield equal("the loss is its square", gap.square().mean(), term.loss, 1e-9)
    yield differs("... and not of the difference where it is", plain.square().mean(), term.loss, 1e-2)
    where = list(method.student.parameters())
    pull = (-2 * gap * x).mean()
    yield equal(
        "the gradient of x is -2 (own velocity - teacher's)", gradient(pull, *where), gradient(term.loss, *where), 1e-9
    )
    yield differs("... and not the other way", gradient(-pull, *where), gradient(term.loss, *where), 1e-1)
    zero = _method(FlowToData(MEAN, STD)).second_term(batch).loss
    yield equal("the teacher's own law is at rest", 0.0, zero, 1e-18, scale=1.0)
    doubled = _method(FlowToData(mean, std), matching_weight=2.0).second_term(batch).loss
    yield equal("its weight", 2 * term.loss, doubled, 1e-12)
    alone = _method(FlowToData(mean, std), matching_weight=0.0).second_term(batch)
    yield equal("without it velocity matching is alone", 1.0, float(alone is None), 0.0)


def _scales() -> Iterator[Check]:
    """Each term has the teacher guided by its own scale, 1 being none."""
    means = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double()
    teacher, labels = class_gaussians_teacher(means, STD), {"class_labels": torch.zeros(16, dtype=torch.int64)}
    for scale in (1.0, 2.5):
        guided = FlowToData(means[1] + scale * (means[0] - means[1]), STD)
        method = _method(_Deaf(guided), teacher, guidance_scale=scale, matching_scale=1 + scale)
        at = _at(method, 0.9, **labels)
        yield equal(f"the map of the teacher guided by {scale} misses nothing", 0.0, _gap(method, at), 1e-10, scale=1.0)
        other = _method(_Deaf(guided), teacher, guidance_scale=1 + scale, matching_scale=scale)
        yield differs(
            f"... nor of one guided by 1 + {scale}", 0.0, _gap(other, _at(other, 0.9, **labels)), 1e-2, scale=1.0
        )
        own, others = (m.second_term(_batch(**labels)).loss for m in (other, method))
        yield equal(f"its samples, judged by {scale}, rest", 0.0, own, 1e-18, scale=1.0)
        yield differs(f"... and judged by 1 + {scale} do not", 0.0, others, 1e-3, scale=1.0)


class _Deaf(nn.Module):
    """A network under a class label that it does not hear."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.network(x_t, t)
