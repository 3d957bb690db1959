"""Whole turns of ctm, against a straight-line rewrite."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.ctm import CTM
from diffdistill.players.sampler import DDIM, Gamma, Renoise
from diffdistill.scaffold.method import Need
from tests.methods.test_wiring_tangent import Straight as OneGame
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
    agree,
    batch_of,
    copies,
    draw,
    fold,
    gaussian,
    in_double,
    mine,
    modes,
    noised,
    normal,
    scatter,
    step_draw,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight(OneGame):
    """The turns of a training step, line by line."""

    method: CTM  # type: ignore[assignment]

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        super().__init__("ctm", options, plain, step)
        scatter(self.method.target, 21)
        self.target: Any = self.method.target.network
        if self.c.gan_weight:
            scatter(self.method.adversary.heads, 22)

    def grid(self) -> list[float]:
        c, n, plain = self.c, self.c.grid_points, self.plain
        first = plain.angle(plain.levels(c.student_steps, c.student_level)[0])
        if c.grid == "native":  # of the kinds whose stock rows are the students'
            return [first, *map(plain.angle, plain.levels(n - 1, c.student_level)[1:]), 0.0]
        low, high = plain.ends()
        high = high if c.student_level is None else plain.angle(c.student_level)
        low, high = low or math.atan(0.004), min(high, math.atan(160.0))
        a, b = math.tan(high) ** (1 / 7), math.tan(low) ** (1 / 7)
        return [first, *(math.atan((a + k / (n - 1) * (b - a)) ** 7) for k in range(1, n - 1)), 0.0]

    def span(self) -> tuple[list[Tensor], Tensor]:
        grid = torch.tensor(self.grid())
        most = min(self.c.solver_steps, len(grid) - 1)
        n = 1 + int(torch.multinomial(torch.arange(1.0, most + 1), 1, generator=draw(*self.key[:2], "student/n")))
        i = whole(len(grid) - n, "student/t", self.key)
        j = i + n + torch.floor(uniform("student/s", self.key) * (len(grid) - n - i)).long()
        return [grid[i + k] for k in range(n + 1)], grid[j]

    def heun(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The mean of both ends' noise; of their images from pure noise; a step to 0 has one end."""
        scale, sin, cos = float(self.c.guidance_scale), fold(torch.sin(t)), fold(torch.cos(t))
        x0, eps = self.plain.guided(self.teacher, x, t, self.labels, scale)
        y0, noise = self.plain.guided(self.teacher, noised(x0, s, eps), s, self.labels, scale)
        x0, eps = (torch.where(fold(s) == 0, a, (a + b) / 2) for a, b in ((x0, y0), (eps, noise)))
        mean_noise = fold(torch.cos(s)) * (x - sin * eps) / cos + fold(torch.sin(s)) * eps
        mean_image = fold(torch.cos(s)) * x0 + fold(torch.sin(s)) * (x - cos * x0) / sin
        return torch.where(fold(t) > math.atan(200), mean_image, mean_noise)

    def leap(self, net: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        own, self.student = self.student, net
        f = self.jump(x, t, s, self.labels)
        self.student = own
        return torch.where(fold(t > s), fold(torch.cos(t - s)) * x - fold(torch.sin(t - s)) * f, x)

    def end(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self.dropped()
        return self.leap(self.target, self.leap(self.student, x, t, s), s, 0 * s)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        gap = self.plain.std * (x - y).flatten(1)
        if self.c.distance == "l2":
            return gap.square().mean(1)
        c = 0.00054 * 3 if self.c.huber_c is None else self.c.huber_c
        return torch.sqrt(gap.square().sum(1) + c**2) - c

    def denoising(self) -> Tensor:
        made, n = step_draw("student/dsm t", self.key), WHOLE // 2
        low = self.plain.log_normal(torch.randn(n, generator=made), -1.2, 1.2)
        t = mine(torch.cat([low, self.plain.karras(0.3 + 0.7 * torch.rand(WHOLE - n, generator=made))]), self.key)
        eps = normal("student/dsm eps", self.key)
        f = self.jump(noised(self.image, t, eps), t, t, self.labels)
        return (f - fold(torch.cos(t)) * eps + fold(torch.sin(t)) * self.image).square().mean()

    def logits(self, x: Tensor, stream: str) -> Tensor:
        (head,) = self.method.adversary.heads
        t = self.plain.log_normal(gaussian(f"{stream} t", self.key), self.c.gan_time_mean, self.c.gan_time_std)
        time, _, _, factor = self.plain.native(t)
        x_t = noised(x, t, normal(f"{stream} eps", self.key))
        return head(self.method.adversary.teacher.network.hidden(fold(factor) * x_t, time, self.labels))

    def ratio(self, first: Tensor, other: Tensor) -> Tensor:
        w = self.student.write.weight
        one, two = (torch.autograd.grad(loss, w, retain_graph=True)[0].norm() for loss in (first, other))
        return one / (two + 1e-4)

    def _ctm(self) -> Values:
        c, (path, s) = self.c, self.span()
        x = x_t = noised(self.image, path[0], self.eps)
        with torch.no_grad():
            for a, b in pairwise(path):
                x = self.heun(x, a, b)
        state = torch.get_rng_state()  # these passes leave the global generator as it was
        self.x = self.end(x_t, path[0], s)
        first = self.distance(self.x, self.end(x, path[-1], s).detach()).mean()
        torch.set_rng_state(state)
        loss, values = first, {"consistency": first}
        if c.dsm_weight:
            values["denoising"] = dsm = self.denoising()
            loss = loss + c.dsm_weight * (self.ratio(first, dsm).clamp(0, 1e4) if c.adaptive else 1) * dsm
        if c.gan_weight and self.step >= c.gan_start:
            values["gan"] = gan = -self.logits(self.x, "student/gan").mean()
            loss = loss + c.gan_weight * (self.ratio(first, gan).clamp(0.01, 10) if c.adaptive else 1) * gan
        return {"loss": loss, **values}

    def discriminator_turn(self) -> Values:
        real, fake = (self.logits(x, "discriminator/gan") for x in (self.image, self.x.detach()))
        loss = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
        return {"loss": loss, "gan": loss}


PLAIN = {"dsm_weight": 0.0, "huber_c": 0.2, "grid_points": 6}
GAN = {**PLAIN, "gan_weight": 0.8, "gan_time_mean": -0.4, "gan_time_std": 0.8}
CASES: list[tuple[dict[str, Any], Plain]] = [
    ({**PLAIN, "guidance_scale": 2.5, "grid": "native"}, VP),
    ({**PLAIN, "guidance_scale": 2.5, "distance": "l2", "solver_steps": 2}, EDM_),
    ({**PLAIN, "grid_points": 4, "student_level": 0.8}, FLOW),
    ({**PLAIN, "grid": "native", "student_level": 11.0, "solver_steps": 1}, VP),
    ({"grid_points": 5, "dsm_weight": 0.6}, EPS),
    ({"grid_points": 5, "dsm_weight": 0.6, "adaptive": False}, EDM_),
    (GAN, FLOW),
    ({**GAN, "adaptive": False, "dsm_weight": 0.3}, TRIG),
]


@pytest.mark.parametrize("step", [3, 20])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    turns = straight.method.turns(step)
    assert [turn.player for turn in turns] == ["student"] + ["discriminator"] * ("gan_weight" in options)
    agree(straight.method, turns[0], straight.batch, straight.turn)
    for turn in turns[1:]:
        agree(straight.method, turn, straight.batch, straight.discriminator_turn)


def test_the_spans_of_many_steps() -> None:
    straight = Straight(PLAIN, EDM_)
    for step in range(20):
        straight.key = (KEY[0], step, KEY[2])
        path, s = straight.span()
        got = straight.method.interval(step, batch_of(straight.key))
        assert got.path.shape == (len(path), SIZE), "the solver's steps"
        assert torch.allclose(got.path, torch.stack(path)) and torch.allclose(got.s, s)
        assert torch.equal(got.t, got.path[0])


def test_the_gan_waits() -> None:
    for step in (3, 4):
        straight = Straight({**GAN, "gan_start": 4}, TRIG, step)
        turns = straight.method.turns(step)
        assert len(turns) == step - 2
        agree(straight.method, turns[0], straight.batch, straight.turn)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_gans_lambda_has_limits(factor: float) -> None:
    straight = Straight(GAN, FLOW)
    with torch.no_grad():
        for p in straight.method.adversary.heads.parameters():
            p.mul_(factor)
    agree(straight.method, straight.method.turns(4)[0], straight.batch, straight.turn)


@pytest.mark.parametrize(("options", "plain"), [CASES[0], CASES[4], CASES[7]])
def test_who_is_asked_and_who_drops(options: dict[str, Any], plain: Plain) -> None:
    """The student and its slow copy drop units, the teacher never, which has one pass for each end of a step."""
    straight = Straight(options, plain)
    nets = {"teacher": straight.teacher, "student": straight.student, "target": straight.target}
    parts = {name: net.dropout for name, net in nets.items()}
    calls = modes(parts, lambda: straight.method.turns(4)[0].loss(straight.batch))
    assert all(dropping == (who != "teacher") for who, dropping in calls)
    assert [who for who, _ in calls].count("student") == 2 + bool(straight.c.dsm_weight)
    assert [who for who, _ in calls].count("target") == 2
    for net in (straight.teacher, straight.target):
        assert not any(p.requires_grad for p in net.parameters())


def test_the_target_is_the_students_average() -> None:
    method = Straight({**PLAIN, "target_ema": 0.8}, VP).method
    assert list(method.state) == ["target"] and method.state["target"] is method.target
    target, student = copies(method.target), copies(method.student)
    method.after_step(3)
    for new, old, own in zip(method.target.parameters(), target, student, strict=True):
        assert torch.allclose(new, 0.8 * old + 0.2 * own, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for gamma, step in ((0.0, DDIM()), (0.3, Gamma(0.3)), (1.0, Renoise())):
        straight = Straight({**PLAIN, "student_steps": 3, "gamma": gamma}, plain)
        sampler = straight.method.sampler()
        assert sampler.step == step and sampler.levels == pytest.approx(plain.levels(3), rel=1e-12)
        assert sampler.denoiser is straight.method.student
        first = straight.fraction(torch.tensor([plain.angle(plain.levels(3)[0])]))
        assert float(straight.student.time_embedding.default) == pytest.approx(float(first) / 3)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("plain", [VP, EDM_])
def test_a_sample_is_jumps_and_fresh_noise(plain: Plain, gamma: float) -> None:
    """In sigma's coordinates, to what is left of the next level's noise and back to it."""
    straight = Straight({**PLAIN, "student_steps": 3, "gamma": gamma}, plain)
    straight.method.student.eval()
    levels, z = plain.levels(3), normal("z")
    x, t = plain.start(levels[0], z)
    for k, level in enumerate(levels[1:], 1):
        s = torch.full_like(t, plain.angle(level))
        r = torch.atan(math.sqrt(1 - gamma**2) * torch.tan(s))
        if plain is VP:  # as TCD's scheduler does
            time = math.floor((1 - gamma) * level)
            r = torch.full_like(t, plain.angle(time) if time else 0.0)
        x = straight.leap(straight.student, x, t, r) / fold(torch.cos(r))
        added = torch.sqrt((torch.tan(s) ** 2 - torch.tan(r) ** 2).clamp_min(0))
        x, t = fold(torch.cos(s)) * (x + fold(added) * normal(f"z {k}")), s
    got, time = straight.method.sampler().input_at(2, z, straight.batch.cond, lambda j: normal(f"z {j}"))
    assert torch.allclose(time, t) and torch.allclose(got, x, rtol=1e-7, atol=1e-9)


def test_needs_and_rates() -> None:
    method = Straight({**GAN, "student_lr": 0.1, "discriminator_lr": 0.2, "beta1": 0.3, "weight_decay": 0.4}, VP).method
    assert method.needs == frozenset({Need.IMAGES}) and list(method.players) == ["student", "discriminator"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("discriminator") == (0.2, (0.3, 0.999), 0.4)
    assert list(Straight(PLAIN, VP).method.players) == ["student"]
