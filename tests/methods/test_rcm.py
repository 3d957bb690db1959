"""rCM: the exact checks hold, known mistakes are caught, a student trains, resumes and is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill, load_teacher
from diffdistill.core.prediction import expand
from diffdistill.exact.checks import run_checks
from diffdistill.methods import rcm
from diffdistill.methods.checks.rcm import verify
from diffdistill.methods.rcm import RCM, Config, Consistency
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(Consistency, name) for name in ("tangent", "derivative")}
REAL_WARM, REAL_LOSS = Config.warm, RCM.student_loss


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def as_in_scm(self: Consistency, f: Tensor, at: Point, r: float) -> Tensor:
    """Linear in r, with cos(t)^2 from the beginning."""
    cos, sin = torch.cos(at.t), torch.sin(at.t)
    rising = expand(cos * sin, f) * at.x_t + self.derivative(at, cos * sin)
    return -expand(cos**2, f) * (f - at.v) - r * rising


def with_the_whole_derivative(self: Consistency, f: Tensor, at: Point, r: float) -> Tensor:
    """The derivative without its share r."""
    return REAL["tangent"](self, f, at, r) - (1 - r) * self.derivative(at, torch.cos(at.t) * torch.sin(at.t))


def with_gradient(self: Consistency, step: int, at: Point) -> Outcome:
    f = self.velocity(at)
    return Outcome((f - f + self.tangent(f, at, self.own.warm(step))).square().mean())


def matched_alone(self: RCM, batch: Batch) -> tuple[Tensor, Outcome]:
    return MatchingMethod.student_loss(self, batch)


def judged_at_once(self: RCM, batch: Batch) -> tuple[Tensor, Outcome]:
    x, matched = MatchingMethod.student_loss(self, batch)
    consistency = self.config.consistency_weight * self.consistency.student_turn(batch.key[1], batch).loss
    return x, Outcome(matched.loss + consistency, matched.shown)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "g is sCM's": (Consistency, "tangent", as_in_scm),
    "the derivative has no warm-up": (Consistency, "tangent", with_the_whole_derivative),
    "g has the other sign": (Consistency, "tangent", lambda self, *a: -REAL["tangent"](self, *a)),
    "the derivative is that in t alone": (
        Consistency,
        "derivative",
        lambda self, at, speed: REAL["derivative"](self, at._replace(v=0 * at.v), speed),
    ),
    "the target gets a gradient": (Consistency, "regression", with_gradient),
    "no warm-up": (Config, "warm", lambda self, step: 1.0),
    "the warm-up never ends": (Config, "warm", lambda self, step: REAL_WARM(self, 0)),
    "the consistency is left out": (RCM, "student_loss", matched_alone),
    "samples are judged while r rises": (RCM, "student_loss", judged_at_once),
    "the matching has no sign": (
        rcm,
        "matching_loss",
        lambda *a, f=rcm.matching_loss: Outcome(-f(*a).loss, f(*a).shown),
    ),
    "simulated times rise": (Tensor, "cummin", lambda self, dim: self.cummax(dim)),
    "the simulation reads noise again": (
        rcm,
        "simulated_through",
        lambda sampler, times, batch, f=rcm.simulated_through: f(sampler, [], batch),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_guidance_is_the_teachers_in_both_terms(tiny_teacher: Teachers) -> None:
    method = RCM(load_teacher(tiny_teacher("vp")), Config(guidance_scale=3.0, tangent_warmup=0, derivative="central"))
    teacher = method.teacher.denoiser
    assert method.consistency.teacher.denoiser is teacher
    seen: list[tuple[str, int]] = []
    for name, denoiser in (("teacher", teacher), ("student", method.student), ("fake", method.fake_score)):
        denoiser.register_forward_hook(lambda module, args, out, name=name: seen.append((name, len(args[0]))))
    cond = {"class_labels": torch.arange(4)}
    method.student_loss(Batch(4, (1, 8, 8), cond, torch.randn(4, 1, 8, 8), torch.device("cpu"), (0, 0, 0)))
    sizes = {name: {size for who, size in seen if who == name} for name, _ in seen}
    assert sizes == {"teacher": {8}, "student": {4}, "fake": {4}}
    assert [who for who, _ in seen].count("teacher") == 2


RUN = {"method": "rcm", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "update_ratio": 1}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"tangent_warmup": 1, "guidance_scale": 2.0, "student_steps": 2}),
        ("vp", {"tangent_warmup": 0, "student_steps": 4, "simulated_times": "levels", "fake_scores": "per_level"}),
        ("edm", {"tangent_warmup": 1, "guidance_scale": 2.0}),
        ("flow", {"tangent_warmup": 0, "derivative": "semi"}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_it_needs_images(tiny_teacher: Teachers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data: rcm .* needs real images"):
        distill("rcm", teacher=str(tiny_teacher("vp")), steps=1, out=str(tmp_path / "run"), device="cpu")


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """Stopped while r rises, and judged after it."""
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), end=5, student_lr=1e-2, tangent_warmup=3, **RUN)
