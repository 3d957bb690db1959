"""MLCM: the exact checks hold, known mistakes are caught, it trains without images, hears a reward, and resumes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.mlcm import verify
from diffdistill.methods.mlcm import MLCM, Config
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.method import Batch, Need
from diffdistill.scaffold.segments import MergingMethod
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(MLCM, name) for name in ("walk", "prepared", "at_angle", "next", "trained")}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the walk begins a step late": (MLCM, "walk", lambda self, batch: REAL["walk"](self, batch).roll(-1, 0)),
    "images in place of states": (MLCM, "noised", FollowingMethod.noised),
    "the teacher steps from there anew": (MLCM, "less_noisy", MergingMethod.less_noisy),
    "the states of another trajectory": (MLCM, "at_angle", lambda self, t: REAL["at_angle"](self, t).roll(1, 0)),
    "the clean end in every stage": (
        MLCM,
        "next",
        lambda self, step, i: torch.full_like(i, self.config.solver_steps),
    ),
    "consistency in the last stage": (MLCM, "next", lambda self, step, i: i + 1),
    "the first states for images": (
        MLCM,
        "prepared",
        lambda self, step, batch: replace(REAL["prepared"](self, step, batch), x0=self.walked[0]),
    ),
    "conditions of other samples": (
        Batch,
        "repeated",
        lambda self, n, real=Batch.repeated: replace(
            real(self, n), cond={name: value.repeat(n) for name, value in self.cond.items()}
        ),
    ),
    "guidance by 1 + a": (
        DrawnGuidance,
        "__call__",
        lambda self, *at, real=DrawnGuidance.__call__: real(self, *at[:-1], 1 + at[-1]),
    ),
    "a reward in every stage": (MergingMethod, "reward_weight", lambda self, step: self.config.reward_weight),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


RUN = {"method": "mlcm", "batch_size": 2, "sample_every": 0, "device": "cpu", "solver_steps": 4, "states": 2}
OWN = {"stages": [2, 1], "stage_steps": 1}
CASES = [("vp", {**OWN, "gan_weight": 0.1, "guidance_scale": 2.0}), ("edm", OWN), ("flow", {**OWN, "distance": "l2"})]


@pytest.mark.parametrize(("parameterization", "options"), CASES)
def test_it_trains_every_parameterisation_without_images(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    own = {"stages": [4, 2, 1], "stage_steps": 1, "gan_weight": 0.1, "guidance_scale": 2.0, "guidance_spread": 0.5}
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **own, **RUN)


def test_it_needs_nothing_but_the_reward_it_is_to_please(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    assert MLCM(teacher, Config()).needs == set()
    assert MLCM(teacher, Config(reward_weight=0.1)).needs == {Need.REWARD, Need.GRADIENT}


REWARDS = """
def bright(images, labels):
    return images.flatten(1).mean(1)

def counted(images, labels):
    return (images > 0).float().flatten(1).mean(1)
"""


def test_a_reward_moves_the_student_and_must_have_a_gradient(tiny_teacher: Teachers, tmp_path: Path) -> None:
    (file := tmp_path / "rewards.py").write_text(REWARDS)
    more: dict[str, Any] = {"teacher": str(tiny_teacher("vp")), "stages": [1], "stage_steps": 1, **RUN}
    trains(tmp_path / "bright", reward=f"{file}:bright", reward_weight=10.0, **more)
    with pytest.raises(UserError, match=r"reward: .*counted.* gives numbers without a gradient, which reward_weight"):
        trains(tmp_path / "counted", reward=f"{file}:counted", reward_weight=10.0, **more)
