"""Exact checks of ctm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import AnyField, Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods import ctm
from diffdistill.methods.ctm import CTM, Config, Span
from diffdistill.players.sampler import Gamma
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import adversary, following
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one jump": {
        "grid": "native",
        "grid_points": 18,
        "solver_steps": 6,
        "dsm_weight": 0.0,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.0008,
        "target_ema": 0.95,
        "student_lr": 0.001,
        "steps": 1000,
    },
    "three jumps with noise between, and with the denoising": {
        "grid": "native",
        "grid_points": 18,
        "solver_steps": 6,
        "dsm_weight": 1.0,
        "gamma": 0.5,
        "student_steps": 3,
        "distance": "huber",
        "huber_c": 0.0008,
        "target_ema": 0.95,
        "student_lr": 0.001,
        "steps": 1000,
    },
}

MEAN, STD = torch.tensor([[0.7, -0.4]]).double(), torch.tensor([[0.5, 1.3]]).double()
SLOPE = torch.tensor([0.4, -1.1]).double()
SPANS = ((1.2, 0.8, 0.4), (1.2, 0.8, 0.8), (1.3, 0.5, 0.0), (math.pi / 2, 1.0, 0.3))


def _variance(t: Tensor, std: Tensor) -> Tensor:
    """(B, 2) of x_t."""
    return torch.cos(t)[:, None] ** 2 * std**2 + torch.sin(t)[:, None] ** 2


class Jumps(nn.Module):
    """F of the exact map of N(mean, std^2) from t to r, both learned (1, 2), for TrigFlow."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """(B, 2) (cos(t - r) x_t - x_r)/sin(t - r), and the velocity at r = t."""
        cos, sin, gap = torch.cos(t)[:, None], torch.sin(t)[:, None], (t - r)[:, None]
        centred, still = x_t - cos * self.mean, gap == 0
        x_r = torch.cos(r)[:, None] * self.mean + centred * torch.sqrt(_variance(r, self.std) / _variance(t, self.std))
        velocity = cos * sin * (1 - self.std**2) / _variance(t, self.std) * centred - sin * self.mean
        return torch.where(still, velocity, (torch.cos(gap) * x_t - x_r) / torch.sin(torch.where(still, 1.0, gap)))


class _Linear(LatentAdversary):
    """The method's own adversary with the discriminator d(x_t) = a x_t."""

    def __init__(self, teacher: Teacher, options: Any):
        self.teacher, self.options, self.heads = teacher.denoiser, options, nn.ModuleList()
        self.samples = {}

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Tensor:
        return (diffuse(x, t, eps) @ SLOPE)[None]


class _Moments(Batch):
    """A batch whose noise has its moments exactly."""

    def randn(self, purpose: str) -> Tensor:
        return two_points(2)[1]


def _told(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
    return network(x, time, extra.r)


def _untold(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
    return network(x, time)


def _method(network: nn.Module, call: Any = _told, **options: Any) -> CTM:
    student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"], extra_call=call)
    own: dict[str, Any] = {"distance": "l2", "grid": "native", "grid_points": 9, "dsm_weight": 0.0}
    with mistake(following, "LatentAdversary", _Linear):
        return CTM(gaussian_teacher(MEAN[0].tolist(), STD[0]), Config(**{**own, **options}), student=student)


def _at(*angles: float) -> list[Tensor]:
    return [torch.full((16,), angle, dtype=torch.float64) for angle in angles]


def _x(t: Tensor) -> Tensor:
    """(16, 2) noised data, which has its two first moments exactly."""
    z, eps = two_points(2)
    return diffuse(MEAN + STD * z, t, eps)


def _batch() -> Batch:
    z, _ = two_points(2)
    return _Moments(16, (2,), {}, MEAN + STD * z, torch.device("cpu"), (0, 0, 0))


EXACT = GaussianMixture(MEAN, STD)


def verify() -> Iterator[Check]:
    """Section 1.3's sanity items, and the mistakes that they must catch."""
    yield from _jumps()
    yield from _exact_student()
    yield from _any_student()
    yield from _solver()
    yield from _spans()
    yield from _denoising()
    yield from _balance()
    yield from _gan()
    yield from _sampling()


def _jumps() -> Iterator[Check]:
    """G is the exact map, g is in sigma's coordinates what the paper says, and jumps compose."""
    method = _method(Jumps(MEAN, STD))
    told, untold = method.student, _method(EXACT, _untold).student
    for t, u, s in (_at(*span) for span in SPANS):
        x, where = _x(t), f"from {float(t[0]):.3g} by {float(u[0]):.3g} to {float(s[0]):.3g}"
        jump = method.jump(told, x, t, s, {})
        yield equal(f"G is the exact map {where}", EXACT.flow_map(x, t, s), jump, 1e-12)
        twice = method.jump(told, method.jump(told, x, t, u, {}), u, s, {})
        yield equal(f"G(G(x, t, u), u, s) - G(x, t, s) is zero {where}", 0.0, twice - jump, 1e-10, scale=1.0)
        share = (torch.tan(s) / torch.tan(t))[:, None]
        sigma = (x / torch.cos(t)[:, None], jump / torch.cos(s)[:, None])
        g = told(x, t, {}, Extra(r=s)).x0
        yield equal(f"G = s/t x + (1 - s/t) g {where}", share * sigma[0] + (1 - share) * g, sigma[1], 1e-9)
        other = method.jump(untold, x, t, s, {})
        twice = method.jump(untold, method.jump(untold, x, t, u, {}), u, s, {})
        if float(s[0]) < float(u[0]):
            yield differs(f"... which the denoiser's jumps do not {where}", 0.0, twice - other, 1e-3, scale=1.0)
        yield equal(f"no jump is none, t = {float(t[0]):.3g}", x, method.jump(told, x, t, t, {}), 0.0)
        cos = torch.cos(t)[:, None]
        mean = MEAN + cos * STD**2 * (x - cos * MEAN) / _variance(t, STD)
        yield equal(f"g(x, t, t) is the denoiser, t = {float(t[0]):.3g}", mean, told(x, t, {}, Extra(r=t)).x0, 1e-12)
        near = [(told(x, t, {}, Extra(r=t - h)).x0 - mean).norm() for h in (0.02, 0.01)]
        yield equal(
            f"... to which g tends with order 1, t = {float(t[0]):.3g}", 1.0, torch.log2(near[0] / near[1]), 0.05
        )


def _span(t: Tensor, u: Tensor, s: Tensor) -> Span:
    return Span(t, torch.stack([t, u]), s)


def _exact_student() -> Iterator[Check]:
    """On the trajectory the exact map has no loss and no gradient."""
    for t, u, s in (_at(*span) for span in SPANS):
        method, where = _method(Jumps(MEAN, STD)), f"{float(t[0]):.3g}, {float(u[0]):.3g}, {float(s[0]):.3g}"
        x, own = _x(t), list(method.student.parameters())
        loss = method.following(x, EXACT.flow_map(x, t, u), _span(t, u, s), {}).loss
        yield equal(f"the exact map has no loss, {where}", 0.0, loss, 1e-18, scale=1.0)
        yield equal(f"... and no gradient, {where}", 0.0, gradient(loss, *own), 1e-10, scale=1.0)
        loss = method.following(x, x, _span(t, u, s), {}).loss
        yield differs(f"... as it has without the solver, {where}", 0.0, loss, 1e-3, scale=1.0)


def _any_student() -> Iterator[Check]:
    """Another Gaussian's map, and a slow copy with a third: loss and gradient in closed form."""
    (m, b), (far, wide) = (MEAN + 0.3, STD * 1.4), (MEAN - 0.2, STD * 0.8)
    for t, u, s in (_at(*span) for span in SPANS):
        method, where = _method(Jumps(m, b)), f"{float(t[0]):.3g}, {float(u[0]):.3g}, {float(s[0]):.3g}"
        method.target.network.load_state_dict(Jumps(far, wide).state_dict())
        own, x = list(method.student.parameters()), _x(t)
        x_u = EXACT.flow_map(x, t, u)

        def ahead(x: Tensor, t: Tensor) -> Tensor:
            kept = torch.sqrt(_variance(s, b) / _variance(t, b))  # noqa: B023
            return torch.cos(s)[:, None] * m + kept * (x - torch.cos(t)[:, None] * m)  # noqa: B023

        outer = wide / torch.sqrt(_variance(s, wide))
        gap = outer * (ahead(x, t) - ahead(x_u, u))
        kept = torch.sqrt(_variance(s, b) / _variance(t, b))
        cos, end = torch.cos(t)[:, None], torch.cos(s)[:, None]
        slope = kept * b * (end**2 / _variance(s, b) - cos**2 / _variance(t, b))
        closed = torch.cat([(gap * outer * (end - cos * kept)).mean(0), (gap * outer * slope * (x - cos * m)).mean(0)])

        def got() -> tuple[Tensor, Tensor]:
            loss = method.following(x, x_u, _span(t, u, s), {}).loss  # noqa: B023
            return loss.detach(), gradient(loss, *own)  # noqa: B023

        loss, slopes = got()
        yield equal(f"the loss, {where}", gap.square().mean(), loss, 1e-10)
        yield equal(f"its gradient, through the frozen outer jump, {where}", closed, slopes, 1e-9)
        with mistake(CTM, "both", lambda self, seed, x, own, target: [own(), target()]):
            wrong = got()[1]
        if float(s[0]) < float(u[0]):
            yield differs(f"... but not through the target, {where}", closed, wrong, 1e-3)
        if float(s[0]) > 0:
            with mistake(method, "target", method.student):
                yield differs(f"... and not with the student outside, {where}", closed, got()[1], 1e-3)


def _solver() -> Iterator[Check]:
    """n Heun steps of a Gaussian teacher are a product of factors, and of second order."""
    errors = []
    for points in (9, 17, 33):
        method = _method(Jumps(MEAN, STD), grid_points=points)
        first, last = points // 8, points // 8 + 5 * (points // 8)
        path = method.grid[first : last + 1, None].expand(-1, 16)
        x = _x(path[0])
        got = method.less_noisy(x, x, x, Span(path[0], path, path[-1]), {})
        sigma, factor = torch.tan(path[:, :1]), torch.ones(1, 2, dtype=torch.float64)
        for a, b in pairwise(sigma):
            slope = a / (STD**2 + a**2)
            euler = 1 + (b - a) * slope
            factor = factor * (1 + (b - a) / 2 * (slope + euler * b / (STD**2 + b**2)))
        start, end = torch.cos(path[0])[:, None], torch.cos(path[-1])[:, None]
        closed = end * (MEAN + factor * (x / start - MEAN))
        yield equal(f"x_u is the product of Heun's steps, {points} points", closed, got, 1e-10)
        errors.append((got - EXACT.flow_map(x, path[0], path[-1])).norm())
    yield equal("... which tends to the trajectory with order 2", 2.0, torch.log2(errors[1] / errors[2]), 0.1)


def _spans() -> Iterator[Check]:
    """s <= u < t are points of the grid, n steps of it lie between t and u, and n is drawn with weight n."""
    method, fits, counts, firsts, shares = _method(Jumps(MEAN, STD)), True, [], [], []
    for step in range(800):
        batch = Batch(8, (2,), {}, None, torch.device("cpu"), (0, step, step % 2))
        span = method.interval(step, batch)
        n, u = len(span.path) - 1, span.path[-1]
        at = [(method.grid[:, None] - angles).abs().min(0) for angles in (span.t, u, span.s)]
        fits &= all(bool((distance.values == 0).all()) for distance in at)
        fits &= bool((at[1].indices == at[0].indices + n).all()) and bool((at[2].indices >= at[1].indices).all())
        fits &= n == len(method.interval(step, Batch(8, (2,), {}, None, batch.device, (0, step, 7))).path) - 1
        counts.append(n)
        if n == 2:
            firsts.append(at[0].indices.double())
            shares.append((at[2].indices == at[1].indices).double() * (8 - at[1].indices + 1))
    yield equal("t, u and s are points of the grid in that order, n is that of all processes", 1.0, float(fits), 0.0)
    yield equal("the mean of n, weighted with n, of 8", 17 / 3, sum(counts) / len(counts), 0.05)
    yield equal("t is uniform on what n leaves", 3.0, torch.cat(firsts).mean(), 0.1)
    yield equal("s is uniform on what is left below u", 1.0, torch.cat(shares).mean(), 0.2)
    few = _method(Jumps(MEAN, STD), solver_steps=2)
    most = max(len(few.interval(k, Batch(2, (2,), {}, None, batch.device, (0, k, 0))).path) - 1 for k in range(40))
    yield equal("at most solver_steps", 2.0, most, 0.0)


def _fixed(angle: float) -> Any:
    return lambda schedule, n, *rest: torch.full((n,), angle, dtype=torch.float64)


def _denoising() -> Iterator[Check]:
    """The denoising loss is at its optimum for the exact g(x, t, t), and half of it at either kind of times."""
    for low, high in ((0.5, 1.3), (1.1, 0.4)):
        method = _method(Jumps(MEAN, STD))
        with mistake(ctm, "edm_log_normal", _fixed(low)), mistake(ctm, "edm_karras", _fixed(low)):
            loss = method.denoising(_batch())
            with mistake(ctm, "Extra", lambda r: Extra(r=0 * r)):
                wrong = method.denoising(_batch())
        cos, sin = math.cos(low), math.sin(low)
        rate = cos * sin * (1 - STD**2) / (cos**2 * STD**2 + sin**2)
        least = ((STD * (rate * cos + sin)) ** 2 + (rate * sin - cos) ** 2).mean()
        yield equal(f"the denoising loss of the exact map, t = {low}", least, loss, 1e-9)
        slopes = gradient(loss, *method.student.parameters())
        yield equal(f"... whose gradient is zero, t = {low}", 0.0, slopes, 1e-9, scale=1.0)
        yield differs(f"... and which a jump to 0 has not, t = {low}", least, wrong, 1e-2)
        seen: list[Tensor] = []
        handle = method.student.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[1]))
        with mistake(ctm, "edm_log_normal", _fixed(low)), mistake(ctm, "edm_karras", _fixed(high)):
            method.denoising(_batch())
        handle.remove()
        yield equal(
            f"half at {low}, half at {high}", torch.tensor([low] * 8 + [high] * 8, dtype=torch.float64), seen[0], 1e-12
        )


def _balance() -> Iterator[Check]:
    """lambda_DSM makes both gradients in the last layer equally long."""
    parts: dict[str, Tensor] = {}
    for name, options in {
        "first": {},
        "both": {"dsm_weight": 0.7},
        "as they are": {"dsm_weight": 0.7, "adaptive": False},
    }.items():
        network = AnyField()
        method = _method(network, _untold, **options)
        last: Any = network.layers[-1].weight
        parts[name] = gradient(method.turns(0)[0].loss(_batch()).loss, last)
        parts["denoising"] = gradient(method.denoising(_batch()), last)
    ratio = parts["first"].norm() / (parts["denoising"].norm() + 1e-4)
    expected = parts["first"] + 0.7 * ratio * parts["denoising"]
    yield equal("the gradient in the last layer", expected, parts["both"], 1e-9)
    yield differs("... which is not that of the plain sum", expected, parts["as they are"], 1e-3)
    plain = parts["first"] + 0.7 * parts["denoising"]
    yield equal("without lambdas it is", plain, parts["as they are"], 1e-9)


def _gan() -> Iterator[Check]:
    """Of a linear discriminator the exact map feels the pull of its samples alone, through the outer jump."""
    t, u, s = _at(*SPANS[0])
    x, end, cos = _x(t), torch.cos(s)[:, None], torch.cos(t)[:, None]
    kept, outer = torch.sqrt(_variance(s, STD) / _variance(t, STD)), STD / torch.sqrt(_variance(s, STD))
    pull = torch.cat([-math.cos(0.8) * SLOPE * (outer * (end - cos * kept)).mean(0), torch.zeros(2)])
    for weight, adaptive in ((0.7, False), (0.7, True), (0.0, False)):
        method = _method(Jumps(MEAN, STD), gan_weight=weight, adaptive=adaptive)
        followed = method.following(x, EXACT.flow_map(x, t, u), _span(t, u, s), {})
        with mistake(adversary, "edm_log_normal", _fixed(0.8)):
            loss = method.whole_loss(followed, _batch()).loss
        got = gradient(loss, *method.student.parameters())
        factor = weight * (0.01 if adaptive else 1.0)  # the least lambda: the first term has no gradient
        name = f"the exact map's gradient with the GAN, weight {weight}{', adaptive' if adaptive else ''}"
        yield equal(name, factor * pull, got, 1e-9, scale=1.0)
    method = _method(Jumps(MEAN, STD), gan_weight=1.0, gan_start=5, dsm_weight=1.0)
    order = [[turn.player for turn in method.turns(step)] for step in (4, 5)]
    yield equal("who moves before gan_start, and from then on", 1.0,
                float(order == [["student"], ["student", "discriminator"]]), 0.0)  # fmt: skip


def _sampling() -> Iterator[Check]:
    """Whatever gamma is, the exact map's samples have the marginal's moments at every level."""
    z, first, second = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6).split(2, 1)
    for gamma in (0.0, 0.3, 1.0):
        sampler = _method(Jumps(MEAN, STD), student_steps=3, gamma=gamma).sampler()
        sampler.two_times = True
        for k in (1, 2):
            x, t = sampler.input_at(k, z, {}, lambda j: (first, second)[j - 1])
            got = torch.stack([x.mean(0), (x - x.mean(0)).square().mean(0)])
            closed = torch.stack([math.cos(float(t[0])) * MEAN[0], _variance(t[:1], STD)[0]])
            yield equal(f"mean and variance at level {k}, gamma = {gamma}", closed, got, 1e-9)
            if gamma == 0.3:
                with mistake(Gamma, "leads", lambda self, schedule, level: schedule.angle(level)):
                    still = sampler.input_at(k, z, {}, lambda j: (first, second)[j - 1])[0]
                yield differs(f"... with noise of its own, level {k}", x, still, 1e-2)
        x = sampler.denoiser(x, t, {}, Extra(r=torch.zeros_like(t))).x0
        got = torch.stack([x.mean(0), (x - x.mean(0)).square().mean(0)])
        yield equal(f"the samples', gamma = {gamma}", torch.cat([MEAN, STD**2]), got, 1e-9)
    t, r, s = _at(1.2, math.atan(math.sqrt(1 - 0.3**2) * math.tan(0.7)), 0.7)
    prediction, noise = _method(Jumps(MEAN, STD)).student(_x(t), t, {}, Extra(r=r)), two_points(2)[0]
    mixed = diffuse(prediction.x0, s, math.sqrt(1 - 0.3**2) * prediction.eps + 0.3 * noise)
    yield equal("a step mixes the predicted noise with fresh noise", mixed, Gamma(0.3)(prediction, r, s, lambda: noise),
                1e-12)  # fmt: skip
    yield equal("... by way of sqrt(1 - gamma^2) sigma", r[0], Gamma(0.3).leads(TrigFlow(), 0.7), 1e-12)
