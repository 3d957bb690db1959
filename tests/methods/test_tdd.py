"""TDD: the exact checks hold, known mistakes are caught, it trains and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.tdd import verify
from diffdistill.methods.tdd import TDD, Config
from diffdistill.scaffold.segments import SegmentMethod
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {"ends": TDD.ends, "prepared": TDD.prepared, "jump": SegmentMethod.jump}


def from_zero(self: TDD, levels: Tensor) -> Any:
    own, least, greatest = REAL_TARGETS(self, levels)
    return own, 0 * least, greatest


REAL_TARGETS = TDD.target_levels
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "jumps to 0": (TDD, "ends", lambda self, *at: (lambda top, s: (top, 0 * s))(*REAL["ends"](self, *at))),
    "times of the step above": (
        TDD,
        "ends",
        lambda self, step, i, batch: REAL["ends"](self, step, (i - 1).clamp_min(0), batch),
    ),
    "however far": (TDD, "target_levels", from_zero),
    "conditions are kept": (TDD, "prepared", lambda self, step, batch: batch),
    "f is x0": (SegmentMethod, "jump", lambda self, net, x, t, e, cond: net(x, t, cond).x0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_it_is_sampled_in_the_numbers_of_steps_that_it_is_trained_for(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = TDD(teacher, Config(solver_steps=250, gamma=0.2))
    assert method.sampler().levels == (999, 751, 499, 251) and method.sampler().step.name == "gamma 0.2"
    method.in_steps(8)
    assert len(method.sampler().levels) == 8
    with pytest.raises(UserError, match="student_steps: this student is trained for 4, 5, 6, 7, 8 steps and no others"):
        method.in_steps(2)


def test_refusals() -> None:
    for options, message in (
        (
            {"student_steps": 9},
            r"student_steps: 9 is not among those that are trained, 4 \(steps_min\) to 8",
        ),
        ({"steps_max": 3}, r"steps_max: 3 is not from 4 \(steps_min\) to 250 \(solver_steps\)"),
        ({"gamma": 0.5}, r"gamma: 0.5 jumps further below a level than is trained, 0.3 \(eta\)"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)


RUN = {"method": "tdd", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "solver_steps": 6}
OWN = {"steps_min": 2, "steps_max": 3}
CASES = [("vp", {**OWN, "gan_weight": 0.1}), ("edm", OWN), ("flow", {**OWN, "distance": "l2"})]
RESUMED = {**OWN, "gan_weight": 0.1, "guidance_scale": 2.0}


@pytest.mark.parametrize(("parameterization", "options"), CASES)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RESUMED, **RUN)
