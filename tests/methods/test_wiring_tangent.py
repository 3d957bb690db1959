"""A whole turn of the methods whose target is the student's derivative, against a straight-line rewrite."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import DDIM, Renoise
from diffdistill.scaffold.tangent import TangentMethod
from tests.scaffold.straight import (
    CLASSES,
    EDM_,
    EPS,
    FLOW,
    KEY,
    SHAPE,
    SIZE,
    TRIG,
    VP,
    Plain,
    agree,
    batch_of,
    draw,
    fold,
    gaussian,
    in_double,
    modes,
    noised,
    normal,
    scatter,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """One method's turn at a training step, line by line; all passes of the student drop the same units."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        module = describe_method(name).load()
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        self.c: Any = module.Config(**options)
        self.method: TangentMethod = module.METHOD(replace(plain.teacher(dropout=0.3)), self.c)
        scatter(self.method.student, 20)
        self.teacher = getattr(self.method.teacher, "denoiser", self.method.teacher).network
        self.student: Any = self.method.student.network
        self.batch = batch_of(self.key)
        self.labels, self.eps = self.batch.cond["class_labels"], normal("student/eps", self.key)
        assert self.batch.x0 is not None
        self.image = self.batch.x0

    def turn(self) -> Values:
        return getattr(self, f"_{self.name}")()

    def dropped(self, stream: str = "student") -> None:
        torch.manual_seed(draw(*self.key, f"{stream}/dropout").initial_seed())

    def velocity(self, net: Any, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x0, eps = self.plain.x0_eps(net, x_t, t, class_labels=labels)
        return fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0

    def data_velocity(self, t: Tensor) -> Tensor:
        return fold(torch.cos(t)) * self.eps - fold(torch.sin(t)) * self.image

    def teachers_velocity(self, x_t: Tensor, t: Tensor, scale: float | None = None) -> Tensor:
        scale = float(self.c.guidance_scale) if scale is None else scale
        x0, eps = self.plain.guided(self.teacher, x_t, t, self.labels, scale)
        return fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0

    def change(self, field: Any, x_t: Tensor, t: Tensor, v: Tensor, speed: Tensor, r: Tensor) -> Tensor:
        """(B, ...) speed times the derivative of the field along the path: exact, or by a difference on the circle."""
        if self.c.derivative == "exact":
            return torch.func.jvp(field, (x_t, t), (fold(speed) * v, speed))[1]
        h, (low, high) = self.c.derivative_step, self.plain.ends()
        after = (t + h).clamp(max=high) - t
        before = torch.maximum(t - h, r.clamp(low, high - h)) - t
        one, other = (field(fold(torch.cos(d)) * x_t + fold(torch.sin(d)) * v, t + d).detach() for d in (after, before))
        return fold(speed / (after - before)) * (one - other)

    # -- scm ---------------------------------------------------------------------------------------------------------

    def error(self) -> tuple[Tensor, Tensor]:
        """(B,) squared errors with the weight 1/tan(t), and t."""
        c = self.c
        t = self.plain.log_normal(gaussian("student/t", self.key), c.time_mean, c.time_std)
        least = 0.0 if c.truncate_at is None else math.atan(2 * c.truncate_at)
        t = t.clamp_min(least)
        x_t, cos, sin = noised(self.image, t, self.eps), fold(torch.cos(t)), fold(torch.sin(t))
        v = self.teachers_velocity(x_t, t) if c.mode == "distillation" else self.data_velocity(t)

        def field(x: Tensor, t: Tensor) -> Tensor:
            self.dropped()
            return self.velocity(self.student, x, t, self.labels)

        change = self.change(field, x_t, t, v, torch.cos(t) * torch.sin(t), torch.zeros_like(t))
        f = field(x_t, t)
        share = min(1.0, self.step / c.tangent_warmup) if c.tangent_warmup else 1.0
        g = -(cos**2) * (f - v) - share * (cos * sin * x_t + change)
        if c.norm != "none":
            size = g.square().flatten(1).sum(1)
            size = (size / math.prod(SHAPE)).sqrt() if c.norm == "rms" else size.sqrt()
            g = g / (fold(size) + c.norm_c)
        target, weight = (f + g).detach(), 1 / torch.tan(t)
        if c.truncate_at is not None:
            held = self.velocity(self.teacher, x_t, t, self.labels)
            target = torch.where(fold(t) <= least, held, target).detach()
            weight = weight * torch.where(t <= least, c.boundary_weight, 1.0)
        return weight * (f - target).square().flatten(1).mean(1), t

    def weight(self, t: Tensor) -> Tensor:
        linear: nn.Linear = self.method.players["weight"].linear  # type: ignore[assignment]
        k = torch.arange(1, 9)
        phase = torch.log(torch.tan(t)).clamp(-8, 8)[:, None] * k * math.pi / 16
        return linear(torch.cat([torch.sin(phase), torch.cos(phase)], 1))[:, 0]

    def _scm(self) -> Values:
        error, t = self.error()
        learned = torch.exp(-self.weight(t)).detach() if self.c.adaptive else 1.0
        return {"loss": (learned * error).mean(), "error": error.mean()}

    # -- mean_flow ---------------------------------------------------------------------------------------------------

    def fraction(self, t: Tensor) -> Tensor:
        """Of the schedule's own time, before its shift."""
        plain = self.plain
        if plain.kind in ("vp", "eps"):
            first = plain.table()[0]
            return torch.where(t < first, t / first, 1 + plain.native(t)[0]) / plain.steps
        if plain.kind == "edm":
            low, high = 0.01 ** (1 / 7), 30 ** (1 / 7)
            return (plain.native(t)[2] ** (1 / 7) - low) / (high - low)
        if plain.kind == "flow":
            sigma = plain.native(t)[2]
            return sigma / (2 - sigma)
        return t / (math.pi / 2)

    def jump(self, x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """F of the student from t to r, its network written out."""
        net, gap = self.student, (self.fraction(t) - self.fraction(r))[:, None]
        phase = gap * torch.arange(1, 9) * math.pi / 2
        added = net.time_embedding.mlp(torch.cat([gap, torch.sin(phase), 1 - torch.cos(phase)], 1))

        def told(x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            features = torch.stack([torch.sin(0.3 * time), torch.cos(0.05 * time), torch.sin(0.003 * time)], 1)
            clock = net.time_embedding.layer(features) + added
            h = net.read(x) + (clock + net.class_embedding(class_labels))[:, :, None, None]
            return net.write(torch.tanh(net.middle(net.dropout(torch.tanh(h)))))

        return self.velocity(told, x_t, t, labels)

    def spans(self) -> tuple[Tensor, Tensor]:
        c, std = self.c, self.plain.std

        def angle(s: Tensor) -> Tensor:
            return torch.atan2(s, (1 - s) * std)

        first = torch.sigmoid(c.time_mean + c.time_std * gaussian("student/t", self.key))
        mean = c.time_mean if c.r_mean is None else c.r_mean
        second = torch.sigmoid(mean + c.time_std * gaussian("student/r", self.key))
        late = torch.maximum(first, second) if c.r_mean is None else first
        early = torch.minimum(first, second)
        if c.longest_jump < 1:
            early = (late - c.longest_jump * uniform("student/jump", self.key)).clamp_min(0)
        early = torch.where(uniform("student/equal", self.key) < c.equal_share, late, early)
        t = angle(late).clamp(*self.plain.ends())
        return t, torch.minimum(angle(early), t)

    def guided_by_itself(self, x_t: Tensor, t: Tensor, late: Tensor, kappa: float = 0.0) -> tuple[Tensor, Tensor]:
        """The data's velocity as the student guides it, and the labels, some of which are left out."""
        c, v = self.c, self.data_velocity(t)
        lost = uniform("student/dropped", self.key) < c.label_dropout
        labels = torch.where(lost, CLASSES, self.labels)
        twice = (torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, CLASSES)]))
        with torch.no_grad():
            own, none = self.jump(twice[0], twice[1], twice[1], twice[2]).chunk(2)
        omega = c.guidance_scale * (1 - kappa)
        return torch.where(fold(lost | late), v, omega * v + (1 - omega - kappa) * none + kappa * own), labels

    def _mean_flow(self) -> Values:
        c, std, (t, r) = self.c, self.plain.std, self.spans()
        x_t, labels = noised(self.image, t, self.eps), self.labels
        v = self.teachers_velocity(x_t, t) if c.mode == "distillation" else self.data_velocity(t)
        if c.mode == "training" and (c.guidance_scale != 1 or c.guidance_mix > 0):
            late = std * torch.sin(t) / (std * torch.sin(t) + torch.cos(t)) > c.guidance_until
            v, labels = self.guided_by_itself(x_t, t, late, c.guidance_mix)

        def field(x: Tensor, t: Tensor) -> Tensor:
            self.dropped()
            return self.jump(x, t, r, labels)

        rate = std * torch.sin(t) + torch.cos(t)
        k = rate / (std * torch.sin(r) + torch.cos(r))
        speed = k * torch.sin(t - r)
        change = self.change(field, x_t, t, v, speed, r)
        f = field(x_t, t)
        gap = fold(k * torch.cos(t - r)) * (f - v) + fold(speed) * x_t + change
        square = (fold(rate) * (f - (f - gap).detach())).square().flatten(1).sum(1)
        weight = 1 / (square.detach() + c.weight_c) ** c.weight_power
        return {"loss": (weight * square).mean(), "error": square.mean()}

    # -- mdt_dist ----------------------------------------------------------------------------------------------------

    def flow_angles(self, stream: str, mean: float, std: float) -> Tensor:
        s = torch.sigmoid(mean + std * gaussian(stream, self.key))
        return torch.atan2(s, (1 - s) * self.plain.std).clamp(*self.plain.ends())

    def missed(self, x_t: Tensor, t: Tensor, v: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        """F times rho, and u - u_target, all in flow times and the data's units."""
        std, c = self.plain.std, self.c

        def field(x: Tensor, t: Tensor) -> Tensor:
            self.dropped(stream)
            return self.velocity(self.student, x, t, self.labels)

        rho = std * torch.sin(t) + torch.cos(t)
        s = std * torch.sin(t) / rho
        moved = self.change(field, x_t, t, v, rho * torch.sin(t), torch.zeros_like(t))
        f = field(x_t, t)
        straight = fold(rho) * (f - v)
        bent = fold(rho**2) * (fold(torch.cos(t)) * (f - v) + fold(torch.sin(t)) * x_t) + fold(rho) * moved - straight
        if c.derivative_c is not None:
            d = bent / fold(s)
            bent = fold(s) * d / (fold(d.square().flatten(1).sum(1).sqrt()) + c.derivative_c)
        matched = stream == "matching"
        gap = straight + bent * (min(1.0, self.step / c.tangent_warmup) if c.tangent_warmup and not matched else 1.0)
        if c.norm != "none" and not matched:
            square = gap.square().flatten(1)
            size = square.mean(1) if c.norm == "rms" else square.sum(1)
            gap = gap / (fold(size.sqrt()) + c.norm_c)
        return fold(rho) * f, gap.detach()

    def _mdt_dist(self) -> Values:
        c, plain, t = self.c, self.plain, self.flow_angles("student/t", self.c.time_mean, self.c.time_std)
        x_t = noised(self.image, t, self.eps)
        u, gap = self.missed(x_t, t, self.teachers_velocity(x_t, t), "student")
        values = {"matching": (u - (u - gap).detach()).square().mean()}
        loss = values["matching"]
        if c.matching_weight:
            z, top = plain.start(plain.levels(c.student_steps, c.student_level)[0], normal("matching/z", self.key))
            self.dropped("matching")
            x = plain.x0_eps(self.student, z, top, class_labels=self.labels)[0]
            t = self.flow_angles("matching/t", c.matching_mean, c.matching_std)
            x_t = noised(x, t, normal("matching/eps", self.key)).detach()
            scale = c.guidance_scale if c.matching_scale is None else c.matching_scale
            gap = self.missed(x_t, t, self.teachers_velocity(x_t, t, scale), "matching")[1]
            values["distillation"] = (plain.std * x - (plain.std * x + gap).detach()).square().mean()
            loss = loss + c.matching_weight * values["distillation"]
        return {"loss": loss, **values}


SCM = {"derivative": "exact", "tangent_warmup": 6, "time_mean": 0.2, "time_std": 1.1, "norm_c": 0.3}
DATA = {**SCM, "mode": "training"}
MEAN_FLOW = {
    "derivative": "exact",
    "time_mean": 0.3,
    "time_std": 1.4,
    "equal_share": 0.4,
    "weight_power": 0.7,
    "weight_c": 0.2,
}
TAUGHT = {**MEAN_FLOW, "mode": "distillation"}
GUIDED = {**MEAN_FLOW, "guidance_scale": 2.5, "guidance_mix": 0.3, "guidance_until": 0.6, "label_dropout": 0.4}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("scm", {**SCM, "guidance_scale": 2.5}, TRIG),
    ("scm", {**SCM, "guidance_scale": 2.5, "norm": "l2"}, EDM_),
    ("scm", {**SCM, "norm": "none", "adaptive": False}, VP),
    ("scm", {**SCM, "tangent_warmup": 0}, EPS),
    ("scm", DATA, FLOW),
    ("scm", {**DATA, "truncate_at": 0.6, "boundary_weight": 0.3}, EDM_),
    ("mean_flow", MEAN_FLOW, FLOW),
    ("mean_flow", {**MEAN_FLOW, "r_mean": -1.0}, EDM_),
    ("mean_flow", {**TAUGHT, "guidance_scale": 2.5}, VP),
    ("mean_flow", {**TAUGHT, "longest_jump": 0.4, "student_steps": 6}, TRIG),
    ("mean_flow", {**TAUGHT, "time_mean": 2.5}, EPS),  # some are beyond what the network knows
    ("mean_flow", {**TAUGHT, "time_mean": -1.5, "longest_jump": 0.5, "student_steps": 6}, FLOW),
    ("mean_flow", {**MEAN_FLOW, "guidance_mix": 0.3}, FLOW),
    ("mean_flow", GUIDED, FLOW),
    ("scm", {**SCM, "derivative": "central", "derivative_step": 0.11}, EDM_),
    ("mean_flow", {**MEAN_FLOW, "derivative": "central", "derivative_step": 0.11}, FLOW),
]


@pytest.mark.parametrize("step", [3, 20])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(name, options, plain, step)
    turn, *others = straight.method.turns(step)
    assert (turn.player, turn.lr_factor, turn.restart) == ("student", 1.0, False)
    assert [other.player for other in others] == ["weight"] * getattr(straight.c, "adaptive", False)
    agree(straight.method, turn, straight.batch, straight.turn)


MDT = {
    "derivative": "exact",
    "time_mean": 0.4,
    "time_std": 1.3,
    "tangent_warmup": 5,
    "norm_c": 0.3,
    "matching_mean": 0.7,
    "matching_std": 1.2,
}


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({**MDT, "guidance_scale": 2.5}, FLOW),
        ({**MDT, "guidance_scale": 2.5, "matching_scale": 4.0, "matching_weight": 0.3}, EDM_),
        ({**MDT, "matching_weight": 0.0, "derivative_c": 0.1}, VP),
        ({**MDT, "derivative_c": 0.2, "norm": "none", "student_steps": 2, "student_level": 0.8}, FLOW),
        ({**MDT, "derivative": "central", "derivative_step": 0.11, "norm": "l2", "tangent_warmup": 0}, TRIG),
    ],
)
def test_a_turn_of_mdt_dist_is_its_straight_line(options: dict[str, Any], plain: Plain) -> None:
    straight = Straight("mdt_dist", options, plain, 3)
    (turn,) = straight.method.turns(3)
    agree(straight.method, turn, straight.batch, straight.turn)
    parts = {"teacher": straight.teacher.dropout, "student": straight.student.dropout}
    calls = modes(parts, lambda: turn.loss(straight.batch))
    assert all(dropping == (who != "teacher") for who, dropping in calls)


@pytest.mark.parametrize("plain", [TRIG, EDM_])
def test_the_adaptive_weight_learns_the_errors_of_the_students_turn(plain: Plain) -> None:
    straight = Straight("scm", {**SCM, "guidance_scale": 2.5}, plain)
    scatter(straight.method.players["weight"], 5)
    student, weight = straight.method.turns(4)
    learned, own = (list(straight.method.players[name].parameters()) for name in ("weight", "student"))
    passed = torch.autograd.grad(student.loss(straight.batch).loss, learned, allow_unused=True, retain_graph=True)
    passed += torch.autograd.grad(weight.loss(straight.batch).loss, own, allow_unused=True)
    assert all(gradient is None for gradient in passed), "neither moves the other"
    assert weight.player == "weight"

    def expected() -> Values:
        error, t = straight.error()
        w = straight.weight(t)
        return {"loss": (torch.exp(-w) * error.detach() + w).mean()}

    agree(straight.method, weight, straight.batch, expected)
    agree(straight.method, student, straight.batch, straight.turn)  # with a weight that is not zero


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_who_is_asked_and_who_drops(name: str, options: dict[str, Any], plain: Plain) -> None:
    straight = Straight(name, options, plain)
    parts = {"teacher": straight.teacher.dropout, "student": straight.student.dropout}
    calls = modes(parts, lambda: straight.method.turns(4)[0].loss(straight.batch))
    assert all(dropping == (who != "teacher") for who, dropping in calls)
    asks = straight.c.mode == "distillation" or getattr(straight.c, "truncate_at", None) is not None
    assert ("teacher" in dict(calls)) == asks
    guides = "guidance_mix" in options
    passes = 3 if straight.c.derivative == "central" else 2
    assert [who for who, _ in calls].count("student") == passes + guides, "one pass with a gradient, and a derivative"
    assert not any(p.requires_grad for p in straight.teacher.parameters())


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for name, step in (("scm", Renoise()), ("mean_flow", DDIM())):
        for steps in (1, 3):
            straight = Straight(name, {"student_steps": steps}, plain)
            sampler = straight.method.sampler()
            assert sampler.step == step and sampler.levels == pytest.approx(plain.levels(steps), rel=1e-12)
            assert sampler.denoiser is straight.method.student
        sampler = Straight(name, {"student_level": 0.8 if plain is FLOW else 5.0}, plain).method.sampler()
        assert sampler.levels == (0.8 if plain is FLOW else 5.0,)


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW, TRIG])
@pytest.mark.parametrize(("steps", "level"), [(1, None), (3, None), (3, 0.8)])
def test_the_samplers_jumps_are_those_that_were_trained(plain: Plain, steps: int, level: float | None) -> None:
    """What the student gives without r is what it gives for the next level."""
    level = 11.0 if level is not None and plain is VP else level
    straight = Straight("mean_flow", {"student_steps": steps, "student_level": level}, plain)
    method = straight.method
    method.student.eval()
    levels = [plain.angle(level) for level in method.sampler().levels] + [0.0]
    for t, r in pairwise(levels):
        times = [torch.full((SIZE,), angle, dtype=torch.float64) for angle in (t, r)]
        got = method.student(straight.image, times[0], straight.batch.cond).v
        # A flow in pixels starts a thousandth below 1, which the gaps of its other jumps do not see.
        expected = straight.jump(straight.image, *times, straight.labels)
        assert torch.allclose(got, expected, atol=3e-2 if plain is FLOW and steps > 1 else 1e-9)


def test_rates_are_those_of_the_options() -> None:
    rates = {"student_lr": 0.1, "beta1": 0.3, "weight_decay": 0.4}
    for name in ("scm", "mean_flow"):
        assert Straight(name, rates, VP).method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert Straight("scm", {**rates, "weight_lr": 0.7}, VP).method.optimizer("weight") == (0.7, (0.3, 0.999), 0.0)
