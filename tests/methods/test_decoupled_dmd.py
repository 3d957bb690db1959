"""Decoupled DMD: its exact checks hold, known mistakes are caught, and it trains, resumes and refuses as it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.commands.cli import main
from diffdistill.core.denoiser import Denoiser
from diffdistill.exact.checks import run_checks
from diffdistill.methods import decoupled_dmd
from diffdistill.methods.checks.decoupled_dmd import verify
from diffdistill.methods.decoupled_dmd import Config, DecoupledDMD
from diffdistill.scaffold import matching
from diffdistill.scaffold.method import Batch, Outcome
from tests.methods.short_runs import same_when_resumed, trains


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum("no fixed point" in c.name for c in checks) == 3


def with_scale(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda denoiser, x_t, t, cond, scale: REAL_GUIDE(denoiser, x_t, t, cond, change(scale))


def doubled(self: DecoupledDMD, *args: Any) -> Outcome:
    outcome = REAL_ENGINE(self, *args)
    return Outcome(2 * outcome.loss, outcome.shown)


REAL_GUIDE, REAL_ENGINE, REAL_INJECTION = (
    decoupled_dmd.guide_with_conditional, DecoupledDMD.engine, decoupled_dmd.injected,
)  # fmt: skip
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "guidance is off by one": (decoupled_dmd, "guide_with_conditional", with_scale(lambda scale: scale + 1)),
    "opposite sign of the engine": (decoupled_dmd, "injected", lambda x, g, *rest: REAL_INJECTION(x, -g, *rest)),
    "the engine counts twice": (DecoupledDMD, "engine", doubled),
    "the matching's sign": (
        matching,
        "dmd_loss",
        lambda x, t, eps, c, p, q, n, f=matching.dmd_loss: f(x, t, eps, c, q, p, n),
    ),
    "the engine's noise is any": (DecoupledDMD, "level", lambda self, batch: 0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def test_an_affine_student_reaches_the_gaussian(reaches_the_gaussian: Callable[..., None]) -> None:
    config = Config(student_lr=5e-3, fake_score_lr=2e-2, update_ratio=3, normalise=False, beta1=0.0, time_low=0.1)
    reaches_the_gaussian(DecoupledDMD, config, steps=2400, ema=0.99)


def test_guidance_needs_a_null_condition_and_one_pass_less_without(tiny_teacher: Callable[[str], Path]) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    seen: list[int] = []
    for scale, batches in ((1.0, [4]), (3.0, [4, 8])):
        method = DecoupledDMD(teacher, Config(guidance_scale=scale))
        seen.clear()
        assert isinstance(method.teacher, Denoiser)
        hook = method.teacher.network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
        batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
        method.student_turn({}, batch)
        hook.remove()
        assert seen == batches
    teacher.denoiser.null = None
    with pytest.raises(UserError, match=r"guidance_scale: 3\.0 needs a teacher that was trained with a null condition"):
        DecoupledDMD(teacher, Config(guidance_scale=3.0))


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    run = {"method": "decoupled_dmd", "batch_size": 4, "guidance_scale": 2.0, "sample_every": 0, "device": "cpu"}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **run)


def test_a_resumed_run_of_several_steps_has_the_same_bits(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    shared = {
        "method": "decoupled_dmd", "teacher": str(tiny_teacher("flow")), "batch_size": 4, "guidance_scale": 2.0,
        "student_steps": 2, "update_ratio": 1, "fake_score_lr": 1e-2, "sample_every": 0, "device": "cpu",
    }  # fmt: skip
    same_when_resumed(tmp_path, **shared)


def test_other_times_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["train", "--method", "decoupled_dmd", "--augmentation-times", "above", "--out", str(tmp_path / "no")]
    assert main(options) == 2
    assert "augmentation_times" in (error := capsys.readouterr().err) and "below" in error
