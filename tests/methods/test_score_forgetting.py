"""SFD: its exact checks hold, known mistakes are caught, a turn is its straight line, and it trains and refuses."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import score_forgetting
from diffdistill.methods.checks.score_forgetting import verify
from diffdistill.methods.score_forgetting import Config, ScoreForgetting
from tests.methods.short_runs import same_when_resumed, trains
from tests.methods.test_wiring_matching import Straight, mean
from tests.scaffold.straight import (
    EDM_,
    FLOW,
    KEY,
    SIZE,
    VP,
    Plain,
    agree,
    batch_of,
    fold,
    gaussian,
    in_double,
    noised,
    normal,
    uniform,
    whole,
)

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_LOSS, REAL_ASKED = score_forgetting.sid_loss, ScoreForgetting.asked
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "nothing stands in": (ScoreForgetting, "asked", lambda s, b: (b.cond["class_labels"], REAL_ASKED(s, b)[1])),
    "all count alike": (ScoreForgetting, "asked", lambda s, b: (REAL_ASKED(s, b)[0], torch.ones(b.size))),
    "the networks are swapped": (score_forgetting, "sid_loss", lambda x, p, q, a, n: REAL_LOSS(x, q, p, a, n)),
    "the teacher is detached": (score_forgetting, "sid_loss", lambda x, p, q, a, n: REAL_LOSS(x, p.detach(), q, a, n)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())


class Forgetting(Straight):
    def student_turn(self) -> dict[str, Tensor]:
        x, t, c = self.sample("student/z"), self.student_t(), self.c
        gone = torch.isin(self.labels, torch.tensor(c.forget))
        assert 0 < int(gone.sum()) < SIZE, "some"
        kept = [label for label in range(3) if label not in c.forget]
        others = torch.tensor(kept)[whole(len(kept), "student/stand-in", self.key)]
        asked = torch.where(gone, others if c.stand_in is None else torch.tensor(c.stand_in), self.labels)
        weights = torch.where(gone, c.forget_weight * len(kept) / len(c.forget), 1.0)
        weighted = x.clone()
        weighted.register_hook(lambda grad: fold(weights) * grad)
        x_t = noised(weighted, t, normal("student/eps", self.key))
        teacher = self.plain.guided(self.teacher, x_t, t, asked, float(c.guidance_scale))[0]
        delta = teacher - self.x0(self.fake, x_t, t)
        each = mean(delta * ((teacher - weighted) - c.alpha * delta))
        if c.normalise:
            each = each / mean((x - teacher).abs()).detach()
        return {"loss": each.mean(), "gap": delta.detach().square().mean()}

    def student_t(self) -> Tensor:
        u = uniform("student/t", self.key)
        return self.plain.karras(self.c.time_low + (self.c.time_high - self.c.time_low) * u)

    def fake_turn(self) -> dict[str, Tensor]:
        with torch.no_grad():
            x = self.sample("fake_score/z")
        t = self.plain.log_normal(gaussian("fake_score/t", self.key), -1.2, 1.2)
        eps = normal("fake_score/eps", self.key)
        x0, noise = self.plain.x0_eps(self.fake, noised(x, t, eps), t, class_labels=self.labels)
        cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
        loss = ((cos * noise - sin * x0) - (cos * eps - sin * x)).square().mean()
        return {"loss": loss, "denoising": loss}


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"forget": (1,), "stand_in": 2, "guidance_scale": 2.5}, VP),
        ({"forget": (0,), "forget_weight": 0.3, "alpha": 0.9, "normalise": False}, FLOW),
        ({"forget": (0, 2), "student_level": 2.5}, EDM_),
    ],
)
def test_the_turns_are_their_straight_lines(options: dict[str, Any], plain: Plain) -> None:
    with double():
        straight = Forgetting("score_forgetting", options, plain)
        fake, student = straight.method.turns(4)
        assert [fake.player, student.player] == ["fake_score", "student"]
        agree(straight.method, fake, straight.batch, straight.fake_turn)
        agree(straight.method, student, straight.batch, straight.student_turn)


RUN: dict[str, Any] = {"method": "score_forgetting", "batch_size": 8, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(parameterization: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, forget="3,5", stand_in=8)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("edm")), fake_score_lr=1e-2, forget="3", **RUN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": (10,)}, "forget: the teacher has the classes 0 to 9, and 10 is none of them"),
        ({"forget": ()}, "forget: nothing is forgotten; give some of the teacher's classes"),
        ({"forget": (3,), "stand_in": 99}, "stand_in: the teacher has the classes 0 to 9, and 99 is none of them"),
        ({"forget": (3,), "stand_in": 3}, "forget: no other class stands in for what is forgotten"),
        ({"forget": tuple(range(10))}, "forget: no other class stands in"),
    ],
)
def test_classes_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        distill(**RUN, teacher=tiny_teacher("vp"), options=options, steps=1, out=tmp_path / "run")


def test_a_class_that_is_said_twice_counts_as_one(tiny_teacher: Teachers) -> None:
    teacher, batch = load_teacher(tiny_teacher("vp")), batch_of(KEY)
    once, twice = (ScoreForgetting(teacher, Config(forget=labels)).asked(batch) for labels in ((2,), (2, 2)))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_a_teacher_without_classes_is_refused(tiny_teacher: Teachers) -> None:
    teacher = replace(load_teacher(tiny_teacher("vp")), num_classes=None)
    with pytest.raises(UserError, match="teacher: score_forgetting forgets classes, and this teacher has none"):
        ScoreForgetting(teacher, Config())
