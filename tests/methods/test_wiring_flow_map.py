"""Whole turns of flow_map, against a straight-line rewrite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.flow_map import FlowMap
from diffdistill.players.sampler import DDIM
from diffdistill.scaffold.simulation import rolled_out
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
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight(OneGame):
    """The turns of a training step, line by line."""

    method: FlowMap

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        super().__init__("flow_map", options, plain, step)
        if self.method.on_policy is not None:
            self.fake: Any = self.method.players["fake_score"].network
            scatter(self.fake, 30)

    def rate(self, t: Tensor) -> Tensor:
        return self.plain.std * torch.sin(t) + torch.cos(t)

    def spans(self) -> tuple[Tensor, Tensor]:
        c, made = self.c, step_draw("student/t", self.key)
        first, second = (mine(torch.rand(WHOLE, generator=made), self.key) for _ in range(2))
        late, early = torch.maximum(first, second), torch.minimum(first, second)
        if c.spans == "length":
            length = torch.sigmoid(c.length_mean + mine(torch.randn(WHOLE, generator=made), self.key))
            early = (1 - length) * first
            late = early + length
        t, r = self.plain.at(late), self.plain.at(early)
        r = torch.where(uniform("student/end", self.key) < c.end_share, 0.0, r)
        r = torch.where(uniform("student/equal", self.key) < c.equal_share, t, r)
        t = t.clamp(*self.plain.ends())
        return t, torch.minimum(r, t)

    def leap(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """F of the student, which drops the same units in all passes."""
        self.dropped()
        return self.jump(x, t, r, labels)

    def lead(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """X: where the student leads to."""
        return fold(torch.cos(t - r)) * x - fold(torch.sin(t - r)) * self.leap(x, t, r, labels)

    def own(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t.clamp(*self.plain.ends())
        if self.c.mode == "distillation":
            return self.teachers_velocity(x, t).detach()
        return self.leap(x, t, t, labels).detach()

    def lagrangian(self, x: Tensor, t: Tensor, r: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        here = self.lead(x, t, r, labels)
        if self.c.derivative == "exact":
            change = torch.func.jvp(lambda r: self.lead(x, t, r, labels), (r,), (torch.ones_like(r),))[1]
        else:
            after, before = torch.minimum(r + self.c.derivative_step, t), (r - self.c.derivative_step).clamp(min=0)
            change = self.lead(x, t, after, labels) - self.lead(x, t, before, labels)
            change = torch.where(fold(t > r), change / fold(after - before).clamp(min=1e-6),
                                 self.leap(x, t, r, labels))  # fmt: skip
        aim = torch.where(fold(t > r), self.own(here.detach(), r, labels), v)
        falls = self.plain.std * torch.cos(r) - torch.sin(r)
        return fold(self.rate(r)) * (change - aim) - fold(falls) * (here - here.detach())

    def eulerian(self, x: Tensor, t: Tensor, r: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        c = self.c
        if c.path == "own" and c.mode == "training":
            v = torch.where(fold(t > r), self.own(x, t, labels), v)
        k = self.rate(t) / self.rate(r)

        def field(x: Tensor, t: Tensor) -> Tensor:
            return self.leap(x, t, r, labels)

        change = self.change(field, x, t, v, k * torch.sin(t - r), r)
        f = field(x, t)
        gap = fold(k * torch.cos(t - r)) * (f - v) + fold(k * torch.sin(t - r)) * x + change
        share = c.tangent_share * (min(1.0, self.step / c.tangent_warmup) if c.tangent_warmup else 1.0)
        return fold(self.rate(t)) * (f - (f - share * gap - (1 - share) * (f - v)).detach())

    def progressive(self, x: Tensor, t: Tensor, r: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        seed = step_draw("student/dropout", self.key).initial_seed()
        h = mine(torch.rand(WHOLE, generator=draw(seed, "split")), self.key) if self.c.split == "uniform" else 0.5
        s = (r + h * (t - r)).clamp(min=self.plain.ends()[0])
        end = self.lead(self.lead(x, t, s, labels), s, r, labels)
        whole = torch.where(t > r, torch.sin(t - r), 1.0)
        both = (fold(torch.cos(t - r)) * x - end) / fold(whole)
        f = self.leap(x, t, r, labels)
        return fold(self.rate(t)) * (f - torch.where(fold(t > r), both, v).detach())

    def rollout(self) -> Tensor:
        c, made = self.c, draw(*self.key[:2], "student/rollout")
        n = c.rollout_steps[int(torch.randint(len(c.rollout_steps), (), generator=made))]
        k = int(torch.randint(n, (), generator=made))
        levels = self.plain.levels(n, c.student_level)
        x, t = self.plain.start(levels[0], normal("z", self.key))
        angles = [*map(self.plain.angle, levels), 0.0]
        for j in sorted({0, k, k + 1, n})[1:]:
            r = torch.full_like(t, angles[j])
            f = self.jump(x, t, r, self.labels)
            x, t = fold(torch.cos(t - r)) * x - fold(torch.sin(t - r)) * f, r
        return x

    def matching(self) -> Values:
        c, x = self.c, self.rollout()
        self.x = x.detach()
        scale = c.guidance_scale if c.matching_guidance is None else c.matching_guidance
        t = self.plain.at(uniform("matching/t", self.key))
        x_t = noised(x, t, normal("matching/eps", self.key))
        with torch.no_grad():
            teacher = self.plain.guided(self.judge, x_t, t, self.labels, float(scale))[0]
            fake = self.plain.x0_eps(self.fake, x_t, t, class_labels=self.labels)[0]
            size = (x - teacher).abs().flatten(1).mean(1)
            push = fold(1 / size) * (fake - teacher)
        loss = self.plain.std * 0.5 * (x - (x - push).detach()).square().mean()
        return {"loss": c.matching_weight * loss, "gap": ((fake - teacher).abs().flatten(1).mean(1) / size).mean()}

    @property
    def judge(self) -> Any:
        assert self.method.on_policy is not None
        return getattr(self.method.on_policy.judge, "denoiser", self.method.on_policy.judge).network

    def turn(self) -> Values:
        c, (t, r) = self.c, self.spans()
        x, labels = noised(self.image, t, self.eps), self.labels
        v = self.teachers_velocity(x, t) if c.mode == "distillation" else self.data_velocity(t)
        if c.mode == "training" and c.guidance_scale != 1:
            v, labels = self.guided_by_itself(x, t, t < 0)
        state = torch.get_rng_state()
        square = getattr(self, c.objective)(x, t, r, v.detach(), labels).square().flatten(1).sum(1)
        weight = 1 / (square.detach() + c.weight_c) ** c.weight_power
        values = {"loss": (weight * square).mean(), "error": square.mean()}
        if not c.matching_weight:
            return values
        torch.set_rng_state(state)
        more = self.matching()
        return values | more | {"loss": values["loss"] + more["loss"]}

    def fake_turn(self) -> Values:
        u = torch.sigmoid(gaussian("fake_score/t", self.key))
        t, eps = self.plain.at(u), normal("fake_score/eps", self.key)
        x0, noise = self.plain.x0_eps(self.fake, noised(self.x, t, eps), t, class_labels=self.labels)
        cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
        loss = ((cos * noise - sin * x0) - (cos * eps - sin * self.x)).square().mean()
        return {"loss": loss, "denoising": loss}


SHARED = {"derivative": "exact", "equal_share": 0.3, "end_share": 0.3, "weight_power": 0.7, "weight_c": 0.2}
LAGRANGIAN, EULERIAN, PROGRESSIVE = (
    {**SHARED, "objective": name} for name in ("lagrangian", "eulerian", "progressive")
)  # fmt: skip
TRAINING = {"mode": "training"}
CENTRAL = {"derivative": "central", "derivative_step": 0.11}
GUIDED = {**TRAINING, "guidance_scale": 2.5, "label_dropout": 0.4}
MATCHED = {"matching_weight": 0.7, "rollout_steps": (2, 5), "matching_guidance": 3.0}
CASES: list[tuple[dict[str, Any], Plain]] = [
    ({**LAGRANGIAN, "guidance_scale": 2.5}, EDM_),
    ({**LAGRANGIAN, **GUIDED}, FLOW),
    ({**LAGRANGIAN, **CENTRAL}, VP),
    ({**LAGRANGIAN, **CENTRAL, **TRAINING}, FLOW),
    ({**EULERIAN, "guidance_scale": 2.5, "tangent_share": 0.9, "tangent_warmup": 6}, EDM_),
    ({**EULERIAN, **TRAINING, "spans": "length", "length_mean": -0.3}, TRIG),
    ({**EULERIAN, **GUIDED, **CENTRAL, "path": "data"}, FLOW),
    ({**PROGRESSIVE, "guidance_scale": 2.5}, EPS),
    ({**PROGRESSIVE, **GUIDED, "split": "midpoint"}, EDM_),
    ({**EULERIAN, **MATCHED, "student_level": 20.0}, EDM_),
    ({**PROGRESSIVE, **MATCHED, "guidance_scale": 2.5, "matching_guidance": None}, VP),
    ({**LAGRANGIAN, **GUIDED, **MATCHED}, FLOW),
]


@pytest.mark.parametrize("step", [3, 20])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    turns = straight.method.turns(step)
    agree(straight.method, turns[0], straight.batch, straight.turn)
    for turn in turns[1:]:
        agree(straight.method, turn, straight.batch, straight.fake_turn)
    assert [turn.player for turn in turns] == ["student", *(["fake_score"] if "matching_weight" in options else [])]


@pytest.mark.parametrize("mode", ["distillation", "training"])
@pytest.mark.parametrize("objective", ["lagrangian", "eulerian", "progressive"])
@pytest.mark.parametrize("derivative", ["exact", "central"])
def test_jumps_near_the_data(objective: str, mode: str, derivative: str) -> None:
    """No network is asked nearer to the data than it knows, though the jumps end there, nor a jump that leads back."""
    options = {"objective": objective, "mode": mode, "derivative": derivative, "derivative_step": 0.3}
    straight = Straight({**SHARED, **options}, EPS)
    t, r = torch.full((SIZE,), 1.3 * EPS.ends()[0]), torch.zeros(SIZE)
    straight.method.times = lambda batch: (t, r)  # type: ignore[method-assign]
    straight.spans = lambda: (t, r)  # type: ignore[method-assign]
    agree(straight.method, straight.method.turns(4)[0], straight.batch, straight.turn)


def test_the_jumps_of_the_matched_samples_are_drawn_for_the_step() -> None:
    for step in range(8):
        straight = Straight({**LAGRANGIAN, **MATCHED}, EDM_, step)
        straight.method.student.eval()
        drawn = rolled_out(straight.method.student, straight.c.rollout_steps, None, straight.batch)
        assert torch.allclose(drawn, straight.rollout(), rtol=1e-9), step


@pytest.mark.parametrize(("options", "plain"), CASES)
def test_who_drops_and_who_is_trained(options: dict[str, Any], plain: Plain) -> None:
    straight = Straight(options, plain)
    parts = {"teacher": straight.teacher.dropout, "student": straight.student.dropout}
    if matched := "matching_weight" in options:
        assert straight.judge is straight.teacher and straight.fake.dropout.p == 0.0
    calls = modes(parts, lambda: straight.method.turns(4)[0].loss(straight.batch))
    assert all(dropping == (who == "student") for who, dropping in calls)
    assert ("teacher" in dict(calls)) == (straight.c.mode == "distillation" or matched)
    assert not any(p.requires_grad for p in straight.teacher.parameters())


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_rates_and_the_sampler(plain: Plain) -> None:
    rates = {"student_lr": 0.1, "fake_score_lr": 0.2, "beta1": 0.3, "weight_decay": 0.4, "matching_weight": 1.0}
    method = Straight({**rates, "student_steps": 3}, plain).method
    assert list(method.players) == ["student", "fake_score"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("fake_score") == (0.2, (0.3, 0.999), 0.4)
    sampler = method.sampler()
    assert (sampler.denoiser, sampler.step) == (method.student, DDIM())
    assert sampler.levels == pytest.approx(plain.levels(3), rel=1e-12)
    assert list(Straight({}, plain).method.players) == ["student"]
