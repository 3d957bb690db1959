"""ArcFlow: exact checks hold, known mistakes are caught, it trains without images, resumes, and its folder draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError
from diffdistill.core.policies import Momenta
from diffdistill.exact.checks import run_checks
from diffdistill.methods.arc_flow import ArcFlow, Config
from diffdistill.methods.checks.arc_flow import verify
from diffdistill.scaffold.method import Need
from tests.methods.short_runs import same_when_resumed, stock_draws_the_same, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


X0, ROLL, BEFORE, VELOCITY = Momenta.x0, Momenta.roll, Momenta._before, ArcFlow.velocity
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "momenta stay": (Momenta, "_before", lambda self, t: torch.ones_like(self.rates)),
    "momenta turn": (Momenta, "_before", lambda self, t: 1 / BEFORE(self, t)),
    "all components count": (Momenta, "_momenta", lambda self: self.values),
    "a step of Euler": (
        Momenta, "roll", lambda self, x, t, r, n: self.x0(x, t) * torch.cos(r)[:, None] + torch.sin(r)[:, None]
        * (x - torch.cos(t)[:, None] * self.x0(x, t)) / torch.sin(t)[:, None],
    ),
    "the window is one": (ArcFlow, "velocity", lambda self, policy, x, t: policy.v(x, t)),
    "states are those of the beginning": (Momenta, "roll", lambda self, x, t, r, n: ROLL(self, x, self.s, r, n)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


RUN = {"method": "arc_flow", "batch_size": 4, "sample_every": 0, "device": "cpu", "substeps": 4, "momenta": 3}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_scale": 2.0, "component_dropout": 0.2}),
        ("edm", {"student_steps": 1, "window": 2}),
        ("flow", {"levels": (0.9, 0.5, 0.2), "teacher_share": 1.0}),
    ],
)
def test_it_trains_every_parameterisation_and_stock_diffusers_draws_the_same(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    assert Need.IMAGES not in ArcFlow.needs
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options, student_lr=1e-3)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    stock_draws_the_same(pipeline, tmp_path / "run" / "student")


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RUN, component_dropout=0.2, teacher_share=0.5)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="states: 5 is more than the 4 substeps"):
        Config(states=5, substeps=4)
