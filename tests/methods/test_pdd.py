"""PDD: the exact checks hold, known mistakes are caught, it trains without images, resumes and refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, export, load_teacher
from diffdistill.core.policies import Heads
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.pdd import verify
from diffdistill.methods.pdd import PDD, Config
from diffdistill.scaffold.method import Need
from tests.methods.short_runs import same_when_resumed, stock_draws_the_same, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


ROLL, VELOCITY, X0 = Heads.roll, PDD.velocity, Heads.x0
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "states stay": (Heads, "roll", lambda self, x, t, r, steps: x),
    "the first head is all heads'": (Heads, "x0", lambda self, x, t: X0(self, x, self.s)),
    "a head too far": (PDD, "velocity", lambda self, x, head, cond: VELOCITY(self, x, (head + 1).clamp(max=14), cond)),
    "one step of the teacher": (
        PDD, "velocity", lambda self, x, head, cond: self.teacher(x, self.nodes[head], cond).v
    ),
    "passes end at clean data": (Heads, "roll", lambda self, x, t, r, steps: ROLL(self, x, t, 0.5 * r, steps)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


RUN = {"method": "pdd", "batch_size": 4, "sample_every": 0, "device": "cpu", "intervals": 8}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_scale": 2.0}),
        ("edm", {"student_steps": 1, "solver_steps": 2, "states": 2}),
        ("flow", {"student_steps": 4, "more_steps": (2, 8), "student_level": 0.9}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    assert Need.IMAGES not in PDD.needs
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RUN, states=2, more_steps=(4,))


def test_the_student_begins_as_its_teacher_at_every_head(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("flow"))
    student = PDD(teacher, Config(intervals=4)).student.eval()  # without dropout
    x, t = torch.randn(3, *teacher.shape), torch.full((3,), 1.1).double()
    cond = {"class_labels": torch.tensor([0, 3, 1])}
    alike = teacher.denoiser(x, t, cond).y
    for y in student(x, t, cond).y.chunk(4, 1):
        assert torch.allclose(y, alike, atol=1e-5)


def test_one_folder_serves_every_number_of_passes_that_is_trained(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """Stock diffusers' pipeline draws what our sampler draws, in the number of steps of its call."""
    from diffusers import DiffusionPipeline

    trains(tmp_path, teacher=str(tiny_teacher("edm")), **RUN, more_steps=(1, 4), student_lr=1e-3)
    student = tmp_path / "run" / "student"
    assert "which takes 1, 2 or 4 steps" in (student / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    own = {2: student, 4: export(tmp_path / "run", student_steps=4, out=tmp_path / "four")}
    for steps, folder in own.items():
        assert stock_draws_the_same(pipeline, folder) == steps
    with pytest.raises(ValueError, match="num_inference_steps: this student makes 2 or 1 or 4 steps, and 8 were"):
        pipeline(num_inference_steps=8)
    with pytest.raises(UserError, match="student_steps: this student is trained for 2, 1, 4 steps and no others"):
        export(tmp_path / "run", student_steps=8)


def test_what_makes_no_sense_is_refused(tiny_teacher: Teachers) -> None:
    for options, message in (
        ({"intervals": 6, "student_steps": 4}, "student_steps: 4 is no divisor of the 6 intervals"),
        ({"intervals": 8, "more_steps": (4, 3)}, "more_steps: 3 is no divisor of the 8 intervals"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="intervals: 2000 "):
        PDD(load_teacher(tiny_teacher("vp")), Config(intervals=2000))
