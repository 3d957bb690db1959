"""SenseFlow's ISG: a turn is its straight line, in one step and in several, and a stopped run has the same bits."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.short_runs import same_when_resumed
from tests.methods.test_phased_dmd import fraction
from tests.methods.test_wiring_decoupled_dmd import Decoupled
from tests.scaffold.straight import EDM_, FLOW, SIZE, VP, Plain, agree, draw, fold, in_double, normal, uniform

double = contextmanager(in_double)


class Between(Decoupled):
    """The student's own turn, and the distance of its step from two by way of a point inside of it."""

    def reads(self) -> tuple[Tensor, Tensor, float]:
        """What this step's level reads, its angle, and the angle of the next one."""
        levels = self.plain.levels(self.c.student_steps, self.c.student_level)
        n = len(levels)
        k = int(torch.randint(n, (), generator=draw(*self.key[:2], "student/level"))) if n > 1 else 0
        x_t, t = self.plain.start(levels[0], normal("z", self.key))
        for j in range(1, k + 1):
            with torch.no_grad():
                x0 = self.x0(self.student, x_t, t)
            t = torch.full((SIZE,), self.plain.angle(levels[j]), dtype=torch.float64)
            x_t = fold(torch.cos(t)) * x0 + fold(torch.sin(t)) * normal(f"z {j}", self.key)
        ends = [fraction(self.plain, level) for level in levels[k:]] + [0.0]
        self.span = ends[1], ends[0]
        return x_t, t, self.plain.angle(levels[k + 1]) if k + 1 < n else 0.0

    def step(self, net: Any, x: Tensor, t: Tensor, s: Tensor, scale: float | None = None) -> Tensor:
        if scale is None:
            x0, eps = self.plain.x0_eps(net, x, t, class_labels=self.labels)
        else:
            x0, eps = self.plain.guided(net, x, t, self.labels, scale)
        return fold(torch.cos(s)) * x0 + fold(torch.sin(s)) * eps

    def student_turn(self) -> dict[str, Tensor]:
        values = super().student_turn()
        x_t, t, angle = self.reads()
        (low, high), s = self.span, torch.full((SIZE,), angle, dtype=torch.float64)
        margin = min(self.c.midpoint_margin, (high - low) / 2)
        u = uniform("midpoint/t", self.key)
        with torch.no_grad():
            t_m = self.plain.at(low + margin + u * (high - low - 2 * margin))
            x_m = self.step(self.teacher, x_t, t, t_m, float(self.c.guidance_scale))
            target = self.step(self.student, x_m, t_m, s)
        gap = self.step(self.student, x_t, t, s) - target
        values["midpoint"] = (torch.sqrt(gap.square() + 0.001**2) - 0.001).mean()
        values["loss"] = values["loss"] + self.c.midpoint_weight * values["midpoint"]
        return values


ISG = {"midpoint_weight": 0.4, "midpoint_margin": 0.05, "update_ratio": 1, "guidance_scale": 2.5}


@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
@pytest.mark.parametrize(("steps", "step"), [(1, 4), (3, 4), (3, 5), (3, 6)])
def test_a_turn_is_its_straight_line(steps: int, step: int, plain: Plain) -> None:
    with double():
        straight = Between("dmd2", ISG | {"student_steps": steps}, plain, (5, step, 4))
        agree(straight.method, straight.method.turns(step)[0], straight.batch, straight.student_turn)


def test_the_guided_teacher_of_decoupled_dmd_is_followed() -> None:
    with double():
        straight = Between("decoupled_dmd", ISG | {"student_steps": 2, "augmentation_times": "all"}, FLOW)
        agree(straight.method, straight.method.turns(4)[0], straight.batch, straight.student_turn)


def test_a_short_step_has_its_middle() -> None:
    with double():
        straight = Between("dmd2", ISG | {"student_steps": 3, "midpoint_margin": 0.3}, FLOW)
        agree(straight.method, straight.method.turns(4)[0], straight.batch, straight.student_turn)


def test_it_trains_and_resumes_to_the_same_bits(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    run: dict[str, Any] = {"method": "dmd2", "batch_size": 4, "sample_every": 0, "device": "cpu", "update_ratio": 1}
    same_when_resumed(tmp_path, **run, teacher=str(tiny_teacher("vp")), student_steps=2, midpoint_weight=0.5)
