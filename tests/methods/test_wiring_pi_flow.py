"""Whole turns of pi_flow and arc_flow, against a straight-line rewrite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods import arc_flow, pi_flow
from diffdistill.players.sampler import DDIM
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
    SIZE,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree_alone,
    batch_of,
    draw,
    fold,
    in_double,
    mine,
    noised,
    normal,
    scatter,
    step_draw,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Momenta:
    """x0 as a function of x and t, where a flow's velocity is a sum of exponentials of its time."""

    def __init__(self, x_s: Tensor, s: Tensor, values: Any, logits: Any, rates: Any, kept: Tensor | None):
        weights = [logit.exp() for logit in logits]
        if kept is not None:
            weights = [weight * fold(there) for weight, there in zip(weights, kept.T, strict=True)]
        total, self.begin = sum(weights), fold(torch.tan(s) / (1 + torch.tan(s)))
        eps = [(x_s - fold(torch.cos(s)) * value) / fold(torch.sin(s)) for value in values]
        self.parts = [
            (weight / total * (e - value), 0.0 * rate if k == 0 else rate)
            for k, (weight, e, value, rate) in enumerate(zip(weights, eps, values, rates, strict=True))
        ]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time, total = fold(torch.tan(t) / (1 + torch.tan(t))), fold(torch.sin(t) + torch.cos(t))
        return x / total - time * sum(m * torch.exp(rate * (self.begin - time)) for m, rate in self.parts)

    def moved(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        (a, b), x = (fold(torch.tan(angle) / (1 + torch.tan(angle))) for angle in (t, r)), x / fold(t.sin() + t.cos())
        for k, (m, rate) in enumerate(self.parts):
            way = a - b if k == 0 else (torch.exp(rate * (self.begin - b)) - torch.exp(rate * (self.begin - a))) / rate
            x = x - m * way
        return x * fold(r.sin() + r.cos())


class Straight:
    """A training step, line by line."""

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        self.plain, self.key, self.step = plain, (KEY[0], step, KEY[2]), step
        own: Any = arc_flow if "momenta" in options else pi_flow
        self.c: Any = own.Config(**options)
        self.method: Any = own.METHOD(plain.teacher(dropout=0.3), self.c)
        scatter(self.method.student, 20)
        self.batch = batch_of(self.key, images=False)
        self.labels = self.batch.cond["class_labels"]

    def policy(self, x_s: Tensor, s: Tensor, e: Tensor, kept: Tensor | None = None) -> Any:
        """x0 as a function of x and t, all images of one channel."""
        k, net = getattr(self.c, "momenta", None) or self.c.components, self.method.student.network
        y = self.plain.output(net, x_s, s, class_labels=self.labels)
        values = [self.plain.x0_eps(lambda *_, j=j, **__: y[:, j : j + 1], x_s, s)[0] for j in range(k)]
        if "momenta" in vars(self.c):
            return Momenta(x_s, s, values, y[:, k : 2 * k].split(1, 1), y[:, 2 * k :].split(1, 1), kept)
        if self.c.policy == "nodes":

            def on_the_way(x: Tensor, t: Tensor) -> Tensor:
                place = ((t - e) / (s - e)).clamp(0, 1) * (k - 1)
                weights = [(1 - (place - j).abs()).clamp(min=0) for j in range(k)]
                return sum(fold(w) * value for w, value in zip(weights, values, strict=True))  # type: ignore[return-value]

            return on_the_way
        width = fold(y[:, -1].flatten(1).mean(1).exp() * torch.sin(s))

        def mixture(x: Tensor, t: Tensor) -> Tensor:
            nu = fold(torch.cos(t) / torch.sin(t) ** 2) * x - fold(torch.cos(s) / torch.sin(s) ** 2) * x_s
            zeta = fold(1 / torch.tan(t) ** 2 - 1 / torch.tan(s) ** 2)
            precision = 1 / width**2 + zeta
            means = [(value / width**2 + nu) / precision for value in values]
            logits = [
                y[:, k + j : k + j + 1] + (precision * mean**2 - value**2 / width**2) / 2
                for j, (value, mean) in enumerate(zip(values, means, strict=True))
            ]
            weights = torch.stack([logit - torch.stack(logits).max(0).values for logit in logits]).exp()
            if kept is not None:
                weights = weights * kept.T[..., None, None, None]
            return (weights * torch.stack(means)).sum(0) / weights.sum(0)

        return mixture

    def moved(self, x0: Any, x: Tensor, t: Tensor, r: Tensor, steps: int) -> Tensor:
        if isinstance(x0, Momenta):
            return x0.moved(x, t, r)
        for j in range(steps):
            here, there = t + j / steps * (r - t), t + (j + 1) / steps * (r - t)
            clean = x0(x, here)
            x = noised(clean, there, (x - fold(torch.cos(here)) * clean) / fold(torch.sin(here)))
        return x

    def velocity(self, x0: Any, x: Tensor, t: Tensor) -> Tensor:
        clean = x0(x, t)
        return fold(torch.cos(t)) * (x - fold(torch.cos(t)) * clean) / fold(torch.sin(t)) - fold(torch.sin(t)) * clean

    def turn(self) -> Values:
        c, plain = self.c, self.plain
        levels = list(c.levels or plain.levels(c.student_steps, c.student_level))
        angles = [plain.angle(level) for level in levels] + [0.0]
        k = int(torch.randint(len(levels), (), generator=draw(*self.key[:2], "student/level")))
        x, s = plain.start(levels[0], normal("z", self.key))
        with torch.no_grad():
            for j in range(k):
                e = torch.full_like(s, angles[j + 1])
                x, s = self.moved(self.policy(x, s, e), x, s, e, c.substeps), e
        e, kept = torch.full_like(s, angles[k + 1]), None
        if c.component_dropout:
            u = mine(
                torch.rand(
                    WHOLE,
                    getattr(c, "momenta", None) or c.components,
                    generator=step_draw("student/components", self.key),
                ),
                self.key,
            )
            kept = (u >= c.component_dropout) | (u == u.max(1, keepdim=True).values)
        x0 = self.policy(x, s, e, kept)
        u, here, losses = uniform("student/t", self.key), s, []
        share = c.teacher_share * max(0.0, 1 - self.step / c.mixing_steps)
        for i in range(c.states):
            t = s + torch.floor((i + u) / c.states * c.substeps) / c.substeps * (e - s)
            t = t.clamp(min=plain.ends()[0])
            with torch.no_grad():
                x = self.moved(x0, x, here, t, math.ceil(c.substeps / c.states))
                image, noise = plain.guided(self.method_teacher, x, t, self.labels, float(c.guidance_scale))
            theirs = fold(torch.cos(t)) * noise - fold(torch.sin(t)) * image
            at, y, said = t, x, []
            for _ in range(c.window):
                said.append(self.velocity(x0, y, at))
                after = torch.maximum(at - (s - e) / c.substeps, e + (s - e) / c.substeps)
                y, at = self.moved(x0, y, at, after, 1), after
            losses.append((sum(said) / c.window - theirs).square().mean())  # type: ignore[operator]
            here = t
            if share:
                here = t + share / c.states * (e - t)
                x = noised(image, here, noise)
        loss = sum(losses) / c.states
        return {"loss": loss, "imitation": loss}  # type: ignore[dict-item]

    @property
    def method_teacher(self) -> Any:
        teacher: Any = self.method.teacher
        return getattr(teacher, "denoiser", teacher).network


CASES: list[tuple[dict[str, Any], Plain]] = [
    ({"student_steps": 3, "components": 4, "substeps": 4, "states": 2, "guidance_scale": 2.5}, VP),
    ({"student_steps": 2, "components": 3, "substeps": 5, "states": 2, "window": 3, "component_dropout": 0.5}, TRIG),
    ({"student_steps": 2, "components": 4, "policy": "nodes", "substeps": 6, "states": 4, "window": 2}, EDM_),
    ({"levels": (0.9, 0.5, 0.2), "substeps": 4, "states": 2, "teacher_share": 0.8, "mixing_steps": 5}, FLOW),
    ({"student_steps": 2, "student_level": 19.0, "components": 2, "substeps": 3, "states": 3}, EPS),
    ({"student_steps": 2, "momenta": 3, "substeps": 4, "states": 2, "window": 2, "component_dropout": 0.4}, VP),
    ({"momenta": 2, "substeps": 6, "states": 3, "teacher_share": 0.8, "mixing_steps": 5}, FLOW),
]


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    straight.method.student.eval()  # dropout is that of one pass
    agree_alone(straight.method, step, straight.batch, straight.turn)


@pytest.mark.parametrize("kind", ["components", "momenta"])
@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_a_sample_is_where_the_policies_lead(plain: Plain, kind: str) -> None:
    straight = Straight({"student_steps": 3, kind: 3, "substeps": 4}, plain)
    straight.method.student.eval()
    sampler = straight.method.sampler()
    assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(3), rel=1e-12)
    z = torch.randn(SIZE, *straight.batch.shape)
    x, t = sampler.input_at(2, z, straight.batch.cond, lambda j: z)
    got = sampler.denoiser(x, t, straight.batch.cond).x0
    y, s = plain.start(sampler.levels[0], z)
    for level in [*sampler.levels[1:], None]:
        e = torch.zeros_like(s) if level is None else torch.full_like(s, plain.angle(level))
        y, s = straight.moved(straight.policy(y, s, e), y, s, e, 4), e
    assert torch.allclose(got, y, rtol=1e-9), (got - y).abs().max()
