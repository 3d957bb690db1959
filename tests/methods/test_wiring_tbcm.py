"""Whole turns of tbcm, against a straight-line rewrite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.tbcm import TBCM
from diffdistill.players.sampler import Renoise
from tests.methods.test_wiring_tangent import Straight as OneGame
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree,
    batch_of,
    fold,
    in_double,
    mine,
    modes,
    normal,
    scatter,
    step_draw,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight(OneGame):
    """The turns of a training step, line by line, without images."""

    method: TBCM  # type: ignore[assignment]

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        super().__init__("tbcm", options, plain, step)
        scatter(self.method.weight, 5)
        self.batch = batch_of(self.key, images=False)
        self.scales = self.c.guidance_min + (self.c.guidance_max - self.c.guidance_min) * uniform(
            "student/scale", self.key
        )

    def walk(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and the direction at all states but the noise, one state of all samples after another."""
        c, plain = self.c, self.plain
        x, top = plain.start(plain.levels(c.student_steps, c.student_level)[0], normal("z", self.key))
        s = c.route_shift
        least = s / 1000 / (1 + (s - 1) / 1000)
        row = torch.tensor([1 + (least - 1) * k / (c.states - 1) for k in range(c.states)])
        row = s * row / (1 + (s - 1) * row)
        cells = torch.atan2(row, 1 - row).clamp(plain.ends()[0], float(top[0]))
        u = mine(torch.rand(c.states - 1, WHOLE, generator=step_draw("student/t", self.key)).T, self.key).T
        t, states = top, []
        for k in range(c.states - 1):
            x0, eps = plain.guided(self.teacher, x, t, self.labels, self.scales)
            t = cells[k + 1] + u[k] * (cells[k] - cells[k + 1])
            x = fold(torch.cos(t)) * x0 + fold(torch.sin(t)) * eps
            x0, eps = plain.guided(self.teacher, x, t, self.labels, self.scales)
            states.append((x, t, fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0))
        x_t, times, v = (torch.cat(part) for part in zip(*states, strict=True))
        return x_t.detach(), times, v.detach()

    def error(self) -> tuple[Tensor, Tensor]:
        c, (x_t, t, v) = self.c, self.walk()
        n = c.states - 1
        labels, scales = self.labels.repeat(n), self.scales.repeat(n)

        def net(x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            if c.guidance_min == c.guidance_max:
                return self.student(x, time, class_labels)
            return self.student(x, time, torch.stack([class_labels.double(), scales], 1))

        def field(x: Tensor, t: Tensor) -> Tensor:
            self.dropped()
            return self.velocity(net, x, t, labels)

        cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
        change = self.change(field, x_t, t, v, torch.cos(t) * torch.sin(t), torch.zeros_like(t))
        f = field(x_t, t)
        calm = min(max(self.step - c.calm_start, 0) / c.calm_steps, 1)
        share = (min(1.0, self.step / c.tangent_warmup) if c.tangent_warmup else 1.0) * (
            1 - calm
        ) + c.final_share * calm
        g = -(cos**2) * (f - v) - share * (cos * sin * x_t + change)
        size = g.square().flatten(1)
        g = g / (fold((size.mean(1) if c.norm == "rms" else size.sum(1)).sqrt()) + c.norm_c)
        return (f - (f + g).detach()).square().flatten(1).mean(1) / torch.tan(t), t

    def _tbcm(self) -> Values:
        error, t = self.error()
        return {"loss": (torch.exp(-self.weight(t)).detach() * error).mean(), "error": error.mean()}

    def weight_turn(self) -> Values:
        error, t = self.error()
        w = self.weight(t)
        return {"loss": (torch.exp(-w) * error.detach() + w).mean()}


SHORT = {"derivative": "exact", "states": 4, "tangent_warmup": 6, "norm_c": 0.3}
CASES: list[tuple[dict[str, Any], Plain]] = [
    (SHORT, TRIG),
    ({**SHORT, "guidance_min": 2.5, "guidance_max": 2.5, "norm": "rms"}, EDM_),
    ({**SHORT, "guidance_min": 2.0, "guidance_max": 5.0, "route_shift": 1.5}, VP),
    ({**SHORT, "tangent_warmup": 0, "final_share": 0.6, "calm_start": 2, "calm_steps": 4}, FLOW),
    ({**SHORT, "student_level": 15.0, "student_steps": 2, "states": 3}, EPS),
    ({**SHORT, "derivative": "central", "derivative_step": 0.11}, EDM_),
]


@pytest.mark.parametrize("step", [4, 20])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_the_turns_are_their_straight_lines(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    student, weight = straight.method.turns(step)
    assert (student.player, weight.player) == ("student", "weight")
    agree(straight.method, student, straight.batch, straight.turn)
    agree(straight.method, weight, straight.batch, straight.weight_turn)


def test_student_and_adaptive_weight_do_not_move_each_other() -> None:
    straight = Straight(SHORT, TRIG)
    student, weight = straight.method.turns(4)
    learned, own = (list(straight.method.players[name].parameters()) for name in ("weight", "student"))
    passed = torch.autograd.grad(student.loss(straight.batch).loss, learned, allow_unused=True, retain_graph=True)
    passed += torch.autograd.grad(weight.loss(straight.batch).loss, own, allow_unused=True)
    assert all(gradient is None for gradient in passed)


@pytest.mark.parametrize(("options", "plain"), CASES[:3])
def test_who_is_asked_and_who_drops(options: dict[str, Any], plain: Plain) -> None:
    """The teacher once at each state and at the noise, the student twice at all of them; the teacher never drops."""
    straight = Straight(options, plain)
    parts = {"teacher": straight.teacher.dropout, "student": straight.student.dropout}
    calls = modes(parts, lambda: straight.method.turns(4)[0].loss(straight.batch))
    assert all(dropping == (who == "student") for who, dropping in calls)
    assert [who for who, _ in calls].count("teacher") == straight.c.states
    assert [who for who, _ in calls].count("student") == 2
    assert not any(p.requires_grad for p in straight.teacher.parameters())


def test_needs_rates_and_the_sampler() -> None:
    rates = {"student_lr": 0.1, "weight_lr": 0.7, "beta1": 0.3, "weight_decay": 0.4}
    method = Straight({**SHORT, **rates, "student_steps": 3}, VP).method
    assert method.needs == frozenset() and list(method.players) == ["student", "weight"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("weight") == (0.7, (0.3, 0.999), 0.0)
    sampler = method.sampler()
    assert (sampler.denoiser, sampler.step) == (method.student, Renoise())
    assert sampler.levels == pytest.approx(VP.levels(3), rel=1e-12)
