"""SIM: its exact checks hold, known mistakes are caught, and it reaches a known answer end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import Prediction
from diffdistill.exact.checks import run_checks
from diffdistill.methods import sim
from diffdistill.methods.checks.sim import verify
from diffdistill.methods.sim import SIM, Config
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold import matching
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import trains


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("gradient of E d(y)") for c in checks) == 12


def distance_gradient_detached(y: Tensor, kind: str, c: float) -> Tensor:
    return REAL_GRADIENT(y, kind, c).detach()


def elementwise(y: Tensor, kind: str, c: float) -> Tensor:
    return 2 * y if kind == "l2" else y / torch.sqrt(y**2 + c**2)


def wrong_samples(fake_score: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, kind: str) -> Tensor:
    return denoising_loss(fake_score(sim.diffuse(x, t, eps), t, cond), x.flip(0), eps)


def opposite(self: SIM, *args: Any) -> tuple[Tensor, Tensor]:
    loss, y = REAL_DIVERGENCE(self, *args)
    return -loss, y


def detached(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """divergence with that network's outputs cut off."""

    def divergence(self: SIM, *args: Any) -> tuple[Tensor, Tensor]:
        real = getattr(self, name)

        def without_graph(x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
            return real(x_t.detach(), t, cond)

        setattr(self, name, without_graph)
        try:
            return REAL_DIVERGENCE(self, *args)
        finally:
            setattr(self, name, real)

    return divergence


REAL_GRADIENT, REAL_DIVERGENCE, REAL_TURNS = sim.distance_gradient, SIM.divergence, SIM.turns
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "y is detached": (sim, "distance_gradient", distance_gradient_detached),
    "the norm is elementwise": (sim, "distance_gradient", elementwise),
    "d' without the factor 2": (sim, "distance_gradient", lambda *args: REAL_GRADIENT(*args) / 2),
    "c is ignored": (sim, "distance_gradient", lambda y, kind, c: REAL_GRADIENT(y, kind, 1e-6)),
    "opposite sign": (SIM, "divergence", opposite),
    "the teacher is detached": (SIM, "divergence", detached("teacher")),
    "the fake score is detached": (SIM, "divergence", detached("fake_score")),
    "the fake score is trained on the wrong samples": (matching, "fake_score_loss", wrong_samples),
    "the student moves last": (SIM, "turns", lambda self, step: REAL_TURNS(self, step)[::-1]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
def test_an_affine_student_reaches_the_gaussian(distance: str, reaches_the_gaussian: Callable[..., None]) -> None:
    config = Config(student_lr=1e-2, fake_score_lr=5e-2, distance=distance, c=0.1, time_low=0.3)  # type: ignore
    reaches_the_gaussian(SIM, config, steps=600, lr_schedule="cosine", ema=0.97)


def test_guidance_is_the_teachers_alone_and_samples_are_reused(tiny_teacher: Callable[[str], Path]) -> None:
    method = SIM(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0))
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
    assert seen == [("student", 4), ("teacher", 8), ("fake", 4), ("fake", 4)]


def test_the_students_gradient_leaves_the_fake_score_alone(tiny_teacher: Callable[[str], Path]) -> None:
    method = SIM(load_teacher(tiny_teacher("vp")), Config())
    only_trains("student", trainable(method.players))
    batch = Batch(4, (1, 8, 8), {"class_labels": torch.arange(4)}, None, torch.device("cpu"), (0, 0, 0))
    outcome = method.student_turn({}, batch)
    assert float(outcome.shown["distance"]) == 0  # at the start both networks are one; dropout in either would show
    outcome.loss.backward()
    assert all(p.grad is None for p in method.fake_score.parameters())


def test_the_range_of_times_is_checked(tiny_teacher: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"time_low: 0\.8 must be less than time_high"):
        SIM(load_teacher(tiny_teacher("vp")), Config(time_low=0.8))


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {}), ("edm", {"student_level": 2.5}), ("flow", {"distance": "l2", "guidance_scale": 1.5})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    run = {"method": "sim", "batch_size": 4, "sample_every": 0, "device": "cpu", **options}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **run)
