"""f-distill: its exact checks hold, known mistakes are caught, and it trains, resumes and refuses as it should."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.exact.checks import run_checks
from diffdistill.methods import f_distill
from diffdistill.methods.checks.f_distill import verify
from diffdistill.methods.f_distill import Config, FDistill
from diffdistill.scaffold import matching, ratio
from diffdistill.scaffold.ratio import WEIGHTS, RatioWeight
from tests.methods.short_runs import same_when_resumed


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("gradient of D_f") for c in checks) == 2 * len(WEIGHTS)


def with_weight(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, logits, t: change(REAL_WEIGHT(self, logits, t))


REAL_WEIGHT, REAL_GRADIENT = RatioWeight.forward, f_distill.distribution_matching_gradient
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "no weight": (RatioWeight, "forward", with_weight(torch.ones_like)),
    "the weight's root": (RatioWeight, "forward", with_weight(torch.sqrt)),
    "one weight for the batch": (RatioWeight, "forward", with_weight(lambda h: h.mean().expand_as(h))),
    "opposite sign": (
        f_distill,
        "distribution_matching_gradient",
        lambda *a, **k: (-REAL_GRADIENT(*a, **k)[0], REAL_GRADIENT(*a, **k)[1]),
    ),
    "the means never move": (RatioWeight, "update", lambda self: None),
    "a divergence for another": (ratio, "WEIGHTS", WEIGHTS | {"jeffreys": WEIGHTS["forward_kl"]}),
    "no normaliser": (matching, "l1_normaliser", lambda x, x0: torch.ones(len(x), dtype=x.dtype)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


@pytest.mark.parametrize("option", ["gan_weight", "discriminator_weight"])
def test_no_discriminator_is_refused(option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{option}: 0 leaves no discriminator"):
        Config(**{option: 0.0})
    train = ["train", "--method", "f_distill", "--data", "digits", "--out", str(tmp_path / "no")]
    assert main([*train, f"--{option.replace('_', '-')}", "0"]) == 2
    assert main([*train, "--divergence", "kl"]) == 2
    error = capsys.readouterr().err
    assert f"{option}: 0 leaves" in error and "jensen_shannon" in error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("lora", [None, "student,fake_score"])
def test_a_resumed_run_has_the_same_bits_and_its_means(
    lora: str | None, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    shared = {
        "method": "f_distill", "teacher": str(tiny_teacher("vp")), "data": "digits", "batch_size": 4, "lora": lora,
        "lora_rank": 2, "update_ratio": 1, "fake_score_lr": 1e-2, "sample_every": 0, "device": "cpu",
    }  # fmt: skip
    same_when_resumed(tmp_path, **shared)


def test_the_weights_do_not_depend_on_how_a_step_is_divided(
    tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    shared = {
        "method": "f_distill", "teacher": str(tiny_teacher("edm")), "data": "digits", "batch_size": 8,
        "update_ratio": 1, "fake_score_lr": 1e-2, "sample_every": 0, "device": "cpu", "steps": 4, "log_every": 4,
    }  # fmt: skip
    logged = []
    for accumulate in (1, 4):
        distill(**shared, accumulate=accumulate, out=tmp_path / str(accumulate))
        lines = (tmp_path / str(accumulate) / "metrics.jsonl").read_text().splitlines()
        logged.append({k: v for k, v in json.loads(lines[-1]).items() if "/loss" in k or "/gap" in k})
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


def test_divergences_and_options_are_all_named() -> None:
    assert FDistill is f_distill.METHOD
    for name in WEIGHTS:
        assert Config(divergence=name).divergence == name  # type: ignore[arg-type]
