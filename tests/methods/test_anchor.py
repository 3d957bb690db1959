"""DP-DMD's anchor: a turn is its straight line, fake scores are of the other steps, and it trains and refuses."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.families import student_record
from diffdistill.players.sampler import DDIM
from tests.methods.short_runs import same_when_resumed
from tests.methods.test_phased_dmd import fraction
from tests.methods.test_wiring_decoupled_dmd import Decoupled
from tests.scaffold.straight import EDM_, FLOW, SIZE, VP, Plain, agree, draw, fold, in_double, normal

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


class Anchored(Decoupled):
    """Steps are deterministic, the first follows the teacher, and one of the others is matched."""

    def k(self) -> int:
        n = self.c.student_steps - 1
        if self.c.fake_scores == "per_level":
            return 1 + self.key[1] // self.c.update_ratio % n
        return 1 + int(torch.randint(n, (), generator=draw(*self.key[:2], "student/level")))

    def step(self, net: Any, x: Tensor, t: Tensor, angle: float, scale: float | None = None) -> tuple[Tensor, Tensor]:
        if scale is None:
            x0, eps = self.plain.x0_eps(net, x, t, class_labels=self.labels)
        else:
            x0, eps = self.plain.guided(net, x, t, self.labels, scale)
        s = torch.full((SIZE,), angle, dtype=torch.float64)
        return fold(torch.cos(s)) * x0 + fold(torch.sin(s)) * eps, s

    def simulated(self, labels: Tensor | None = None) -> Tensor:
        levels = self.plain.levels(self.c.student_steps, self.c.student_level)
        x_t, t = self.plain.start(levels[0], normal("z", self.key))
        for j in range(1, self.k() + 1):
            with torch.no_grad():
                x_t, t = self.step(self.student, x_t, t, self.plain.angle(levels[j]))
        return self.x0(self.student, x_t, t)

    def student_turn(self) -> dict[str, Tensor]:
        values = super().student_turn()
        first, second = self.plain.levels(self.c.student_steps, self.c.student_level)[:2]
        x_t, t = self.plain.start(first, normal("anchor/z", self.key))
        ends = [fraction(self.plain, level) for level in (first, second)]
        z, at, n = x_t, t, self.c.anchor_steps
        with torch.no_grad():
            for j in range(1, n + 1):
                angle = float(self.plain.at(torch.tensor([ends[0] + j / n * (ends[1] - ends[0])]).double()))
                z, at = self.step(self.teacher, z, at, angle, float(self.c.guidance_scale))
        x, s = self.step(self.student, x_t, t, self.plain.angle(second))
        values["anchor"] = ((x - z) / fold(torch.sin(t - s))).square().mean()
        values["loss"] = values["loss"] + self.c.anchor_weight * values["anchor"]
        return values


ANCHOR = {"anchor_weight": 0.3, "anchor_steps": 3, "update_ratio": 1, "guidance_scale": 2.5}


@pytest.mark.parametrize("fake_scores", ["shared", "per_level"])
@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
def test_a_turn_is_its_straight_line(plain: Plain, step: int, fake_scores: str) -> None:
    with double():
        options = ANCHOR | {"student_steps": 3, "fake_scores": fake_scores}
        straight = Anchored("dmd2", options, plain, (5, step, 4))
        method: Any = straight.method
        assert len(method.fake_scores) == (2 if fake_scores == "per_level" else 1)
        assert isinstance(method.sampler().step, DDIM)
        if fake_scores == "per_level":
            straight.fake = method.fake_scores[straight.k() - 1].network
        student, fake = method.turns(step)
        agree(method, student, straight.batch, straight.student_turn)
        agree(method, fake, straight.batch, straight.fake_turn)


def test_decoupled_dmd_has_it_too() -> None:
    with double():
        options = ANCHOR | {"student_steps": 2, "augmentation_times": "all"}
        straight = Anchored("decoupled_dmd", options, FLOW)
        agree(straight.method, straight.method.turns(4)[0], straight.batch, straight.student_turn)


RUN: dict[str, Any] = {"method": "dmd2", "batch_size": 4, "sample_every": 0, "device": "cpu", "update_ratio": 1}


def test_it_trains_and_resumes_to_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    more = {"teacher": str(tiny_teacher("vp")), "student_steps": 2, "anchor_weight": 0.05, "anchor_steps": 2}
    same_when_resumed(tmp_path, **RUN, **more, fake_score_lr=1e-2)
    assert student_record(tmp_path / "run" / "student").move == "ddim"
    with pytest.raises(UserError, match="anchor_weight: the first step of one alone cannot follow the teacher"):
        distill(**RUN, **more | {"student_steps": 1}, steps=1, out=tmp_path / "one")
