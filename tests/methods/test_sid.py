"""SiD: its exact checks hold, known mistakes are caught, and it reaches a known answer end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.core import guidance, losses
from diffdistill.core.losses import denoising_loss
from diffdistill.exact.checks import run_checks
from diffdistill.methods import sid
from diffdistill.methods.checks.sid import verify
from diffdistill.methods.sid import Config, SiD
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold import matching
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import trains


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("gradient of the loss") for c in checks) == 12


def loss_with(change: Callable[..., Any]) -> Callable[..., Tensor]:
    """sid_loss after a change of its arguments (x, x0_teacher, x0_fake, alpha, normalise)."""
    return lambda *args: REAL_LOSS(*change(*args))


def wrong_samples(fake_score: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, kind: str) -> Tensor:
    return denoising_loss(fake_score(sid.diffuse(x, t, eps), t, cond), x.flip(0), eps)


def from_the_noisy_end(schedule: Any, n: int, generator: Any, low: float, high: float) -> Tensor:
    return REAL_TIMES(schedule, n, generator, 1 - high, 1 - low)


REAL_LOSS, REAL_TIMES, REAL_TURNS, REAL_GUIDED = sid.sid_loss, matching.edm_karras, SiD.turns, guidance.Guided
REAL_NORMALISER = losses.l1_normaliser
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the teacher is detached": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, p.detach(), q, a, n))),
    "the fake score is detached": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, p, q.detach(), a, n))),
    "both are detached": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, p.detach(), q.detach(), a, n))),
    "the sample is detached": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x.detach() + 0 * x, p, q, a, n))),
    "the networks are swapped": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, q, p, a, n))),
    "alpha has the other sign": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, p, q, -a, n))),
    "the normaliser is always on": (sid, "sid_loss", loss_with(lambda x, p, q, a, n: (x, p, q, a, True))),
    "the normaliser is of the fake score": (losses, "l1_normaliser", lambda x, p: REAL_NORMALISER(x, 0 * p)),
    "the normaliser is not detached": (losses, "l1_normaliser", lambda x, p: (x - p).abs().flatten(1).mean(1)),
    "the fake score is trained on the wrong samples": (sid, "fake_score_loss", wrong_samples),
    "the levels start at the noisy end": (matching, "edm_karras", from_the_noisy_end),
    "the student moves first": (SiD, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
    "guidance is off by one": (guidance, "Guided", lambda d, k, interval: REAL_GUIDED(d, 1 + k, interval)),
    "the guidance scales are ignored": (guidance, "Guided", lambda d, scale, interval: d),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


@pytest.mark.parametrize("normalise", [True, False])
def test_an_affine_student_reaches_the_gaussian(normalise: bool, reaches_the_gaussian: Callable[..., None]) -> None:
    config = Config(student_lr=1e-2, fake_score_lr=5e-2, normalise=normalise, alpha=1.0, time_low=0.3)
    reaches_the_gaussian(SiD, config, steps=600, lr_schedule="cosine", ema=0.97)


def test_the_students_gradient_leaves_the_fake_score_alone(
    tiny_teacher: Callable[[str], Path],
) -> None:
    method = SiD(load_teacher(tiny_teacher("vp")), Config(normalise=False, alpha=1.0))
    parameters = trainable(method.players)
    only_trains("student", parameters)
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    outcome = method.student_turn({}, batch)
    assert float(outcome.shown["gap"]) == 0  # at the start both networks are one; dropout in either would show
    outcome.loss.backward()
    assert all(p.grad is None for p in method.fake_score.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method.student.training and not method.fake_score.training
    only_trains("fake_score", parameters)
    method.fake_score_turn({}, batch).loss.backward()
    assert method.fake_score.training and not method.student.training
    assert any(bool(p.grad.any()) for p in method.fake_score.parameters() if p.grad is not None)


def test_guidance_is_one_batched_call_each(tiny_teacher: Callable[[str], Path]) -> None:
    config = Config(guidance_scale=2.0, fake_score_guidance=1.5, fake_score_training_guidance=3.0)
    method = SiD(load_teacher(tiny_teacher("vp")), config)
    seen = []
    for name, denoiser in (("fake", method.fake_score), ("teacher", method.teacher.denoiser)):
        denoiser.network.register_forward_hook(lambda module, args, out, n=name: seen.append((n, len(args[0]))))
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    method.student_turn({}, batch)
    assert sorted(seen) == [("fake", 8), ("teacher", 8)]
    seen.clear()
    method.fake_score_turn({}, batch)
    assert seen == [("fake", 8)]


def test_a_guided_fake_score_learns_without_a_class_too(tiny_teacher: Callable[[str], Path]) -> None:
    teacher, cond = load_teacher(tiny_teacher("vp")), {"class_labels": torch.arange(1000) % 10}
    batch = Batch(1000, (1, 8, 8), cond, None, torch.device("cpu"), (0, 0, 0))
    assert SiD(teacher, Config(guidance_scale=2.0)).fake_score_cond(batch) is cond
    method = SiD(teacher, Config(fake_score_guidance=2.0, label_dropout=0.3))
    labels = method.fake_score_cond(batch)["class_labels"]
    dropped = labels != cond["class_labels"]
    assert bool((labels[dropped] == 10).all()) and 250 < int(dropped.sum()) < 350


def test_what_a_guided_fake_score_learns_without_a_class_is_made_without_one(
    tiny_teacher: Callable[[str], Path],
) -> None:
    method = SiD(load_teacher(tiny_teacher("vp")), Config(fake_score_guidance=2.0, label_dropout=0.5))
    batch = Batch(64, (1, 8, 8), {"class_labels": torch.arange(64) % 10}, None, torch.device("cpu"), (0, 0, 0))
    seen = []
    method.student.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    method.fake_score_turn({}, batch)
    method.student_turn({}, batch)
    dropped, kept = seen
    assert torch.equal(dropped, method.fake_score_cond(batch)["class_labels"]) and bool((dropped == 10).any())
    assert torch.equal(kept, batch.cond["class_labels"])  # the student's own turn drops none


def test_the_range_of_times_is_checked(tiny_teacher: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"time_low: 0\.8 must be less than time_high"):
        SiD(load_teacher(tiny_teacher("vp")), Config(time_low=0.8))


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {}), ("edm", {"student_level": 2.5}), ("flow", {"times": "native", "fake_score_guidance": 1.5})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    run = {"method": "sid", "batch_size": 4, "sample_every": 0, "device": "cpu", **options}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **run)
