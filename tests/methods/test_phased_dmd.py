"""Phased DMD: its exact checks hold, known mistakes are caught, turns are their straight lines, and it trains."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.core.prediction import Prediction
from diffdistill.exact.checks import run_checks
from diffdistill.families import student_record
from diffdistill.methods.checks.phased_dmd import verify
from diffdistill.methods.phased_dmd import PhasedDMD, SubInterval
from diffdistill.players.sampler import DDIM
from tests.methods.short_runs import same_when_resumed, trains
from tests.methods.test_wiring_matching import Straight, injected, mean
from tests.scaffold.straight import EDM_, FLOW, SIZE, VP, Plain, agree, fold, in_double, normal, uniform

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_BACK, REAL_DIFFUSE, REAL_TIMES = SubInterval.back, SubInterval.diffuse, PhasedDMD.times
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the way goes from clean data": (SubInterval, "diffuse", lambda self, x, eps: self.cos_t * x + self.sin_t * eps),
    "it is led back to clean data": (SubInterval, "back", lambda self, predicted: predicted.x0),
    "samples are clean": (PhasedDMD, "reached", lambda self, predicted, k: predicted.x0),
    "each phase ends a level late": (PhasedDMD, "reached", lambda self, p, k: p.at(self.ends(k + 1).expand(len(p.t)))),
    "both have the student's range": (PhasedDMD, "times", lambda self, _, batch: REAL_TIMES(self, "student", batch)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())


class Phased(Straight):
    """Phases take turns; `k` is the phase."""

    @property
    def k(self) -> int:
        return self.key[1] // self.c.update_ratio % self.c.student_steps

    def angles(self) -> list[float]:
        return [
            *(self.plain.angle(level) for level in self.plain.levels(self.c.student_steps, self.c.student_level)),
            0.0,
        ]

    def simulated(self, labels: Tensor | None = None) -> Tensor:
        x_t, t = self.plain.start(
            self.plain.levels(self.c.student_steps, self.c.student_level)[0], normal("z", self.key)
        )
        for j in range(self.k + 1):
            with torch.set_grad_enabled(j == self.k and torch.is_grad_enabled()):
                x0, eps = self.plain.x0_eps(self.student, x_t, t, class_labels=self.labels)
            s = torch.full((SIZE,), self.angles()[j + 1], dtype=torch.float64)
            x_t, t = fold(torch.cos(s)) * x0 + fold(torch.sin(s)) * eps, s
        return x_t

    def above(self, player: str, low: float, high: float) -> Tensor:
        u = self.shifted(uniform(f"{player}/t", self.key))
        levels = [*self.plain.levels(self.c.student_steps, self.c.student_level)]
        end = fraction(self.plain, levels[self.k + 1]) if self.k + 1 < len(levels) else 0.0
        return self.plain.at(end + (1 - end) * (low + (high - low) * u))

    def student_t(self) -> Tensor:
        return self.above("student", self.c.time_low, self.c.time_high)

    def fake_t(self) -> Tensor:
        return self.above("fake_score", 0.0, 1.0)

    def way(self, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.tensor(self.angles()[self.k + 1], dtype=torch.float64)
        kept = fold(torch.cos(t) / torch.cos(s))
        return kept * x + torch.sqrt(1 - kept**2) * eps, kept, s

    def _phased_dmd(self, x: Tensor, t: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            x_t, kept, _ = self.way(x, t, normal("student/eps", self.key))
            scale = float(self.c.guidance_scale)
            both = [
                self.plain.guided(self.teacher, x_t, t, self.labels, scale),
                self.plain.x0_eps(self.fake, x_t, t, class_labels=self.labels),
            ]
            # Tweedie's formula, with the score -eps/sin(t)
            backs = [(x_t - (1 - kept**2) * eps / fold(torch.sin(t))) / kept for _, eps in both]
            gap, size = backs[1] - backs[0], mean((x - backs[0]).abs())
            grad = gap * (fold(1 / size) if self.c.normalise else kept**2 / (1 - kept**2))
        unit = self.plain.std if self.c.normalise else 1.0
        return {"loss": unit * injected(x, grad), "gap": (mean(gap.abs()) / size).mean()}

    def fake_turn(self) -> dict[str, Tensor]:
        if self.shared is None:
            with torch.no_grad():
                self.shared = self.simulated()
        x, t, eps = self.shared.detach(), self.fake_t(), normal("fake_score/eps", self.key)
        x_t, kept, s = self.way(x, t, eps)
        x0, noise = self.plain.x0_eps(self.fake, x_t, t, class_labels=self.labels)
        spread, cos, sin = torch.sqrt(1 - kept**2), fold(torch.cos(t)), fold(torch.sin(t))
        target = sin / torch.cos(s) * (kept / spread * eps - x)
        loss = ((spread / sin * (cos * noise - sin * x0 - target)).square()).mean()
        return {"loss": loss, "denoising": loss}


def fraction(plain: Plain, level: float) -> float:
    if plain.kind in ("vp", "eps"):
        return (level + 1) / plain.steps
    if plain.kind == "edm":
        low, high = 0.01 ** (1 / 7), 30 ** (1 / 7)
        return (level ** (1 / 7) - low) / (high - low)
    return level / (2 - level) if plain.kind == "flow" else level / (torch.pi / 2)


@pytest.mark.parametrize("step", [0, 2, 4, 6])
@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"guidance_scale": 2.5, "time_shift": 3.0}, FLOW),
        ({"normalise": False, "time_low": 0.2, "time_high": 0.7}, VP),
        ({}, EDM_),
    ],
)
def test_the_turns_are_their_straight_lines(options: dict[str, Any], plain: Plain, step: int) -> None:
    with double():
        straight = Phased("phased_dmd", options | {"student_steps": 3, "update_ratio": 2}, plain, (5, step, 4))
        method: Any = straight.method
        straight.fake = method.fake_scores[straight.k].network
        turns = method.turns(step)
        role = ["fake_score", "fake_score_2", "fake_score_3"][straight.k]
        assert [turn.player for turn in turns] == ["student", role] and isinstance(method.sampler().step, DDIM)
        agree(method, turns[0], straight.batch, straight.student_turn)
        agree(method, turns[1], straight.batch, straight.fake_turn)
        alone = Phased("phased_dmd", options | {"student_steps": 3, "update_ratio": 2}, plain, (5, step + 1, 4))
        alone.fake = alone.method.fake_scores[alone.k].network
        agree(alone.method, alone.method.turns(step + 1)[0], alone.batch, alone.fake_turn)


def test_the_error_is_finite_at_both_ends() -> None:
    s, x = torch.tensor(0.7).double(), torch.randn(2, 3).double()
    t = torch.tensor([0.7, torch.pi / 2]).double()
    part = SubInterval(s, t, x)
    predicted = Prediction(part.diffuse(x, x), t, x, torch.cos(t) * 0, torch.ones(2).double())
    for value in (part.error(predicted, x, x), part.back(predicted)):
        assert bool(value.isfinite().all()) and float(value.abs().max()) < 10


RUN: dict[str, Any] = {"method": "phased_dmd", "batch_size": 4, "sample_every": 0, "device": "cpu", "update_ratio": 1}


@pytest.mark.parametrize("parameterization", ["vp", "edm"])
def test_it_trains_and_is_exported_with_deterministic_steps(
    parameterization: str, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN)
    record = student_record(tmp_path / "run" / "student")
    assert record.move == "ddim" and len(record.levels) == 2


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("flow")), fake_score_lr=1e-2, **RUN)


def test_one_step_has_no_phases(tiny_teacher: Teachers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fake_scores: per_level is for several levels, and student_steps is 1"):
        distill(**RUN, teacher=tiny_teacher("vp"), student_steps=1, steps=1, out=tmp_path / "run")
