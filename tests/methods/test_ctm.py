"""CTM: the exact checks hold, known mistakes are caught, it trains, resumes and is exported as stock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.core.denoiser import Extra
from diffdistill.exact.checks import run_checks
from diffdistill.methods import ctm
from diffdistill.methods.checks.ctm import verify
from diffdistill.methods.ctm import CTM, Config, Span
from diffdistill.players.sampler import DDIM, Gamma, Renoise, step_named
from diffdistill.rng import image_generators
from diffdistill.scaffold.method import Outcome
from diffdistill.training.assemble import load_run
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {
    name: getattr(CTM, name) for name in ("jump", "end", "interval", "following", "denoising", "less_noisy")
}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def both_with_gradients(self: CTM, seed: int, x: Tensor, own: Any, target: Any) -> list[Tensor]:
    return [own(), target()]


def blocked(self: CTM, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    with torch.no_grad():
        far = self.jump(self.target, self.jump(self.student, x, t, s, cond), s, 0 * s, cond)
    return far + 0 * self.jump(self.student, x, t, s, cond)


def s_above_u(self: CTM, step: int, batch: Any) -> Span:
    span = REAL["interval"](self, step, batch)
    return span._replace(s=span.t)


def plain_sum(self: CTM, followed: Outcome, batch: Any) -> Outcome:
    return (
        Outcome(followed.loss + self.config.dsm_weight * self.denoising(batch)) if self.config.dsm_weight else followed
    )


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "every jump goes to zero": (
        CTM,
        "jump",
        lambda self, net, x, t, s, cond: net(x, t, cond, Extra(r=0 * s)).at(s),
    ),
    "no signal through the outer jump": (CTM, "end", blocked),
    "no outer jump": (CTM, "end", lambda self, x, t, s, cond: self.jump(self.student, x, t, s, cond)),
    "the outer jump is the student's": (
        CTM,
        "end",
        lambda self, x, t, s, cond: self.jump(self.student, self.jump(self.student, x, t, s, cond), s, 0 * s, cond),
    ),
    "the target gets a gradient": (CTM, "both", both_with_gradients),
    "the solver stays": (CTM, "less_noisy", lambda self, x_t, *rest: x_t),
    "the solver is Euler's": (ctm, "heun_step", lambda f, x, t, s, cond: f(x, t, cond).at(s)),
    "s is above u": (CTM, "interval", s_above_u),
    "the denoising of a jump to zero": (ctm, "Extra", lambda r: Extra(r=0 * r)),
    "no lambda": (CTM, "whole_loss", plain_sum),
    "gamma's noise on top": (Gamma, "leads", lambda self, schedule, level: schedule.angle(level)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_refusals(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match=r"dsm_weight: 1\.0 is for data that a guided teacher does not draw; use 0"):
        CTM(teacher, Config(guidance_scale=2.0, grid_points=5))


def test_steps_have_names() -> None:
    for step in (DDIM(), Renoise(), Gamma(0.3)):
        assert step_named(step.name) == step
    assert [step_named(name) for name in ("gamma", "gamma x", "gamma 1.5", "jump", "")] == [None] * 5


RUN = {"method": "ctm", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "student_lr": 1e-2,
       "grid_points": 5}  # fmt: skip


@pytest.mark.parametrize(
    ("parameterization", "steps", "options"),
    [
        ("vp", 4, {"gamma": 1.0, "gan_weight": 1.0}),
        ("vp", 2, {"dsm_weight": 0.0, "guidance_scale": 2.0, "distance": "l2", "gamma": 0.3}),
        ("edm", 2, {"gan_weight": 0.5, "gan_start": 1, "solver_steps": 1}),
        ("flow", 1, {"gamma": 0.3, "adaptive": False}),
    ],
)
def test_it_trains_every_parameterisation_and_exports_a_stock_network(
    parameterization: str, steps: int, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    run = distill(teacher=str(teacher), steps=3, out=str(tmp_path / "run"), student_steps=steps, **RUN, **options)
    plain, before = (UNet2DModel.from_pretrained(path, subfolder="unet") for path in (run.student, teacher))
    assert plain.state_dict().keys() == before.state_dict().keys()
    sampler, student = load_student(run.student)
    own = load_run(tmp_path / "run")[0].method.sampler()
    assert (len(sampler.levels), sampler.step) == (steps, own.step)
    cond, generators = {"class_labels": torch.arange(4)}, lambda: image_generators(0, range(4))
    images = sampler(student.shape, cond, generators())
    assert torch.allclose(own(student.shape, cond, generators()), images, atol=1e-4), "the export is the student"


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), gan_weight=1.0, **RUN)
