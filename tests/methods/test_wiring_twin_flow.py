"""Whole turns of twin_flow, against a straight-line rewrite; its average and its sampler."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.twin_flow import Config, TwinFlow
from diffdistill.players.sampler import DDIM, Renoise
from diffdistill.players.two_times import second_times
from tests.methods.test_wiring_tangent import Straight as OneGame
from tests.scaffold.straight import (
    CLASSES,
    FLOW,
    KEY,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree_alone,
    batch_of,
    copies,
    fold,
    in_double,
    noised,
    normal,
    scatter,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)
SIZE = 6


class Straight(OneGame):
    """A training step, line by line."""

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        self.name, self.plain, self.key, self.step = "twin_flow", plain, (KEY[0], step, KEY[2]), step
        self.c: Any = Config(**options)
        self.method: Any = TwinFlow(plain.teacher(), self.c)
        scatter(self.method.student, 20)
        scatter(self.method.average, 21)
        self.student, self.slow = self.method.student.network, self.method.average.network

    def angle(self, t: Tensor) -> Tensor:
        return torch.atan2(t, (1 - t) * self.plain.std)

    def said(self, net: Any, x: Tensor, t: Tensor, r: Tensor, labels: Tensor, fake: bool) -> tuple[Tensor, Tensor]:
        """Image and noise of the jump; the fake branch's gap is -1."""
        here = self.angle(t).clamp(*self.plain.ends())
        gap = (self.fraction(here) - self.fraction(self.angle(r)))[:, None]
        gap = torch.full_like(gap, -1.0) if fake else gap
        phase = gap * torch.arange(1, 9) * math.pi / 2
        added = net.time_embedding.mlp(torch.cat([gap, torch.sin(phase), 1 - torch.cos(phase)], 1))

        def told(x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            features = torch.stack([torch.sin(0.3 * time), torch.cos(0.05 * time), torch.sin(0.003 * time)], 1)
            h = (
                net.read(x)
                + (net.time_embedding.layer(features) + added + net.class_embedding(class_labels))[:, :, None, None]
            )
            return net.write(torch.tanh(net.middle(net.dropout(torch.tanh(h)))))

        return self.plain.x0_eps(told, x, self.angle(t), class_labels=labels)

    def f(self, *at: Any) -> Tensor:
        x0, eps = self.said(*at)
        return eps - self.plain.std * x0

    def scaled(self, e: Tensor) -> Tensor:
        """The weighted square of errors (B, ...)."""
        c, square = self.c.loss_c, e.flatten(1).square().mean(1)
        return square / torch.sqrt(square.detach() / (c**2 + 1e-8) + 1) / c

    def native(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the normal form, in a flow's own units."""
        return x * fold(torch.sqrt(((1 - t) * self.plain.std) ** 2 + t**2))

    def _twin_flow(self) -> Values:
        c, std, plain = self.c, self.plain.std, self.plain
        top_angle = torch.tensor(plain.angle(plain.levels(1)[0]))
        top = float(torch.sin(top_angle) / (torch.sin(top_angle) + torch.cos(top_angle) / std))
        u1, u2 = uniform("student/t", self.key), uniform("student/r", self.key)
        kinds = [(self.key[2] + k) * 4 // WHOLE for k in range(SIZE)]
        t = torch.tensor([top * (1.0 if k == 0 else float(u1[i])) for i, k in enumerate(kinds)])
        jumped = [{0: 1.0, 1: 0.05 * float(u2[i]), 2: float(u2[i]), 3: 0.0}[k] for i, k in enumerate(kinds)]
        r = t * (1 - torch.tensor(jumped))
        fake = torch.tensor([k == 3 for k in kinds])
        image, z = self.image.clone(), self.eps
        if bool(fake.any()):
            start = normal("student/z", self.key)[fake]
            own = torch.full((int(fake.sum()),), top)
            self.dropped()
            with torch.no_grad():
                image[fake] = self.said(self.student, start, own, 0 * own, self.labels[fake], False)[0]
        x_t, u = noised(image, self.angle(t), z), z - std * image
        parts = []
        for branch in (False, True):
            self.dropped()
            parts.append(self.said(self.student, x_t, t, r, self.labels, branch))
        x0, eps = (torch.where(fold(fake), b, a) for a, b in zip(*parts, strict=True))
        f = eps - std * x0
        with torch.no_grad():
            v = u
            if c.self_guidance:
                null = torch.full_like(self.labels, CLASSES)
                pair = []
                self.dropped()
                for labels in (self.labels, null):
                    pair.append(self.f(self.slow, x_t, t, t, labels, False))
                v = u + c.self_guidance * (pair[0] - pair[1])
            now = torch.maximum(t - c.delta, r)
            x = (self.native(x_t, t) - fold(t - now) * v) / self.native(torch.ones_like(x_t), now)
            way = torch.zeros_like(f)
            self.dropped()
            for k in range(c.ode_order):
                here, there = (now + (r - now) * (k + j) / c.ode_order for j in (0, 1))
                a, b = self.said(self.slow, x, here, there, self.labels, False)
                way = way + fold(here - there) * (b - std * a)
                x = noised(a, self.angle(there), b)
            d = (fold(t - r) * f - way) / c.delta - v
            d = torch.where(fold(t - r < c.delta), f - v, d).clamp(-c.clamp, c.clamp)
            target = torch.where(fold(fake), u, f - d)
        weight = torch.where(fake, 1.0, torch.tan((1 - t + r) * math.pi / 2.5) + 1)
        loss = flow = (weight * self.scaled(f - target)).mean()
        matched = torch.zeros(())
        first = torch.tensor([k == 0 for k in kinds])
        if c.matching_weight and bool(first.any()):
            with torch.no_grad():
                s = uniform("student/matched t", self.key)[first]
                x_s = noised(x0[first], self.angle(s), normal("student/matched eps", self.key)[first])
                self.dropped()
                sides = [self.f(self.student, x_s, s, s, self.labels[first], side) for side in (True, False)]
                pull = (sides[0] - sides[1]).clamp(-c.clamp, c.clamp)
            matched = self.scaled(f[first] - (f[first] - pull).detach()).sum() * 4 / SIZE
            loss = loss + c.matching_weight * matched
        return {"loss": loss, "flow": flow, "matching": matched}


CASES: list[tuple[dict[str, Any], Plain]] = [
    ({"loss_c": 0.5, "delta": 0.1, "clamp": 0.4}, TRIG),
    ({"loss_c": 0.5, "delta": 0.2, "ode_order": 1, "self_guidance": 0.7}, VP),
    ({"matching_weight": 0.0, "delta": 0.1, "ode_order": 3}, TRIG),
]


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, place: int) -> None:
    """Of the first samples of a step, which begin at noise, and of the last ones, some of which are fake."""
    straight = Straight(options, plain)
    straight.key = (*KEY[:2], place)
    straight.batch = batch_of(straight.key)
    straight.eps, images = normal("student/eps", straight.key), straight.batch.x0
    assert images is not None
    straight.image, straight.labels = images, straight.batch.cond["class_labels"]
    agree_alone(straight.method, 3, straight.batch, straight.turn)


def test_the_average_follows_and_is_not_trained() -> None:
    method: Any = Straight({"average_decay": 0.8}, VP).method
    assert list(method.state) == ["average"] and not any(p.requires_grad for p in method.average.parameters())
    slow, own = copies(method.average), copies(method.student)
    method.after_step(0)
    for new, old, now in zip(method.average.parameters(), slow, own, strict=True):
        assert torch.allclose(new, 0.8 * old + 0.2 * now, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("plain", [VP, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for sampling, kind in (("few", Renoise()), ("any", DDIM())):
        method: Any = Straight({"sampling": sampling, "student_steps": 2}, plain).method
        assert method.sampler().step == kind and method.sampler().levels == pytest.approx(plain.levels(2), rel=1e-12)
        method.in_steps(3)
        (layer,) = second_times(method.student)  # which say the jumps that an export has
        assert float(layer.default) == pytest.approx(1 / 3, rel=1e-2)
        assert method.sampler().levels == pytest.approx(plain.levels(3), rel=1e-12)
