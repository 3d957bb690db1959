"""Exact checks of rcm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffineGenerator, FlowToData, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import (
    AffineGame,
    AnyField,
    Check,
    differs,
    equal,
    gradient,
    matching_checks,
    mistake,
    two_points,
)
from diffdistill.methods import rcm
from diffdistill.methods.rcm import RCM, Config, Consistency
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
_SHARED = {
    "student_lr": 0.001,
    "fake_score_lr": 0.002,
    "beta1": 0.0,
    "weight_decay": 0.0,
    "update_ratio": 1,
    "guidance_scale": 1.5,
    "tangent_warmup": 300,
    "time_mean": -0.5,
    "time_std": 1.8,
    "norm": "rms",
    "norm_c": 0.1,
    "consistency_weight": 1.0,
    "time_low": 0.0,
    "time_high": 1.0,
    "steps": 1500,
}
PLANE = {
    "one step": {**_SHARED, "student_steps": 1},
    "two steps": {**_SHARED, "student_steps": 2, "simulated_times": "drawn"},
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
OTHER_MEAN, OTHER_STD = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
T, PATH_T = 0.8, 0.9


def verify() -> Iterator[Check]:
    """Section 2.2's sanity items, and the mistakes that they must catch."""

    def make(parts: AffineGame, normalise: bool) -> RCM:
        config = Config(normalise=normalise, student_steps=1)
        return RCM(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from _any_field()
    yield from _warm_up()
    yield from _differences()
    yield from _fixed_point()
    yield from _away_from_it()
    yield from _simulation()
    yield from matching_checks(make)


class _Settled(RCM):
    """Its two losses at one time each."""

    def times(self, player: str, batch: Batch) -> Tensor:
        return torch.full((batch.size,), T, dtype=torch.float64)


def _method(network: nn.Module, score: GaussianMixture | None = None, **options: Any) -> RCM:
    """With that network as the student, and the exact fake score of the teacher's or another Gaussian."""
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
    own = {"norm": "none", "derivative": "exact", "student_steps": 1, "tangent_warmup": 0, "normalise": False}
    fake_score = (score or GaussianMixture(MEAN[None], STD[None])).denoiser()
    method = _Settled(teacher, Config(**{**own, **options}), student=student, fake_score=fake_score)
    only_trains("student", trainable(method.players))
    return method


def _point(method: RCM, t: float) -> Point:
    """Where the teacher's trajectories pass at that angle."""
    x0, eps = two_points(2)
    angle = torch.full((len(eps),), t, dtype=torch.float64)
    x_t = diffuse(MEAN + STD * x0, angle, eps)
    return Point(x_t, angle, method.teacher(x_t, angle, {}).v, torch.zeros_like(angle), {})


def _g(method: RCM, at: Point, r: float = 1.0) -> Tensor:
    return method.consistency.tangent(method.consistency.velocity(at).detach(), at, r)


@torch.no_grad()
def _along(method: RCM, at: Point, h: float) -> Tensor:
    """f a little further on the teacher's trajectory."""
    t = at.t + h
    return method.student(GaussianMixture(MEAN[None], STD[None]).flow_map(at.x_t, at.t, t), t, {}).x0


def _any_field() -> Iterator[Check]:
    """For any network g is cos(t) times the derivative of f along the teacher's trajectory, and 0 for the exact map."""
    still = REAL["derivative"]
    for t in (0.3, 1.1, 1.57):
        method, h = _method(AnyField()), 1e-4
        at = _point(method, t)
        slope = (_along(method, at, h) - _along(method, at, -h)) / (2 * h)
        yield equal(f"g is cos(t) df/dt along the trajectory, t = {t}", math.cos(t) * slope, _g(method, at), 1e-5)
        yield differs(f"... and not at half the warm-up, t = {t}", math.cos(t) * slope, _g(method, at, 0.5), 1e-2)
        exact = _method(FlowToData(MEAN, STD))
        yield equal(f"the exact map has g = 0, t = {t}", 0.0, _g(exact, at), 1e-10, scale=1.0)
        with mistake(Consistency, "derivative", lambda self, at, speed: still(self, at._replace(v=0 * at.v), speed)):
            wrong = _g(exact, at)
        yield differs(f"... which the derivative in t alone has not, t = {t}", 0.0, wrong, 1e-4, scale=1.0)


REAL: dict[str, Any] = {"derivative": Consistency.derivative}


def _warm_up() -> Iterator[Check]:
    """At r = 0 the fixed point is the teacher; the first part's factor falls from cos(t) to cos(t)^2."""
    method = _method(AnyField())
    for t in (0.4, 1.2):
        at = _point(method, t)
        gap = method.consistency.velocity(at).detach() - at.v
        yield equal(f"at r = 0 g is the distance to the teacher, t = {t}", -math.cos(t) * gap, _g(method, at, 0), 1e-12)
        rising = -_g(method, at) - math.cos(t) ** 2 * gap
        for r in (0.3, 0.8):
            share = math.cos(t) * math.sqrt(1 - r**2 * math.sin(t) ** 2)
            got = _g(method, at, r)
            yield equal(f"g at r = {r}, t = {t}", -share * gap - r * rising, got, 1e-12)
            linear = (1 - r) * _g(method, at, 0) + r * _g(method, at)
            yield differs(f"... which is not linear in r, t = {t}", linear, got, 1e-3)
    teacher = _method(GaussianMixture(MEAN[None], STD[None]), tangent_warmup=10)
    at = _point(teacher, 0.7)
    for norm in ("none", "l2"):
        with mistake(teacher.consistency, "own", Config(norm=norm, tangent_warmup=10)):
            first, later = (teacher.consistency.regression(step, at).loss for step in (0, 5))
        yield equal(f"the teacher's own loss is zero at step 0, {norm}", 0.0, first, 1e-20, scale=1.0)
        yield differs(f"... and not when the derivative counts, {norm}", 0.0, later, 1e-3, scale=1.0)


def _differences() -> Iterator[Check]:
    """The paper's other derivatives: of first order, and the discrete one is that of the discrete residual."""
    t, errors = 0.7, {}
    exact = _method(AnyField())
    at = _point(exact, t)
    for kind in ("semi", "backward"):
        for h in (0.02, 0.01):
            method = _method(exact.student.network, derivative=kind, derivative_step=h)
            errors[kind, h] = float((_g(method, at) - _g(exact, at)).norm() / _g(exact, at).norm())
        yield equal(f"half the step has half the error, {kind}", 2.0, errors[kind, 0.02] / errors[kind, 0.01], 0.05)
    h = 0.0625
    method = _method(exact.student.network, derivative="backward", derivative_step=h)
    with torch.no_grad():
        f, x = method.student(at.x_t, at.t, {}), math.cos(h) * at.x_t - math.sin(h) * at.v
        moved = f.x0 - method.student(x, at.t - h, {}).x0
        change = method.consistency.derivative(at, torch.ones_like(at.t))
    closed = math.sin(h) * (-math.cos(t - h) * (f.v - at.v) - math.sin(t - h) * (at.x_t + change))
    yield equal("the discrete derivative is that of f(x_t, t) - f(x_(t-h), t-h)", closed, moved, 1e-12)
    late = math.sin(h) * (-math.cos(t) * (f.v - at.v) - math.sin(t) * (at.x_t + change))
    yield differs("... with the factors of t - h, not of t", late, moved, 1e-3)


class _Signs(Batch):
    """Two dimensions whose noise is all signs: exact for moments of second order; images of the teacher's Gaussian."""

    def randn(self, purpose: str) -> Tensor:
        """(256, 2), z and path/eps being one pair of columns each, and student/eps that of z's other half."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 8)
        return signs[:, {"z": 0, "student/eps": 2, "path/eps": 4, "image": 6, "z 1": 4, "z 2": 6}.get(purpose, 2) :][
            :, :2
        ]


def _batch(step: int = 0) -> _Signs:
    made = _Signs(256, (2,), {}, None, torch.device("cpu"), (0, step, 0))
    return _Signs(256, (2,), {}, MEAN + STD * made.randn("image"), made.device, made.key)


def _pull(method: RCM, step: int = 0) -> Tensor:
    """The student's whole gradient in its parameters, with both losses at one time."""
    with mistake(rcm, "edm_log_normal", lambda schedule, n, *rest: torch.full((n,), PATH_T, dtype=torch.float64)):
        loss = method.turns(0)[0].loss(_batch(step)).loss
    return gradient(loss, *method.student.network.parameters())


def _fixed_point() -> Iterator[Check]:
    """The exact map with its exact fake score stays; each term is blind to what the other sees."""
    for normalise, norm in ((False, "none"), (True, "l2")):
        same: dict[str, Any] = {"normalise": normalise, "norm": norm}
        pull = _pull(_method(FlowToData(MEAN, STD), **same))
        yield equal(f"the exact map stays, {norm}", 0.0, pull, 1e-9, scale=1.0)
        late = GaussianMixture(OTHER_MEAN[None], OTHER_STD[None])
        moved = _pull(_method(FlowToData(MEAN, STD), late, **same))
        yield differs(f"... and not with a fake score of other samples, {norm}", 0.0, moved, 1e-2, scale=1.0)
    affine = AffineGenerator(MEAN, STD)
    alone = _pull(_method(affine, consistency_weight=0.0))
    yield equal("a map that draws the distribution from noise alone is left by the matching", 0.0, alone, 1e-9, scale=1)
    method = _method(affine)
    loss = method.consistency.regression(0, _point(method, PATH_T)).loss
    yield differs("... and the consistency loss sees it", 0.0, loss, 3e-2, scale=1.0)


def _away_from_it() -> Iterator[Check]:
    """The gradient is that of the matching, which is in closed form, and the weighted one of the consistency."""
    network, weight = FlowToData(OTHER_MEAN, OTHER_STD), 0.3
    score = GaussianMixture(OTHER_MEAN[None], OTHER_STD[None])
    method = _method(network, score, consistency_weight=weight)
    cos2, sin2 = math.cos(T) ** 2, math.sin(T) ** 2
    big_v, big_u = cos2 * STD**2 + sin2, cos2 * OTHER_STD**2 + sin2
    kl = torch.cat([cos2 * (OTHER_MEAN - MEAN) / big_v, cos2 * OTHER_STD * (1 / big_v - 1 / big_u)]) / 2
    at, h = _path_point(method), 1e-4
    g = math.cos(PATH_T) * (_along(method, at, h) - _along(method, at, -h)) / (2 * h)
    own = method.student(at.x_t, at.t, {}).v
    pull = -2 * gradient((own * g).mean(), *network.parameters())
    yield equal("the gradient of both terms", kl + weight * pull, _pull(method), 1e-6)
    yield differs("... and not that of the matching alone", kl, _pull(method), 1e-2)
    rising = _method(network, score, consistency_weight=weight, tangent_warmup=10)
    yield equal("while r rises the samples are not judged: r = 0 at step 0", 0.0, _matched(rising, 0), 0.0)
    yield equal("... and they are from r = 1 on", 1.0, _matched(rising, 10), 0.0)
    yield equal("the fake score's samples are the student's in each case", 1.0, float(_learns(rising)), 0.0)


def _path_point(method: RCM) -> Point:
    batch = _batch()
    t = torch.full((256,), PATH_T, dtype=torch.float64)
    x_t = diffuse(batch.images, t, batch.randn("path/eps"))
    return Point(x_t, t, method.teacher(x_t, t, {}).v, torch.zeros_like(t), {})


def _matched(method: RCM, step: int) -> float:
    return float("gap" in method.turns(0)[0].loss(_batch(step)).shown)


def _learns(method: RCM) -> bool:
    """Whether the fake score's loss in a step of the warm-up is that on the student's samples."""
    student, fake_score = method.turns(0)
    student.loss(_batch())
    expected = OTHER_MEAN + OTHER_STD * _batch().randn("z")
    with mistake(method, "denoising", lambda x, t, eps, cond: (x - expected).abs().sum()):
        return bool(fake_score.loss(_batch()).loss < 1e-9)


def _simulation() -> Iterator[Check]:
    """The exact map's own steps, at whatever times, lead to the teacher's marginals; times descend."""
    method = _method(FlowToData(MEAN, STD), student_steps=4)
    for s in (0.4, 1.2):
        with mistake(rcm, "native_uniform", lambda schedule, n, draw, s=s: torch.full((n,), s, dtype=torch.float64)):
            x_t, t = method.simulated(2, _batch())
        got = torch.cat([x_t.mean(0), x_t.var(0, unbiased=False)])
        closed = torch.cat([math.cos(s) * MEAN, math.cos(s) ** 2 * STD**2 + math.sin(s) ** 2])
        yield equal(f"mean and variance of what the last step reads are the teacher's, t = {s}", closed, got, 1e-12)
        yield equal(f"... and its time, t = {s}", s, t.mean(), 1e-12)
    times = torch.stack([method.simulated(k, _batch())[1] for k in range(3)])
    yield equal("the first step reads noise", math.pi / 2, times[0].mean(), 1e-12)
    rises = (times[1:] > times[:-1]).double().mean()
    yield equal("times never rise", 0.0, rises, 0.0)
    yield differs("... and are drawn for each sample", 0.0, times[1].std(), 0.1, scale=1.0)
    levels = _method(FlowToData(MEAN, STD), student_steps=4, simulated_times="levels")
    _, t = levels.simulated(2, _batch())
    yield equal("or they are the sampler's levels", float(levels.sampler().levels[2]), t.mean(), 1e-12)
    x = method.generate(_batch(3), "student")
    yield differs("the last step has a gradient", 0.0, gradient(x.sum(), *method.student.parameters()), 1e-3, scale=1.0)
