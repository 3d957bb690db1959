"""TBCM: the exact checks hold, known mistakes are caught, it trains without images, resumes and is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.core.denoiser import NONE
from diffdistill.exact.checks import run_checks
from diffdistill.methods import tbcm
from diffdistill.methods.checks.tbcm import verify
from diffdistill.methods.tbcm import TBCM, Config
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.scaffold.method import Need
from diffdistill.scaffold.tangent import Point
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(TBCM, name) for name in ("tangent", "walk", "times", "derivative")}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def with_the_noise(self: TBCM, batch: Any) -> Point:
    at = REAL["walk"](self, batch)
    z, t = batch.randn("z"), torch.full_like(at.t[: batch.size], self.top)
    v = self.guidance(z, t, batch.cond, self.config.drawn(batch.uniform("student/scale"))).v
    return at._replace(x_t=torch.cat([z, at.x_t[: -batch.size]]), t=torch.cat([t, at.t[: -batch.size]]),
                       v=torch.cat([v, at.v[: -batch.size]]))  # fmt: skip


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the noise is among the states": (TBCM, "walk", with_the_noise),
    "the direction is the next state's": (
        TBCM,
        "walk",
        lambda self, batch: (lambda at: at._replace(v=at.v.roll(-1, 0)))(REAL["walk"](self, batch)),
    ),
    "one time for all samples": (
        TBCM,
        "times",
        lambda self, batch: tuple(part[:, :1].expand_as(part) for part in REAL["times"](self, batch)),
    ),
    "times of the row itself": (
        TBCM,
        "times",
        lambda self, batch: (self.cells[:, None].expand(-1, batch.size), torch.zeros(len(self.cells), batch.size)),
    ),
    "r never falls": (TBCM, "share", lambda self, step: self.config.warm(step)),
    "g has the other sign": (TBCM, "tangent", lambda self, *a: -REAL["tangent"](self, *a)),
    "the derivative is that in t alone": (
        TBCM,
        "derivative",
        lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest),
    ),
    "the student is not told the scale": (
        TBCM,
        "walk",
        lambda self, batch: REAL["walk"](self, batch)._replace(extra=NONE),
    ),
    "guidance by 1 + a": (
        DrawnGuidance,
        "__call__",
        lambda self, *at, real=DrawnGuidance.__call__: real(self, *at[:-1], 1 + at[-1]),
    ),
    "the sum of a sample": (tbcm, "per_sample_mean", lambda x: x.flatten(1).sum(1)),
    "images are needed": (TBCM, "needs", frozenset({Need.IMAGES})),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_refusals(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match="mode: tbcm follows its teacher's own trajectories; use distillation"):
        TBCM(teacher, Config(mode="training"))
    teacher.denoiser.null = None
    with pytest.raises(UserError, match="teacher: guidance needs one that was trained with a null condition"):
        TBCM(teacher, Config(guidance_min=1.0, guidance_max=2.0, guidance_scale=1.0))


RUN = {"method": "tbcm", "batch_size": 2, "sample_every": 0, "device": "cpu", "states": 3}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_min": 2.0, "guidance_max": 4.0, "student_steps": 2, "tangent_warmup": 1}),
        ("edm", {"guidance_min": 2.0, "guidance_max": 2.0, "tangent_warmup": 0, "final_share": 0.75, "calm_start": 0}),
        ("flow", {"derivative": "exact", "tangent_warmup": 0}),
    ],
)
def test_it_trains_every_parameterisation_without_images(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, tangent_warmup=3, **RUN)
