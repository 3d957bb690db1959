"""SANA-Sprint: the exact checks hold, known mistakes are caught, a student takes its scale, trains and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.commands.cli import main
from diffdistill.core.denoiser import NONE
from diffdistill.core.prediction import expand
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.sana_sprint import verify
from diffdistill.methods.sana_sprint import Config, SanaSprint
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.scaffold.method import Outcome
from diffdistill.scaffold.tangent import Point, TangentMethod
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {name: getattr(SanaSprint, name) for name in ("tangent", "derivative", "generate", "extra")}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def without_its_x(self: SanaSprint, f: Tensor, at: Point, r: float) -> Tensor:
    return REAL["tangent"](self, f, at, r) + r * expand(torch.sin(at.t) * torch.cos(at.t), f) * at.x_t


def the_first_term_alone(self: SanaSprint, step: int, batch: Any) -> Outcome:
    return TangentMethod.student_turn(self, step, batch)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "g lacks x_t": (SanaSprint, "tangent", without_its_x),
    "g has the other sign": (SanaSprint, "tangent", lambda self, *a: -REAL["tangent"](self, *a)),
    "the derivative is that in t alone": (
        SanaSprint,
        "derivative",
        lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest),
    ),
    "the GAN is left out": (SanaSprint, "student_turn", the_first_term_alone),
    "the GAN's samples are detached": (
        SanaSprint,
        "generate",
        lambda self, batch: REAL["generate"](self, batch).detach().requires_grad_(),
    ),
    "the scale is kept from the student": (SanaSprint, "extra", lambda self, batch: NONE),
    "guidance by 1 + a": (
        DrawnGuidance,
        "__call__",
        lambda self, *at, real=DrawnGuidance.__call__: real(self, *at[:-1], 1 + at[-1]),
    ),
    "no warm-up": (Config, "warm", lambda self, step: 1.0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_refusals(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match="mode: sana_sprint follows its teacher; use distillation"):
        SanaSprint(teacher, Config(mode="training"))
    teacher.denoiser.null = None
    with pytest.raises(UserError, match="teacher: a guidance scale needs one that was trained with a null condition"):
        SanaSprint(teacher, Config(guidance_min=1.0, guidance_max=1.0 + 1.0, guidance_scale=1.0))


def test_its_help_names_one_guidance_scale(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the student: two groups of its options have one."""
    with pytest.raises(SystemExit) as ended:
        main(["train", "--method", "sana_sprint", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("--guidance-scale X the") == 1 and "--guidance-scale X the guidance scale of samples" in said


RUN = {"method": "sana_sprint", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_min": 2.0, "guidance_max": 4.0, "student_steps": 2, "tangent_warmup": 1}),
        ("edm", {"guidance_min": 2.0, "guidance_max": 2.0, "misaligned": True, "tangent_warmup": 0}),
        ("flow", {"gan_loss": "logistic", "derivative": "exact", "tangent_warmup": 0}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, tangent_warmup=3, **RUN)
