"""Whole turns of boot, against a straight-line rewrite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.players.sampler import DDIM
from tests.methods.test_wiring_tangent import Straight as OneGame
from tests.scaffold.straight import EDM_, FLOW, TRIG, VP, Plain, agree_alone, fold, in_double, noised, normal, uniform

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight(OneGame):
    """A training step, line by line."""

    def signal(self, x: Tensor, top: Tensor, s: Tensor) -> Tensor:
        self.dropped()
        f = self.jump(x, top, s, self.labels)
        return fold(torch.cos(top)) * x - fold(torch.sin(top)) * f

    def _boot(self) -> Values:
        c, plain = self.c, self.plain
        levels = plain.levels(c.solver_steps, c.student_level)
        if plain.kind == "edm" and c.student_level is None:  # whose stock grid ends at its least noise
            a, b, n = 30 ** (1 / 7), 0.01 ** (1 / 7), c.solver_steps
            levels = [(a + k / (n - 1) * (b - a)) ** 7 for k in range(n)]
        grid = torch.tensor([plain.angle(level) for level in levels] + [0.0])
        n = c.solver_steps if self.step >= c.ramp_steps else max(1, c.solver_steps * self.step // c.ramp_steps)
        i = torch.floor(uniform("student/t", self.key) * n).long()
        x, top = plain.start(levels[0], normal("z", self.key))
        t, s = grid[i], grid[i + 1]
        own = self.signal(x, top, s)
        with torch.no_grad():
            eps = x / fold(torch.sin(top))
            above = torch.where(fold(i == 0), 0.0, self.signal(x, top, t))
            x_t = torch.where(fold(i == 0), x, noised(above, t, eps))
            x0, _ = plain.guided(self.teacher, x_t, t, self.labels, float(c.guidance_scale))
            k = fold(torch.tan(s) / torch.tan(t))
            target = (1 - k) * x0 + k * above
        loss = (own - target).square().mean()
        return {"loss": loss, "bootstrap": loss}


CASES: list[tuple[dict[str, Any], Plain]] = [
    ({"solver_steps": 4, "guidance_scale": 2.5}, VP),
    ({"solver_steps": 4, "ramp_steps": 4}, TRIG),
    ({"solver_steps": 4}, EDM_),
    ({"solver_steps": 3, "student_level": 14.0, "guidance_scale": 0.5}, VP),
]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight("boot", options, plain, step)
    agree_alone(straight.method, step, straight.batch, straight.turn)


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_it_is_sampled_in_one_jump(plain: Plain) -> None:
    sampler = Straight("boot", {"solver_steps": 4}, plain).method.sampler()
    assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(1), rel=1e-12)
    assert sampler.two_times and math.isclose(float(sampler.leads(0)), 0.0)
