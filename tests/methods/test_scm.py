"""sCM: the exact checks hold, known mistakes are caught, both modes train, resume and are exported."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.core.prediction import expand
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.scm import verify
from diffdistill.methods.scm import SCM, Config
from diffdistill.scaffold import continuous
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point, normalised
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(SCM, name) for name in ("tangent", "derivative", "regression", "weight_turn")}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def without_its_x(self: SCM, f: Tensor, at: Point, r: float) -> Tensor:
    return REAL["tangent"](self, f, at, r) + r * expand(torch.sin(at.t) * torch.cos(at.t), f) * at.x_t


def once(self: SCM, f: Tensor, at: Point, r: float) -> Tensor:
    """cos(t) in place of its square."""
    return REAL["tangent"](self, f, at, r) + expand(torch.cos(at.t) ** 2 - torch.cos(at.t), f) * (f - at.v)


def with_gradient(self: SCM, step: int, at: Point) -> Outcome:
    f = self.velocity(at)
    target = f + normalised(self.tangent(f, at, self.config.warm(step)), self.config.norm, self.config.norm_c)
    return Outcome((f - target).square().mean() / math.tan(float(at.t[0])))


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "g lacks x_t": (SCM, "tangent", without_its_x),
    "cos(t) once": (SCM, "tangent", once),
    "g has the other sign": (SCM, "tangent", lambda self, *a: -REAL["tangent"](self, *a)),
    "warm-up scales all of g": (SCM, "tangent", lambda self, f, at, r: r * REAL["tangent"](self, f, at, 1.0)),
    "the derivative is that in t alone": (
        SCM,
        "derivative",
        lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest),
    ),
    "the derivative is not along the path": (
        SCM,
        "derivative",
        lambda self, at, *rest: REAL["derivative"](self, at._replace(v=at.v.flip(0)), *rest),
    ),
    "the speed counts twice": (
        SCM,
        "derivative",
        lambda self, at, speed, extra: REAL["derivative"](self, at, speed * speed, extra),
    ),
    "c counts twice": (continuous, "normalised", lambda g, *norm: g / (1 + 1 / normalised(g, *norm).norm())),
    "no warm-up": (Config, "warm", lambda self, step: 1.0),
    "the target gets a gradient": (SCM, "regression", with_gradient),
    "the weight's loss lacks w": (
        SCM,
        "weight_turn",
        lambda self, batch: Outcome((torch.exp(-self.weight(self.errors[0][1])) * self.errors[0][0]).mean()),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_times_are_log_normal_and_above_the_truncation(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("edm"))
    batch = Batch(4000, (1, 8, 8), {}, torch.zeros(1), torch.device("cpu"), (0, 0, 0))
    t, r = SCM(teacher, Config(time_mean=-0.5, time_std=1.2)).times(batch)
    log_sigma = torch.log(0.5 * torch.tan(t))
    assert abs(float(log_sigma.mean()) + 0.5) < 0.06 and abs(float(log_sigma.std()) - 1.2) < 0.06
    assert bool((r == 0).all())
    t, _ = SCM(teacher, Config(mode="training", truncate_at=1.0)).times(batch)
    held = t <= math.atan(2.0) + 1e-12
    assert 0.5 < float(held.double().mean()) < 0.9 and float(t.min()) == pytest.approx(math.atan(2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "training", "guidance_scale": 2.0}, "guidance_scale: 2.0 guides the teacher's direction"),
        ({"truncate_at": 1.0}, "truncate_at: .* use mode training"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tiny_teacher: Teachers) -> None:
    with pytest.raises(UserError, match=message):
        SCM(load_teacher(tiny_teacher("vp")), Config(**options))


RUN = {"method": "scm", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize(
    "options",
    [{"tangent_warmup": 1, "guidance_scale": 2.0}, {"mode": "training", "truncate_at": 0.5, "adaptive": False}],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """Warm-up and adaptive weight go on where they were."""
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, tangent_warmup=4, **RUN)
