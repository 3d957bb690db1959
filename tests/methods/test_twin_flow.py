"""TwinFlow: the exact checks hold, known mistakes are caught, it trains, resumes and takes any number of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, distill
from diffdistill.exact.checks import run_checks
from diffdistill.methods import twin_flow
from diffdistill.methods.checks.twin_flow import verify
from diffdistill.methods.twin_flow import TwinFlow
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(TwinFlow, name) for name in ("drawn", "consistent", "rectified", "jump", "along")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "no fake samples": (
        TwinFlow,
        "drawn",
        lambda self, batch: (lambda kind, t, r: (kind.clamp(max=2), t, r))(*REAL["drawn"](self, batch)),
    ),
    "one branch": (
        TwinFlow,
        "jump",
        lambda self, net, x, t, r, cond, fake=None: REAL["jump"](self, net, x, t, r, cond),
    ),
    "F_grad's sign": (TwinFlow, "rectified", lambda self, *at: -REAL["rectified"](self, *at)),
    "the step along u has the other sign": (
        TwinFlow,
        "along",
        lambda self, x, t, u, s: REAL["along"](self, x, t, -u, s),
    ),
    "the velocity alone": (TwinFlow, "consistent", lambda self, f, u, *at: f - (f - u).clamp(-1, 1)),
    "squares": (twin_flow, "reweighted_square", lambda x, y, c: (x - y).square().flatten(1).mean(1)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


RUN = {"method": "twin_flow", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {"self_guidance": 0.5, "sampling": "any", "student_steps": 2}), ("edm", {}), ("flow", {"ode_order": 1})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), self_guidance=0.5, **RUN)


def test_a_batch_that_has_not_all_four_kinds_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run = RUN | {"teacher": str(tiny_teacher("vp")), "steps": 1}
    with pytest.raises(UserError, match="batch_size: 3 samples in a step leave out some of twin_flow's four kinds"):
        distill(**run | {"batch_size": 3}, out=str(tmp_path / "few"))
    trains(tmp_path, **run, accumulate=4)  # a sample in each pass
