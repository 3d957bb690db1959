"""Guided distillation: exact checks, caught mistakes, and both stages through a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.guidance import guide
from diffdistill.core.ode import ddim_step
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import guided
from diffdistill.methods.checks.guided import verify
from diffdistill.methods.guided import Config, GuidedDistillation
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.scaffold import halving
from diffdistill.scaffold.halving import Halving, HalvingMethod
from diffdistill.scaffold.method import Batch, Turn
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def one_step_target(teacher: Any, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Any) -> Tensor:
    return teacher(x_t, t, cond).x0.detach()


def landing_point(teacher: Any, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Any) -> Tensor:
    return ddim_step(teacher, ddim_step(teacher, x_t, t, mid, cond), mid, s, cond).detach()


REAL_STARTS, REAL_TARGET = HalvingMethod._starts, halving.two_step_target
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the scale is w": (guided, "guide", lambda d, x, t, c, s: guide(d, x, t, c, s + 1)),
    "no guidance": (guided, "guide", lambda d, x, t, c, s: guide(d, x, t, c, s**0)),
    "the student gets w": (
        GuidedDistillation,
        "input_of",
        lambda self, scale: Extra(scale - 1),
    ),
    "the student gets another scale": (
        GuidedDistillation,
        "input_of",
        lambda self, scale: Extra(torch.full_like(scale, 2.0)),
    ),
    "no weight": (guided, "weighted_x0_loss", lambda x0, target, t, weight: (x0 - target).square().mean()),
    "one step of the last student": (halving, "two_step_target", one_step_target),
    "the target is where the steps land": (halving, "two_step_target", landing_point),
    "the first halving's teacher is the untrained student": (
        HalvingMethod,
        "_starts",
        lambda self, step: REAL_STARTS(self, step) and step > self.config.guidance_steps,
    ),
    "the middle is the end": (
        halving,
        "two_step_target",
        lambda teacher, x_t, t, mid, s, cond: REAL_TARGET(teacher, x_t, t, s, s, cond),
    ),
    "stages are counted from the run's beginning": (Halving, "stage", lambda self, step: self.stages - 1),
    "the sampler adds noise": (
        HalvingMethod,
        "sampler",
        lambda self, f=HalvingMethod.sampler: Sampler(self.student, f(self).levels),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


def options(teacher: Path, out: Path, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {"method": "guided", "teacher": str(teacher), "data": "digits", "steps": 3}
    own = {"guidance_steps": 1, "stage_steps": 1, "start_steps": 4, "student_lr": 1e-3, "guidance_max": 4.0}
    return shared | own | {"batch_size": 4, "sample_every": 0, "device": "cpu", "out": str(out)} | changes


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation_and_exports_a_stock_network(
    parameterization: str, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    folder = distill(**options(teacher, tmp_path / "run", guidance_scale=3.0)).student
    plain, before = (UNet2DModel.from_pretrained(path, subfolder="unet") for path in (folder, teacher))
    assert plain.state_dict().keys() == before.state_dict().keys(), "the scale is folded into the class table"
    sampler, student = load_student(folder)
    assert len(sampler.levels) == 1 and sampler.step == DDIM()
    images = sampler(student.shape, {"class_labels": torch.arange(4)}, image_generators(0, range(4)))
    assert bool(images.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({"steps": 1}, 2),
        ({"steps": 2}, 2),
        ({"start_steps": 4, "final_steps": 4, "steps": 2}, 4),
        ({"guidance_min": 3.0, "guidance_max": 3.0}, 1),
    ],
)
def test_stage_one_alone_a_fixed_scale_and_early_ends(
    changes: dict[str, Any], levels: int, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    sampler, _ = load_student(distill(**options(tiny_teacher("vp"), tmp_path / "run", **changes)).student)
    assert len(sampler.levels) == levels


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    """Stopped inside a halving: its teacher and its optimizer are in the checkpoint."""
    shared = options(tiny_teacher("vp"), tmp_path, guidance_steps=2, stage_steps=3)
    same_when_resumed(tmp_path, stop=6, end=8, **shared)


def test_three_passes_in_either_stage(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = GuidedDistillation(teacher, Config(guidance_steps=1, start_steps=4))
    seen: list[tuple[str, int]] = []
    parts = (("student", method.student), ("previous", method.previous), ("teacher", method.teacher))
    for name, denoiser in parts:
        denoiser.network.register_forward_hook(lambda m, args, out, name=name: seen.append((name, len(args[0]))))
    data = torch.randn(4, 1, 8, 8)
    batch = Batch(4, teacher.shape, {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))
    method.turns(0)[0].loss(batch)
    assert sorted(seen) == [("student", 4), ("teacher", 8)]
    seen.clear()
    method.turns(1)[0].loss(batch)
    assert sorted(seen) == [("previous", 4), ("previous", 4), ("student", 4)]


def test_every_part_of_the_student_is_trained_and_the_teacher_is_not(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = GuidedDistillation(teacher, Config())
    data = torch.randn(4, 1, 8, 8)
    batch = Batch(4, teacher.shape, {"class_labels": torch.arange(4)}, data, torch.device("cpu"), (0, 0, 0))
    (turn,) = method.turns(0)
    assert isinstance(turn, Turn)
    turn.loss(batch).loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for p in (*method.teacher.parameters(), *method.previous.parameters()))


def test_what_cannot_be_used_is_refused(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(
        UserError,
        match=r"guidance_scale: 7.0 is not in what is trained, 1.0 \(guidance_min\) to 5.0 \(guidance_max\)",
    ):
        GuidedDistillation(teacher, Config(guidance_scale=7.0))
    with pytest.raises(UserError, match=r"start_steps: 12 is not final_steps \(1\) times 2, 4, 8"):
        GuidedDistillation(teacher, Config(start_steps=12))
    with pytest.raises(UserError, match=r"guid.* distillation needs one that was trained with a null condition"):
        GuidedDistillation(gaussian_teacher([0.0], 1.0), Config())
    d = teacher.denoiser
    predicts_noise = Teacher(
        Denoiser(d.network, d.schedule, OUTPUTS["epsilon"], call=d.call, null=d.null), (1, 8, 8), 10
    )
    with pytest.raises(UserError, match="it predicts the noise"):
        GuidedDistillation(predicts_noise, Config())
