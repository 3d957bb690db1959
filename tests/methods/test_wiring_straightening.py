"""Whole turns of the methods that straighten flows, against a straight-line rewrite."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import DDIM
from tests.scaffold.straight import (
    CLASSES,
    EDM_,
    EPS,
    FLOW,
    KEY,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree,
    agree_alone,
    batch_of,
    copies,
    fold,
    in_double,
    mine,
    nets,
    noised,
    normal,
    scatter,
    step_draw,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """One method's turn at a training step, line by line."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        module = describe_method(name).load()
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        self.c: Any = module.Config(**options)
        self.method: Any = module.METHOD(replace(plain.teacher(dropout=0.3), lora={}), self.c)
        scatter(self.method.student, 20)
        self.teacher, self.student = nets(self.method.teacher, self.method.student)
        self.batch = batch_of(self.key, images=name == "perflow", pairs=name != "perflow")
        self.labels = self.batch.cond["class_labels"]

    def said(self, net: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.x0_eps(net, x, t, class_labels=self.labels)

    def turn(self) -> Values:
        return getattr(self, f"_{self.name}")()

    def far(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) of images, in the data's units."""
        return (self.plain.std * (x - y)).flatten(1).square().mean(1)

    # -- reflow ------------------------------------------------------------------------------------------------------

    def _reflow(self) -> Values:
        c, std = self.c, self.plain.std
        pair: Any = self.batch.pair
        self.labels = pair.cond["class_labels"]
        made = step_draw("student/t", self.key)
        u = torch.rand(WHOLE, generator=made, dtype=torch.float64)
        if c.time_exponent:
            a = c.time_exponent
            u = torch.log(1 + u * (math.exp(a) - 1)) / a
            u = torch.where(torch.rand(WHOLE, generator=made, dtype=torch.float64) < 0.5, u, 1 - u)
        t = self.plain.at(mine(u, self.key))
        x0, eps = self.said(self.student, noised(pair.x0, t, pair.z), t)
        gap = (eps - std * x0 - (pair.z - std * pair.x0)).flatten(1)
        time = torch.sin(t) / (torch.sin(t) + torch.cos(t) / std)
        loss = gap.square().mean(1)
        if c.velocity_loss == "huber":
            size = gap.shape[1]
            edge = 0.00054 * size
            loss = (1 - time) * (torch.sqrt(gap.square().sum(1) + edge**2) - edge) / size
        if c.image_weight:
            loss = loss + c.image_weight * self.far(x0, pair.x0) / (time if c.image_over_time else 1)
        return {"loss": loss.mean(), "straightness": loss.mean()}

    def distilled(self) -> Values:
        """The second stage."""
        c, plain = self.c, self.plain
        z = normal("student/z", self.key)
        previous = self.method.stage.previous.network
        levels = [math.pi / 2 * (c.ode_steps - k) / c.ode_steps for k in range(c.ode_steps)]
        x, t = plain.start(levels[0], z)
        for k, level in enumerate(levels):
            t = torch.full_like(t, plain.angle(level))
            s = torch.full_like(t, plain.angle(levels[k + 1]) if k + 1 < len(levels) else 0.0)
            x0, eps = self.said(previous, x, t)
            x = noised(x0, s, eps)
        torch.manual_seed(7)
        one, t = plain.start(plain.levels(1)[0], z)
        loss = self.far(self.said(self.student, one, t)[0], x.detach()).mean()
        return {"loss": loss, "straightness": loss}

    # -- slim_flow ---------------------------------------------------------------------------------------------------

    def _slim_flow(self) -> Values:
        c, std, pair = self.c, self.plain.std, self.batch.pair
        assert pair is not None
        self.labels = pair.cond["class_labels"]
        beta = max(0.0, 1 - self.step / c.anneal_steps) if c.anneal_steps else 0.0
        z = (1 - beta**2) ** 0.5 * pair.z + beta * normal("student/fresh", self.key)
        t = self.plain.at(uniform("student/t", self.key))
        x0, eps = self.said(self.student, noised(pair.x0, t, z), t)
        loss = (eps - std * x0 - (z - std * pair.x0)).square().mean()
        return {"loss": loss, "straightness": loss}

    def jumped(self, z: Tensor) -> Tensor:
        """The image of the student's one step from noise."""
        one, t = self.plain.start(self.plain.levels(1)[0], z)
        return self.said(self.student, one, t)[0]

    def slim_distilled(self) -> Values:
        """The second stage."""
        c, std, pair, of_batch = self.c, self.plain.std, self.batch.pair, self.labels
        assert pair is not None
        self.labels = pair.cond["class_labels"]
        paired = self.far(self.jumped(pair.z), pair.x0).mean()
        if not c.guide_weight:
            return {"loss": paired, "straightness": paired}
        self.labels, z = of_batch, normal("student/z", self.key)
        x = self.jumped(z)
        s = 0.2 + 0.6 * uniform("student/middle", self.key)
        t = torch.arctan(s / ((1 - s) * std))
        with torch.no_grad():
            end = self.said(self.method.stage.previous.network, noised(x, t, z), t)[0]
        guided = self.far(x, end).mean()
        return {"loss": paired + c.guide_weight * guided, "straightness": paired, "guided": guided}

    # -- perflow -----------------------------------------------------------------------------------------------------

    def _perflow(self) -> Values:
        c, plain, n = self.c, self.plain, self.c.solver_steps
        grid = torch.tensor([plain.angle(level) for level in plain.levels(c.windows * n, c.student_level)] + [0.0])
        if c.label_dropout:
            self.labels = torch.where(uniform("student/drop", self.key) < c.label_dropout, CLASSES, self.labels)
        window = whole(c.windows, "student/window", self.key)
        s, e = grid[window * n], grid[window * n + n]
        assert self.batch.x0 is not None
        x = x_s = noised(self.batch.x0, s, normal("student/eps", self.key))
        with torch.no_grad():
            for k in range(n):
                now, then = grid[window * n + k], grid[window * n + k + 1]
                x0, eps = plain.guided(self.teacher, x, now, self.labels, float(c.guidance_scale))
                x = noised(x0, then, eps)
        x0 = (fold(torch.sin(s)) * x - fold(torch.sin(e)) * x_s) / fold(torch.sin(s - e))
        eps = (fold(torch.cos(e)) * x_s - fold(torch.cos(s)) * x) / fold(torch.sin(s - e))
        low, high = (self.fraction(part) for part in (e, s))
        begins = uniform("student/at start", self.key) < c.at_start
        inside = torch.where(begins, 0.0, uniform("student/t", self.key))
        t = torch.minimum(plain.at(high + inside * (low - high)), s)
        own = self.said(self.student, noised(x0, t, eps), t)
        parts = {
            "epsilon": (0.0, 1.0),
            "velocity": (-plain.std, 1.0),
            "v": (-fold(torch.sin(t)), fold(torch.cos(t))),
        }[c.loss]
        gap = parts[0] * (own[0] - x0) + parts[1] * (own[1] - eps)
        return {"loss": gap.square().mean(), "straightness": gap.square().mean()}

    def fraction(self, t: Tensor) -> Tensor:
        plain = self.plain
        if plain.kind == "trig":
            return t / (math.pi / 2)
        if plain.kind == "flow":
            sigma = plain.native(t)[2]
            return sigma / (2 - sigma)
        time = plain.native(t)[0]
        return torch.where(t < plain.table()[0], t / plain.table()[0], 1 + time) / plain.steps


CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("reflow", {}, VP),
    ("reflow", {"time_exponent": 4.0, "velocity_loss": "huber"}, FLOW),
    ("reflow", {"image_weight": 0.7, "image_over_time": True, "time_exponent": 2.0}, EDM_),
    ("slim_flow", {"anneal_steps": 4}, VP),
    ("slim_flow", {"anneal_steps": 2}, EDM_),
    ("slim_flow", {"anneal_steps": 0}, FLOW),
    ("perflow", {"windows": 2, "student_steps": 2, "solver_steps": 3, "guidance_scale": 2.5, "at_start": 0.0}, VP),
    ("perflow", {"windows": 3, "student_steps": 3, "solver_steps": 2, "loss": "velocity", "label_dropout": 0.5}, FLOW),
    ("perflow", {"windows": 2, "student_steps": 4, "solver_steps": 2, "loss": "epsilon", "at_start": 0.4}, TRIG),
]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(name, options, plain, step)
    agree_alone(straight.method, step, straight.batch, straight.turn)


STAGES = {"reflow_steps": 2, "distill_steps": 4, "ode_steps": 3}


def test_the_second_stage_is_its_straight_line_and_holds_the_first() -> None:
    straight = Straight("reflow", STAGES, TRIG, 3)
    method = straight.method
    scatter(method.stage.previous, 21)
    (turn,) = method.turns(3)
    agree(method, turn, straight.batch, straight.distilled)
    assert [method.turns(step)[0].restart for step in range(5)] == [False, False, True, False, False]
    before = copies(method.stage.previous)
    method.after_step(0)
    assert all(torch.equal(p, q) for p, q in zip(before, copies(method.stage.previous), strict=True))
    method.after_step(1)
    assert all(torch.equal(p, q) for p, q in zip(copies(method.student), copies(method.stage.previous), strict=True))
    assert not any(p.requires_grad for p in method.stage.previous.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("plain", [TRIG, VP, EDM_, FLOW])
def test_slim_flows_second_stage_is_its_straight_line(plain: Plain, weight: float) -> None:
    options = {"reflow_steps": 2, "distill_steps": 4, "student_steps": 3, "guide_weight": weight}
    straight = Straight("slim_flow", options, plain, 3)
    scatter(straight.method.stage.previous, 21)
    (turn,) = straight.method.turns(3)
    agree(straight.method, turn, straight.batch, straight.slim_distilled)


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for name, options in (("reflow", {"student_steps": 3}), ("perflow", {"windows": 3, "student_steps": 3})):
        sampler = Straight(name, options, plain).method.sampler()
        assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(3), rel=1e-12)


def test_a_student_gives_the_output_of_its_options() -> None:
    method = Straight("perflow", {"student_output": "v_prediction", "solver_steps": 2}, EPS).method
    assert method.student.output.name == "v_prediction" and method.teacher.output.name == "epsilon"
