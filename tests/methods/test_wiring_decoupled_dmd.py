"""A whole turn of decoupled DMD against a straight-line rewrite of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.players.sampler import Renoise
from tests.methods.test_wiring_matching import GAN, RANGE, Straight, injected, mean, play
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    TRIG,
    VP,
    Plain,
    agree,
    draw,
    fold,
    in_double,
    noised,
    normal,
    uniform,
)

_double = pytest.fixture(autouse=True)(in_double)


class Decoupled(Straight):
    def _decoupled_dmd(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            plain, fake = self.x0(self.teacher, x_t, t), self.x0(self.fake, x_t, t)
            size = mean((x - plain).abs())
            grad = fold(self.weight(size, t)) * (fake - plain)
        unit = self.plain.std if self.c.normalise else 1.0
        values = {"loss": unit * injected(x, grad), "gap": (mean((fake - plain).abs()) / size).mean()}
        if self.c.guidance_scale == 1:
            return values
        if self.c.augmentation_times != "matching":
            t = self.augmentation_t()
            x_t = noised(x, t, normal("student/augmentation eps", self.key))
        with torch.no_grad():
            plain = self.x0(self.teacher, x_t, t)
            guided = self.plain.guided(self.teacher, x_t, t, self.labels, float(self.c.guidance_scale))[0]
            size = mean((x - plain).abs())
            grad = fold(self.weight(size, t)) * (plain - guided)
        values["loss"] = values["loss"] + unit * injected(x, grad)
        values["augmentation"] = (mean((plain - guided).abs()) / size).mean()
        return values

    def weight(self, size: Tensor, t: Tensor) -> Tensor:
        return 1 / size if self.c.normalise else torch.tan(t) ** -2

    def augmentation_t(self) -> Tensor:
        below = 1.0
        if self.c.augmentation_times == "below":
            n, start = self.c.student_steps, self.c.student_level
            k = int(torch.randint(n, (), generator=draw(*self.key[:2], "student/level"))) if n > 1 else 0
            if self.c.fake_scores == "per_level":
                k = self.key[1] // self.c.update_ratio % n
            below = self.fraction(self.plain.levels(n, start)[k])
        u = below * (
            self.c.time_low + (self.c.time_high - self.c.time_low) * uniform("student/augmentation t", self.key)
        )
        return self.plain.at(u)

    def fraction(self, level: float) -> float:
        """Of the schedule's own time before any shift."""
        if self.plain.kind in ("vp", "eps"):
            return (level + 1) / self.plain.steps
        if self.plain.kind == "edm":
            low, high = 0.01 ** (1 / 7), 30 ** (1 / 7)
            return (level ** (1 / 7) - low) / (high - low)
        return level / (2 - level) if self.plain.kind == "flow" else level / (torch.pi / 2)


LEVEL = {"guidance_scale": 2.5, "update_ratio": 1}
CASES: list[tuple[dict[str, Any], Plain]] = [
    ({**LEVEL, "student_level": 14.0}, VP),
    ({**LEVEL, "student_level": 0.6, **RANGE, "time_shift": 3.0}, FLOW),
    ({**LEVEL, "student_level": 2.5, "augmentation_times": "all", **RANGE}, EDM_),
    ({**LEVEL, "augmentation_times": "matching", "time_shift": 3.0}, TRIG),
    ({**LEVEL, "normalise": False, "student_level": 9.0, "fake_score_loss": "epsilon"}, EPS),
    ({"update_ratio": 1}, FLOW),
    ({**LEVEL, **GAN, "student_level": 1.0}, TRIG),
    ({**LEVEL, "student_steps": 3}, EDM_),
]


@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain) -> None:
    assert play(Decoupled("decoupled_dmd", options, plain)) == ["student", "fake_score"]


@pytest.mark.parametrize("plain", [VP, FLOW])
def test_the_noise_of_each_level_is_below_it(plain: Plain) -> None:
    seen = set()
    for step in range(8):
        straight = Decoupled("decoupled_dmd", {**LEVEL, "student_steps": 3}, plain, (5, step, 4))
        seen.add(int(torch.randint(3, (), generator=draw(5, step, "student/level"))))
        assert play(straight) == ["student", "fake_score"]
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("step", [0, 2, 4])
def test_levels_that_take_turns(step: int) -> None:
    options = {**LEVEL, "student_steps": 3, "update_ratio": 2, "fake_scores": "per_level"}
    straight = Decoupled("decoupled_dmd", options, VP, (5, step, 1))
    straight.fake = straight.method.fake_scores[step // 2 % 3].network
    method: Any = straight.method
    agree(method, method.turns(step)[0], straight.batch, straight.student_turn)


def test_the_matching_is_not_guided_and_the_sampler_is_the_options() -> None:
    method = Decoupled("decoupled_dmd", LEVEL, VP).method
    assert isinstance(method.teacher, Denoiser)
    assert not any(p.requires_grad for p in method.teacher.parameters())
    sampler = Decoupled("decoupled_dmd", {**LEVEL, "student_level": 9.0}, VP).method.sampler()
    assert (sampler.levels, sampler.step) == ((9.0,), Renoise())
    assert method.state == {} and method.exported == "student"
