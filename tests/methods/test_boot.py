"""BOOT: the exact checks hold, known mistakes are caught, it trains without images, resumes and is one step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.exact.checks import run_checks
from diffdistill.methods.boot import Boot
from diffdistill.methods.checks.boot import verify
from diffdistill.scaffold.method import Need
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(Boot, name) for name in ("target", "y", "open_steps")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "y of another time": (Boot, "y", lambda self, x, s, cond: REAL["y"](self, x, 0.9 * s, cond)),
    "the step ends at t": (Boot, "target", lambda self, x, t, s, cond: REAL["target"](self, x, t, t, cond)),
    "the target is D": (
        Boot,
        "target",
        lambda self, x, t, s, cond: REAL["target"](self, x, t, 0 * s, cond).detach(),
    ),
    "the grid is always open": (Boot, "open_steps", lambda self, step: self.config.solver_steps),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


RUN = {"method": "boot", "batch_size": 4, "sample_every": 0, "device": "cpu", "solver_steps": 4}


def test_it_needs_no_images() -> None:
    assert not Boot.needs & {Need.IMAGES, Need.PAIRS}


@pytest.mark.parametrize(
    ("parameterization", "options"), [("vp", {"guidance_scale": 2.0}), ("edm", {}), ("flow", {"ramp_steps": 2})]
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), ramp_steps=3, **RUN)
