"""Diff-Instruct: its exact checks hold, known mistakes are caught, and it reaches a known answer end to end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import load_teacher
from diffdistill.core.losses import denoising_loss, gradient_injection
from diffdistill.core.times import log_normal
from diffdistill.exact.checks import run_checks
from diffdistill.methods import diff_instruct
from diffdistill.methods.checks.diff_instruct import verify
from diffdistill.methods.diff_instruct import Config, DiffInstruct
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold import matching
from diffdistill.scaffold.method import Batch, Outcome
from tests.methods.short_runs import trains


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("sigma^2 times the gradient") for c in checks) == 3


def opposite_sign(self: DiffInstruct, *args: Any) -> Outcome:
    outcome = REAL_MATCHING(self, *args)
    return replace(outcome, loss=-outcome.loss)


def not_detached(x: Tensor, grad: Tensor) -> Tensor:
    return 0.5 * ((x - (x - grad)) ** 2).mean()


def kl_weight(self: DiffInstruct, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Outcome:
    grad, _ = matching.distribution_matching_gradient(
        x, diff_instruct.diffuse(x, t, eps), t, cond, self.teacher, self.fake_score, False
    )
    return Outcome(gradient_injection(x, grad))


def wrong_samples(fake_score: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, kind: str) -> Tensor:
    return denoising_loss(fake_score(diff_instruct.diffuse(x, t, eps), t, cond), x.flip(0), eps)


def other_units(schedule: Any, n: int, generator: Any, mean: float, std: float) -> Tensor:
    return log_normal(schedule, n, generator, mean, std)


REAL_MATCHING, REAL_TURNS, REAL_INJECTION = DiffInstruct.matching, DiffInstruct.turns, gradient_injection
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "opposite sign": (DiffInstruct, "matching", opposite_sign),
    "the weight of KL itself": (DiffInstruct, "matching", kl_weight),
    "the gradient's target is not detached": (diff_instruct, "gradient_injection", not_detached),
    "the student is detached": (
        diff_instruct,
        "gradient_injection",
        lambda x, g: REAL_INJECTION(x.detach() + 0 * x, g),
    ),
    "twice the gradient": (diff_instruct, "gradient_injection", lambda x, g: REAL_INJECTION(x, 2 * g)),
    "the fake score is trained on the wrong samples": (matching, "fake_score_loss", wrong_samples),
    "levels in the teacher's own units": (diff_instruct, "edm_log_normal", other_units),
    "the student moves last": (DiffInstruct, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
    "the ratio is ignored": (DiffInstruct, "turns", lambda self, step: REAL_TURNS(self, 0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def test_an_affine_student_reaches_the_gaussian(reaches_the_gaussian: Callable[..., None]) -> None:
    config = Config(student_lr=1e-2, fake_score_lr=5e-2, time_mean=0.0)
    reaches_the_gaussian(DiffInstruct, config, steps=600, lr_schedule="cosine", ema=0.97)


def test_guidance_is_the_teachers_alone_and_samples_are_reused(tiny_teacher: Callable[[str], Path]) -> None:
    method = DiffInstruct(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0))
    seen = []
    for name, denoiser in (
        ("student", method.student),
        ("fake", method.fake_score),
        ("teacher", method.teacher.denoiser),
    ):
        denoiser.network.register_forward_hook(lambda module, args, out, n=name: seen.append((n, len(args[0]))))
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    for turn in method.turns(0):
        turn.loss(batch)
    assert seen == [("student", 4), ("fake", 4), ("teacher", 8), ("fake", 4)]


def test_the_students_gradient_leaves_the_fake_score_alone(tiny_teacher: Callable[[str], Path]) -> None:
    method = DiffInstruct(load_teacher(tiny_teacher("vp")), Config())
    only_trains("student", trainable(method.players))
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    outcome = method.student_turn({}, batch)
    assert float(outcome.shown["gap"]) == 0  # at the start both networks are one; dropout in either would show
    outcome.loss.backward()
    assert all(p.grad is None for p in method.fake_score.parameters())


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {}), ("edm", {"student_level": 1.0}), ("flow", {"guidance_scale": 1.5})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    run = {"method": "diff_instruct", "batch_size": 4, "sample_every": 0, "device": "cpu", **options}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **run)
