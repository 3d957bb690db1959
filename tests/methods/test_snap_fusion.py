"""SnapFusion's step distillation: exact checks, caught mistakes, and a run whose student is drawn guided."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError
from diffdistill.core.guidance import guide
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import snap_fusion
from diffdistill.methods.checks.snap_fusion import verify
from diffdistill.methods.snap_fusion import Config, SnapFusion
from tests.methods.short_runs import same_when_resumed


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_AT, REAL_TARGET, REAL_LOSS = snap_fusion.at_scale, snap_fusion.two_step_target, snap_fusion.weighted_x0_loss


def one_step(teacher: Any, x_t: Any, t: Any, mid: Any, s: Any, cond: Any) -> Any:
    return REAL_TARGET(teacher, x_t, t, s, s, cond)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the scale is w": (snap_fusion, "guide", lambda d, x, t, c, a: guide(d, x, t, c, a - 1)),
    "nobody is guided": (snap_fusion, "at_scale", lambda denoiser, scale: denoiser),
    "the student is not guided": (
        snap_fusion,
        "at_scale",
        lambda d, scale: REAL_AT(d, scale if not any(p.requires_grad for p in d.parameters()) else scale**0),
    ),
    "a target of one step": (snap_fusion, "two_step_target", one_step),
    "no weight": (snap_fusion, "weighted_x0_loss", lambda x0, target, t, weight: (x0 - target).square().mean()),
    "the diffusion loss in x0": (
        snap_fusion,
        "weighted_x0_loss",
        lambda x0, target, t, weight: REAL_LOSS(x0, target, t, "truncated_snr"),
    ),
    "the teacher is never replaced": (SnapFusion, "teacher_of", lambda self, stage: self.teacher),
    "one scale for all": (SnapFusion, "scales", lambda self, batch: torch.full((batch.size,), 9.0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match="teacher: snap_fusion needs one that was trained with a null condition"):
        SnapFusion(gaussian_teacher([0.0], torch.ones(1)), Config())
    with pytest.raises(UserError, match=r"compared_min: 4.0 must be at most compared_max \(2.0\)"):
        Config(compared_min=4.0, compared_max=2.0)


def test_a_run_resumes_to_the_same_bits_and_logs_both_losses(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "method": "snap_fusion", "teacher": str(tiny_teacher("vp")), "data": "digits", "start_steps": 8,
        "final_steps": 2, "stage_steps": 2, "batch_size": 4, "sample_every": 0, "device": "cpu",
    }  # fmt: skip
    same_when_resumed(tmp_path, **options)
    log = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert "diffusion" in log and "x0_error" in log
