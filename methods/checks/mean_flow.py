"""Exact checks of mean_flow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import LinearFlow, Schedule, TrigFlow
from diffdistill.errors import UserError
from diffdistill.exact.analytic import ClassGaussians, GaussianJumps, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gauss_hermite, gradient, mistake, two_points
from diffdistill.methods.mean_flow import Config, MeanFlow
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point, moving

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "distillation": {
        "mode": "distillation",
        "time_mean": 0.0,
        "time_std": 2.2,
        "equal_share": 0.25,
        "weight_power": 0.75,
        "max_grad_norm": 1.0,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "steps": 2000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
SPANS = ((0.3, 0.0), (0.9, 0.4), (1.5, 0.2), (math.pi / 2, 0.0), (1.2, 1.2))


class AnyJumps(nn.Module):
    """A smooth network of two dimensions, the time and the gap, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2)).double()

    def forward(self, x: Tensor, time: Tensor, gap: Tensor) -> Tensor:
        """(B, 2) for x (B, 2), the times (B,) and gaps (B,)."""
        time, gap = time.to(x)[:, None], gap.to(x)[:, None]
        return self.layers(torch.cat([x, torch.sin(time), torch.cos(2 * time), torch.sin(gap)], 1))


def verify() -> Iterator[Check]:
    """Section 2.5's sanity items and 13.1's identity, and the mistakes that they must catch."""
    yield from _exact_jumps()
    yield from _as_the_paper()
    yield from _from_data()
    yield from _guidance()
    yield from _restricted()


def _student(network: nn.Module, schedule: Schedule, output: str, what: str) -> Denoiser:
    """A denoiser whose network takes `what` of the second time, its angle or the gap."""

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        return network(x, time, getattr(extra, what))

    return Denoiser(network, schedule, OUTPUTS[output], extra_call=call)


def _at(t: float, r: float, count: int = 16) -> tuple[Tensor, Tensor]:
    return tuple(torch.full((count,), angle, dtype=torch.float64) for angle in (t, r))  # type: ignore[return-value]


def _exact_jumps() -> Iterator[Check]:
    """The exact average velocity: residual, loss and its gradient are zero, whatever the interval."""
    exact = GaussianMixture(MEAN[None], STD[None])
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = _student(GaussianJumps(MEAN, STD), TrigFlow(), "v_prediction", "r")
    method = MeanFlow(teacher, Config(mode="distillation", derivative="exact"), student=student)
    x0, eps = two_points(2)
    for span in SPANS:
        t, r = _at(*span)
        x_t = diffuse(MEAN + STD * x0, t, eps)
        at = Point(x_t, t, method.teacher(x_t, t, {}).v, r, {})

        def residual(at: Point) -> Tensor:
            return method.residual(method.velocity(at, Extra(r=at.r)).detach(), at)

        where = f"from {span[0]:.3g} to {span[1]:.3g}"
        prediction = student(x_t, t, {}, Extra(r=r))
        yield equal(
            f"the step of the pair is the exact map {where}", exact.flow_map(x_t, t, r), prediction.at(r), 1e-12
        )
        yield equal(f"the exact average velocity has no residual {where}", 0.0, residual(at), 1e-10, scale=1.0)
        yield equal(f"... and no loss {where}", 0.0, method.regression(0, at).loss, 1e-18, scale=1.0)
        if span[0] > span[1]:
            yield differs(
                f"... but with half the direction {where}", 0.0, residual(at._replace(v=at.v / 2)), 1e-3, scale=1
            )
            with mistake(MeanFlow, "derivative", _moving_both):
                yield differs(f"... and where r moves with t {where}", 0.0, residual(at), 1e-3, scale=1.0)
            with mistake(MeanFlow, "derivative", _time_alone):
                yield differs(f"... and with the derivative in t alone {where}", 0.0, residual(at), 1e-3, scale=1.0)


REAL: dict[str, Any] = {"derivative": MeanFlow.derivative}


def _time_alone(self: MeanFlow, at: Point, speed: Tensor, extra: Extra) -> Tensor:
    return REAL["derivative"](self, at._replace(v=0 * at.v), speed, extra)


def _moving_both(self: MeanFlow, at: Point, speed: Tensor, extra: Extra) -> Tensor:
    """The mistake of a network that is told t - r, which stays when t moves."""

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        return self.student(x_t, t, at.cond, Extra(r=t - (at.t - at.r))).v

    return jvp(field, (at.x_t, at.t), (speed[:, None] * at.v, speed))[1]


def _as_the_paper() -> Iterator[Check]:
    """For any flow-matching network loss and gradient are those of the paper's formulas in its own coordinates."""
    for std in (1.0, 0.5):
        network, schedule = AnyJumps(), LinearFlow(data_std=std, time_scale=1.0)
        student = _student(network, schedule, "flow_prediction", "gap")
        teacher = Teacher(_student(AnyJumps(), schedule, "flow_prediction", "gap"), (2,))
        method = MeanFlow(teacher, Config(derivative="exact", weight_power=0.75, weight_c=0.1), student=student)
        x0, eps = two_points(2)
        x0 = MEAN + STD * x0
        for time, end in ((0.8, 0.1), (1.0, 0.0), (0.5, 0.5)):
            s, q = _at(time, end)
            z, v = (1 - time) * std * x0 + time * eps, eps - std * x0
            both = jvp(lambda z, s: network(z, s, s - q), (z, s), (v, torch.ones_like(s)))  # noqa: B023
            gap = both[0] - (v - (time - end) * both[1]).detach()
            square = gap.square().sum(1)
            paper = (square / (square.detach() + 0.1) ** 0.75).mean()
            t, r = schedule.angle(s), schedule.angle(q)
            at = Point(diffuse(x0, t, eps), t, moving(x0, t, eps), r, {})
            got = method.regression(0, at).loss
            where = f"{time:g} to {end:g}, data of deviation {std:g}"
            yield equal(f"the loss is the paper's, {where}", paper, got, 1e-10)
            slopes = gradient(paper, *network.parameters())
            yield equal(f"... and its gradient, {where}", slopes, gradient(got, *network.parameters()), 1e-10)
            with mistake(MeanFlow, "rho", lambda self, t: torch.ones_like(t)):
                wrong = method.regression(0, at).loss
            if end < time < 1:
                yield differs(f"... which a loss without the change of coordinates is not, {where}", paper, wrong, 1e-3)


def _from_data() -> Iterator[Check]:
    """The mean of the target over what x_t may come from is that of the marginal velocity."""
    student = _student(AnyJumps(), TrigFlow(), "v_prediction", "gap")
    method = MeanFlow(gaussian_teacher(MEAN.tolist(), STD), Config(derivative="exact"), student=student)
    nodes, weights = gauss_hermite(8)
    share = torch.cartesian_prod(weights, weights).prod(1)[:, None]
    x = torch.tensor([[0.3, -1.1]]).double()
    for span in ((0.7, 0.2), (1.4, 0.0)):
        t, r = _at(*span, count=len(share))
        cos, sin = math.cos(span[0]), math.sin(span[0])
        variance = cos**2 * STD**2 + sin**2
        mean = MEAN + cos * STD**2 * (x - cos * MEAN) / variance
        x0 = mean + STD * sin / variance.sqrt() * torch.cartesian_prod(nodes, nodes)
        v = cos * (x - cos * x0) / sin - sin * x0
        at = Point(x.repeat(len(x0), 1), t, v, r, {})
        one = Point(x, t[:1], method.teacher(x, t[:1], {}).v, r[:1], {})
        marginal, drawn = (method.residual(method.velocity(p, Extra(r=p.r)).detach(), p) for p in (one, at))
        mean = (share * drawn).sum(0)
        yield equal(f"the mean target from data is the marginal one, {span}", marginal[0], mean, 1e-10)


def _guidance() -> Iterator[Check]:
    """A student that gives the guided velocity at r = t is a fixed point, at the scale omega/(1 - kappa)."""
    means = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double()
    plain = ClassGaussians(means, STD).denoiser()
    guided = ClassGaussians(means[-1] + 2.5 * (means - means[-1]), STD)

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        return network(x, time, **cond)

    student = Denoiser(guided, TrigFlow(), plain.output, extra_call=call, null=plain.null)
    x0, eps = two_points(2)
    labels = {"class_labels": torch.arange(16) % 2}
    batch = Batch(16, (2,), labels, x0, torch.device("cpu"), (0, 0, 0))
    t, _ = _at(0.9, 0.0)
    x_t = diffuse(x0, t, eps)
    aim = guided.denoiser()(x_t, t, labels).v
    own = plain(x_t, t, labels).v
    for kappa in (0.0, 0.92):
        options = {"guidance_scale": 2.5, "guidance_mix": kappa, "label_dropout": 0.0}
        method = MeanFlow(Teacher(plain, (2,), 2), Config(**options), student=student)  # type: ignore[arg-type]
        got = method.direction(x_t, own, t, batch, labels)
        yield equal(f"the mean direction is the guided velocity, kappa = {kappa}", aim, got, 1e-10)
        late = MeanFlow(Teacher(plain, (2,), 2), Config(**options, guidance_until=0.3), student=student)  # type: ignore[arg-type]
        yield equal(f"... and the plain one beyond guidance_until, kappa = {kappa}", own,
                    late.direction(x_t, own, t, batch, labels), 1e-12)  # fmt: skip
        half = MeanFlow(Teacher(plain, (2,), 2), Config(**{**options, "label_dropout": 0.5}), student=student)  # type: ignore[arg-type]
        lost = batch.uniform("student/dropped")[:, None] < 0.5
        yield equal(f"... and where the condition is left out, kappa = {kappa}", torch.where(lost, own, aim),
                    half.direction(x_t, own, t, batch, labels), 1e-10)  # fmt: skip


def _restricted() -> Iterator[Check]:
    """DisCa: intervals are at most R long, and a sampler with longer jumps is refused."""
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = _student(GaussianJumps(MEAN, STD), TrigFlow(), "v_prediction", "r")
    method = MeanFlow(teacher, Config(longest_jump=0.3, student_steps=8, equal_share=0.0), student=student)
    batch = Batch(512, (2,), {}, torch.zeros(512, 2).double(), torch.device("cpu"), (0, 0, 0))
    t, r = method.times(batch)
    spans = torch.tan(t) / (1 + torch.tan(t)) - torch.tan(r) / (1 + torch.tan(r))
    yield equal("the longest interval is R", 0.3, spans.max(), 0.02)
    yield equal("none is longer", 0.0, (spans - 0.3).clamp_min(0).max(), 1e-12, scale=1.0)
    refused = 0.0
    try:
        MeanFlow(teacher, Config(longest_jump=0.3), student=student)
    except UserError:
        refused = 1.0
    yield equal("one step is refused", 1.0, refused, 0.0)
