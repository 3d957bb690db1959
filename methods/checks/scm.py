"""Exact checks of scm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import EDM, LinearFlow, TrigFlow
from diffdistill.exact.analytic import FlowToData, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import AnyField, Check, differs, equal, gauss_hermite, gradient, mistake, two_points
from diffdistill.methods.scm import SCM, Config
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point, TangentMethod, normalised

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "distillation": {
        "mode": "distillation",
        "tangent_warmup": 500,
        "time_mean": -0.5,
        "time_std": 1.8,
        "max_grad_norm": 1.0,
        "norm": "rms",
        "norm_c": 0.1,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "steps": 1500,
    },
    "from data": {
        "mode": "training",
        "tangent_warmup": 500,
        "time_mean": -0.5,
        "time_std": 1.8,
        "max_grad_norm": 1.0,
        "norm": "rms",
        "norm_c": 0.1,
        "student_lr": 0.001,
        "steps": 3000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()


SOME = Batch(1, (2,), {}, None, torch.device("cpu"), (0, 0, 0))


def verify() -> Iterator[Check]:
    """Section 2.1's sanity items, and the mistakes that they must catch."""
    yield from _exact_map()
    yield from _any_field()
    yield from _start_of_warmup()
    yield from _from_data()
    yield from _loss()
    yield from _truncated()


def _method(network: nn.Module, **options: Any) -> SCM:
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
    return SCM(teacher, Config(**{"norm": "none", "derivative": "exact", **options}), student=student)


def _point(method: TangentMethod, t: float) -> Point:
    """Where the teacher's trajectories pass at that angle."""
    x0, eps = two_points(2)
    angle = torch.full((len(eps),), t, dtype=torch.float64)
    x_t = diffuse(MEAN + STD * x0, angle, eps)
    return Point(x_t, angle, method.teacher(x_t, angle, {}).v, torch.zeros_like(angle), {})


def _g(method: SCM, at: Point, r: float = 1.0) -> Tensor:
    return method.tangent(method.velocity(at).detach(), at, r)


def _exact_map() -> Iterator[Check]:
    """Items 1 and 2: f is the same along the trajectory, so that g is zero."""
    for t in (0.05, 0.6, 1.3, 1.57):
        method = _method(FlowToData(MEAN, STD))
        at = _point(method, t)
        yield equal(f"the exact map has g = 0, t = {t}", 0.0, _g(method, at), 1e-10, scale=1.0)
        with mistake(
            SCM, "derivative", lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest)
        ):
            yield differs(f"... which the derivative in t alone has not, t = {t}", 0.0, _g(method, at), 1e-4, scale=1.0)
        half = at._replace(v=at.v / 2)
        yield differs(f"... nor half the direction, t = {t}", 0.0, _g(method, half), 1e-4, scale=1.0)
    # A teacher of variance one: its trajectories are constant, and F = -tan(t/2) x.
    rest = Teacher(GaussianMixture([[0.0, 0.0]], 1.0).denoiser(), (2,))

    class Still(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return -torch.tan(t / 2)[:, None] * x_t

    method = SCM(
        rest, Config(norm="none", derivative="exact"), student=Denoiser(Still(), TrigFlow(), OUTPUTS["v_prediction"])
    )
    at = _point(method, 0.8)
    yield equal("the map of unit-variance data, F = -tan(t/2) x, has g = 0", 0.0, _g(method, at), 1e-12, scale=1.0)


REAL: dict[str, Any] = {name: getattr(SCM, name) for name in ("derivative", "tangent")}


def _along(method: SCM, at: Point, h: float, conditional: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """f a little further on the teacher's trajectory, or on the path of an image and its noise."""
    t = at.t + h
    if conditional is not None:
        x_t = diffuse(conditional[0], t, conditional[1])
    else:
        x_t = GaussianMixture(MEAN[None], STD[None]).flow_map(at.x_t, at.t, t)
    with torch.no_grad():
        return method.student(x_t, t, {}).x0


def _any_field() -> Iterator[Check]:
    """Item 3: for any network g is cos(t) times the derivative of f along the teacher's trajectory."""
    students = {
        "TrigFlow": Denoiser(AnyField(), TrigFlow(), OUTPUTS["v_prediction"]),
        "EDM": Denoiser(AnyField(), EDM(), OUTPUTS["edm"]),
        "flow matching": Denoiser(AnyField(1000.0), LinearFlow(), OUTPUTS["flow_prediction"]),
    }
    for name, student in students.items():
        method = SCM(gaussian_teacher(MEAN.tolist(), STD), Config(norm="none", derivative="exact"), student=student)
        for t in (0.3, 1.1):
            at, h = _point(method, t), 1e-4
            slope = (_along(method, at, h) - _along(method, at, -h)) / (2 * h)
            g = _g(method, at)
            yield equal(f"g is cos(t) df/dt along the trajectory, {name}, t = {t}", math.cos(t) * slope, g, 1e-6)
            x0, eps = two_points(2)
            pair = (MEAN + STD * x0, eps)
            other = (_along(method, at, h, pair) - _along(method, at, -h, pair)) / (2 * h)
            label = f"... and not along the path of image and noise, {name}, t = {t}"
            yield differs(label, math.cos(t) * other, g, 1e-2)
            yield differs(
                f"... nor at half the warm-up, {name}, t = {t}", math.cos(t) * slope, _g(method, at, 0.5), 1e-2
            )


def _start_of_warmup() -> Iterator[Check]:
    """Item 4: at r = 0 the fixed point is the teacher, whose loss is zero in distillation."""
    for norm in ("none", "rms", "l2"):
        method = _method(GaussianMixture(MEAN[None], STD[None]), norm=norm, tangent_warmup=10)
        at = _point(method, 0.7)
        yield equal(
            f"the teacher's own loss is zero at step 0, {norm}", 0.0, method.regression(0, at).loss, 1e-20, scale=1
        )
        yield differs(
            f"... and not when the derivative counts, {norm}", 0.0, method.regression(5, at).loss, 1e-3, scale=1
        )
    method = _method(AnyField())
    at = _point(method, 0.7)
    gap = -(math.cos(0.7) ** 2) * (method.velocity(at).detach() - at.v)
    yield equal("at r = 0 g is the distance to the teacher", gap, _g(method, at, 0.0), 1e-12)
    yield equal("... and linear in r", 0.7 * gap + 0.3 * _g(method, at), _g(method, at, 0.3), 1e-12)
    shares = [
        _method(FlowToData(MEAN, STD), tangent_warmup=n).config.warm(step)
        for n, step in ((10, 0), (10, 4), (10, 30), (0, 0))
    ]
    yield equal("r rises to 1", torch.tensor([0.0, 0.4, 1.0, 1.0]), torch.tensor(shares), 1e-12)


def _from_data() -> Iterator[Check]:
    """Item 5: the mean of g over what x_t may come from is that of the teacher's direction."""
    method = _method(AnyField(), mode="training")
    nodes, weights = gauss_hermite(12)
    for t in (0.4, 1.2):
        cos, sin = math.cos(t), math.sin(t)
        x_t = torch.tensor([0.3, -1.1]).double()
        variance = cos**2 * STD**2 + sin**2
        mean = MEAN + cos * STD**2 * (x_t - cos * MEAN) / variance
        grid = torch.cartesian_prod(nodes, nodes)
        x0 = mean + STD * sin / variance.sqrt() * grid
        eps = (x_t - cos * x0) / sin
        share = torch.cartesian_prod(weights, weights).prod(1)[:, None]
        angle = torch.full((len(x0),), t, dtype=torch.float64)
        v = cos * eps - sin * x0
        at = Point(x_t.repeat(len(x0), 1), angle, v, torch.zeros_like(angle), {})
        exact = Point(at.x_t[:1], angle[:1], method.teacher(at.x_t[:1], angle[:1], {}).v, at.r[:1], {})
        yield equal(
            f"the mean of g from data is g, t = {t}", _g(method, exact)[0], (share * _g(method, at)).sum(0), 1e-9
        )
        normal = _method(AnyField(), mode="training", norm="l2")
        norm = normal.config.norm, normal.config.norm_c
        mean = (share * normalised(_g(method, at), *norm)).sum(0)
        marginal = normalised(_g(method, exact), *norm)[0]
        yield differs(f"... which is not so once it is normalised, t = {t}", marginal, mean, 1e-3)


def _loss() -> Iterator[Check]:
    """The loss and its gradient on F: -2/d g of each sample, weighted, and what the weight learns."""
    d = 2
    for norm, size in (("rms", 1 / math.sqrt(d)), ("l2", 1.0)):
        network = AnyField()
        method = _method(network, norm=norm, norm_c=0.3)
        at = _point(method, 0.9)
        g = _g(method, at)
        g = g / (size * g.norm(dim=1, keepdim=True) + 0.3)
        nn.init.constant_(method.weight.double().linear.bias, 0.7)
        prior = 1 / math.tan(0.9)
        outcome = method.regression(10**9, at)
        expected = math.exp(-0.7) * prior * g.square().mean()
        yield equal(f"the loss is the weighted |g/(|g| + c)|^2, {norm}", expected, outcome.loss, 1e-9)
        own = method.student(at.x_t, at.t, {}).v
        closed = -2 * math.exp(-0.7) * prior / g.numel() * gradient((own * g).sum(), *network.parameters())
        got = gradient(outcome.loss, *network.parameters())
        yield equal(f"its gradient is that of -2 g F, {norm}", closed, got, 1e-9)
        with mistake(torch.Tensor, "detach", lambda self: self):
            wrong = gradient(method.regression(10**9, at).loss, *network.parameters())
        yield differs(f"... which a target with a gradient has not, {norm}", closed, wrong, 1e-3)
        loss = method.weight_turn(SOME).loss
        yield equal(f"the adaptive weight's loss, {norm}", expected + 0.7, loss, 1e-6)
        rest = gradient(loss, method.weight.linear.bias)
        yield equal(f"... and its gradient, 1 - e^(-w) error, {norm}", 1 - expected, rest[0], 1e-6)


def _truncated() -> Iterator[Check]:
    """Item of 13.16: above t' the exact map has no loss; any constant f has none either, but for the boundary."""

    class Constant(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return (torch.cos(t)[:, None] * x_t - 0.3) / torch.sin(t)[:, None]

    sigma, t = 0.4, math.atan(0.4 / 0.5)
    first = Denoiser(FlowToData(MEAN, STD), TrigFlow(), OUTPUTS["v_prediction"])
    options = Config(
        mode="training", norm="none", derivative="exact", truncate_at=sigma, boundary_weight=0.1, tangent_warmup=0
    )
    losses = {}
    for name, network in (("exact", FlowToData(MEAN, STD)), ("constant", Constant())):
        method = SCM(Teacher(first, (2,)), options, student=Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"]))
        exact = gaussian_teacher(MEAN.tolist(), STD).denoiser
        for where, angle in (("above", t + 0.3), ("at", method.least)):
            at = _point(_method(FlowToData(MEAN, STD)), angle)
            losses[name, where] = method.regression(0, at._replace(v=exact(at.x_t, at.t, {}).v)).loss
    for where in ("above", "at"):
        yield equal(f"TCM: the exact map has no loss {where} t'", 0.0, losses["exact", where], 1e-18, scale=1.0)
    yield equal("TCM: a constant has none above t' either", 0.0, losses["constant", "above"], 1e-18, scale=1.0)
    yield differs(
        "TCM: ... but at t', where the first stage says what f is", 0.0, losses["constant", "at"], 1e-3, scale=1
    )
