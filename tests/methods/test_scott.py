"""SCott: the exact checks hold, known mistakes are caught, it trains and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import scott
from diffdistill.methods.checks.scott import verify
from diffdistill.methods.scott import Config, SCott
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(SCott, name) for name in ("interval", "less_noisy", "following")}
REAL_STEP = scott.ddim_eta_step
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the ODE's steps": (scott, "ddim_eta_step", lambda pred, s, eta, z: REAL_STEP(pred, s, 0.0, z)),
    "all noise is fresh": (scott, "ddim_eta_step", lambda pred, s, eta, z: REAL_STEP(pred, s, 1.0, z)),
    "one noise for all steps": (
        SCott,
        "interval",
        lambda self, *at: (lambda w: w._replace(noise=w.noise[:1].expand_as(w.noise)))(REAL["interval"](self, *at)),
    ),
    "half of the way": (
        SCott,
        "less_noisy",
        lambda self, x_t, x0, eps, w, cond: REAL["less_noisy"](
            self, x_t, x0, eps, w._replace(path=torch.lerp(w.path[:1], w.path, 0.5)), cond
        ),
    ),
    "its own target": (
        SCott,
        "following",
        lambda self, x_t, x_r, w, cond, seed=0: REAL["following"](self, x_r, x_r, w, cond, seed),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_refusals(tiny_teacher: Teachers) -> None:
    with pytest.raises(UserError, match=r"sde_steps: 3 do not divide skip \(4\) evenly"):
        Config(skip=4, sde_steps=3)
    with pytest.raises(UserError, match=r"skip: 12 is more than all solver_steps \(8\)"):
        Config(solver_steps=8)
    with pytest.raises(UserError, match="solver_steps: 2000 is more than the teacher's 1000 timesteps"):
        SCott(load_teacher(tiny_teacher("vp")), Config(solver_steps=2000))


RUN = {"method": "scott", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "solver_steps": 6}
OWN = {"skip": 2, "sde_steps": 2}
CASES = [("vp", {**OWN, "gan_weight": 0.1}), ("edm", OWN), ("flow", {**OWN, "distance": "huber"})]
RESUMED = {**OWN, "gan_weight": 0.1, "guidance_scale": 2.0}


@pytest.mark.parametrize(("parameterization", "options"), CASES)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RESUMED, **RUN)
