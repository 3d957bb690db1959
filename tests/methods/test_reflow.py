"""Reflow: the exact checks hold, known mistakes are caught, it trains from pairs in both stages, and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import reflow
from diffdistill.methods.checks.reflow import verify
from diffdistill.methods.reflow import Config, Reflow
from tests.methods.short_runs import same_when_resumed, trains, with_pairs

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(Reflow, name) for name in ("line", "velocities", "ends", "after_step", "turns")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "noise of other pairs": (
        Reflow,
        "line",
        lambda self, *at: (lambda line: line._replace(eps=line.eps.flip(0)))(REAL["line"](self, *at)),
    ),
    "the velocity's sign": (
        Reflow,
        "velocities",
        lambda self, *at: (lambda u: (u[0], -u[1]))(REAL["velocities"](self, *at)),
    ),
    "the norm of an element": (reflow, "pseudo_huber", lambda x, y, c: (x - y).abs().flatten(1).mean(1)),
    "ends are noise": (Reflow, "ends", lambda self, z, batch: z),
    "no new optimizer": (
        Reflow,
        "turns",
        lambda self, step: [turn._replace(restart=False) for turn in REAL["turns"](self, step)],
    ),
    "the second stage holds the beginning": (
        Reflow,
        "after_step",
        lambda self, step: self.stage.done.fill_(step + 1) and None,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_a_student_with_a_second_stage_takes_one_step_alone(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("flow"))
    method = Reflow(teacher, Config(student_steps=4))
    assert len(method.sampler().levels) == 4 and method.whole is None
    method.in_steps(7)
    assert len(method.sampler().levels) == 7
    method = Reflow(teacher, Config(distill_steps=1))
    with pytest.raises(UserError, match="student_steps: this student is trained for 1 steps and no others"):
        method.in_steps(7)


RUN = {"method": "reflow", "batch_size": 4, "sample_every": 0, "device": "cpu"}
STAGES = {"reflow_steps": 1, "distill_steps": 1, "ode_steps": 2}


@pytest.fixture
def pairs(tiny_teacher: Teachers, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    return lambda kind: with_pairs(tmp_path, tiny_teacher(kind))


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", STAGES), ("edm", {"time_exponent": 4.0, "velocity_loss": "huber"}), ("flow", {"student_steps": 2})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], pairs: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    trains(tmp_path, **pairs(parameterization), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(pairs: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    same_when_resumed(tmp_path, **pairs("vp"), **RUN, reflow_steps=3, distill_steps=1, ode_steps=2)
