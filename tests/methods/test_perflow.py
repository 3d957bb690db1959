"""PeRFlow: the exact checks hold, known mistakes are caught, it trains and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import perflow
from diffdistill.methods.checks.perflow import verify
from diffdistill.methods.perflow import Config, PeRFlow
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(PeRFlow, name) for name in ("line", "solved")}
REAL_INVERSE = perflow.inverse_ddim
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a window's steps are those of the first": (
        PeRFlow,
        "solved",
        lambda self, x, window, cond: REAL["solved"](self, x, 0 * window, cond),
    ),
    "one step fewer": (
        PeRFlow,
        "solved",
        lambda self, x, window, cond: perflow.ddim_step(
            self.guided, x, self.grid[window * 2], self.grid[window * 2 + 2], cond
        ),
    ),
    "x_e is clean": (perflow, "inverse_ddim", lambda x_e, x_s, s, e: REAL_INVERSE(x_e, x_s, s, 0 * e)),
    "t is the beginning": (
        PeRFlow,
        "line",
        lambda self, *at: (lambda line: line._replace(t=line.t * 0 + self.grid[0]))(REAL["line"](self, *at)),
    ),
    "conditions are kept": (perflow, "some_dropped", lambda batch, null, share: batch),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_steps_are_multiples_of_the_windows(tiny_teacher: Teachers) -> None:
    with pytest.raises(UserError, match="student_steps: 3 is no multiple of the 2 windows"):
        Config(windows=2, student_steps=3)
    with pytest.raises(UserError, match="levels: the windows are those of evenly spaced steps"):
        Config(windows=2, levels=(900.0, 500.0, 100.0))  # whatever their number
    with pytest.raises(UserError, match="levels: the windows are those of evenly spaced steps"):
        Config(windows=2, levels=(999.0, 499.0))
    method = PeRFlow(load_teacher(tiny_teacher("vp")), Config(windows=2, student_steps=2))
    method.in_steps(6)
    assert len(method.sampler().levels) == 6
    with pytest.raises(UserError, match=r"student_steps: this student is trained for 2, 4, 6, \.\., 1000 steps and"):
        method.in_steps(5)


RUN = {"method": "perflow", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "windows": 2}
OWN = {"student_steps": 2, "solver_steps": 2}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {"guidance_scale": 2.0}), ("edm", {"loss": "epsilon"}), ("flow", {"loss": "velocity"})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **OWN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), label_dropout=0.5, **RUN, **OWN)
