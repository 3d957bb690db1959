"""MeanFlow: the exact checks hold, known mistakes are caught, both modes train, resume and are exported as stock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.core.denoiser import Extra
from diffdistill.core.prediction import expand
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.mean_flow import verify
from diffdistill.methods.mean_flow import Config, MeanFlow
from diffdistill.players.sampler import DDIM
from diffdistill.rng import image_generators
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point
from diffdistill.training.assemble import load_run
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {
    name: getattr(MeanFlow, name) for name in ("residual", "derivative", "direction", "times", "dropped", "regression")
}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def with_gradient(self: MeanFlow, step: int, at: Point) -> Outcome:
    f = self.velocity(at, Extra(r=at.r))
    error = (expand(self.rho(at.t), f) * self.residual(f, at)).square().flatten(1).sum(1)
    return Outcome(((error.detach() + self.config.weight_c) ** -self.config.weight_power * error).mean())


def without_its_x(self: MeanFlow, f: Tensor, at: Point) -> Tensor:
    return REAL["residual"](self, f, at._replace(x_t=0 * at.x_t))


def at_the_other_end(self: MeanFlow, at: Point, speed: Tensor, extra: Extra) -> Tensor:
    return REAL["derivative"](self, at, speed, Extra(r=at.t))


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the target gets a gradient": (MeanFlow, "regression", with_gradient),
    "the residual lacks x_t": (MeanFlow, "residual", without_its_x),
    "the residual has the other sign": (MeanFlow, "residual", lambda self, f, at: -REAL["residual"](self, f, at)),
    "no derivative": (MeanFlow, "derivative", lambda self, at, speed, extra: 0 * at.x_t),
    "the derivative is that of the velocity": (MeanFlow, "derivative", at_the_other_end),
    "an error of F is one of u": (MeanFlow, "rho", lambda self, t: torch.ones_like(t)),
    "rho without the data's deviation": (MeanFlow, "rho", lambda self, t: torch.sin(t) + torch.cos(t)),
    "guidance is left out": (MeanFlow, "direction", lambda self, x_t, v, t, batch, cond: v),
    "guidance everywhere": (
        MeanFlow,
        "direction",
        lambda self, x_t, v, t, batch, cond: REAL["direction"](self, x_t, v, t / 100, batch, cond),
    ),
    "no condition is left out": (MeanFlow, "dropped", lambda self, b: torch.zeros(b.size, dtype=torch.bool)),
    "intervals are not restricted": (
        MeanFlow,
        "times",
        lambda self, batch: (lambda t, r: (t, 0 * r))(*REAL["times"](self, batch)),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_times_are_logit_normal_sorted_and_equal_as_often_as_said(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("flow"))
    batch = Batch(4000, (1, 8, 8), {}, torch.zeros(1), torch.device("cpu"), (0, 0, 0))
    t, r = MeanFlow(teacher, Config(time_mean=-0.4, equal_share=0.0)).times(batch)
    assert bool((r < t).all())
    logits = torch.logit(teacher.denoiser.schedule.native(torch.cat([t, r])).sigma)
    assert abs(float(logits.mean()) + 0.4) < 0.04 and abs(float(logits.std()) - 1.0) < 0.04
    t, r = MeanFlow(teacher, Config(equal_share=0.75)).times(batch)
    assert abs(float((t == r).double().mean()) - 0.75) < 0.02


def test_refusals(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match=r"student_steps: 2 make a jump of 0\.\d+, and jumps over more than 0\.2"):
        MeanFlow(teacher, Config(longest_jump=0.2, student_steps=2))
    with pytest.raises(UserError, match=r"student_steps: 3 make a jump of 0\.\d+, and jumps over more than 0\.2"):
        MeanFlow(teacher, Config(longest_jump=0.2, student_steps=50)).in_steps(3)


RUN = {"method": "mean_flow", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "student_lr": 1e-2}


@pytest.mark.parametrize(("parameterization", "steps"), [("vp", 4), ("edm", 2), ("flow", 1)])
@pytest.mark.parametrize("options", [{"mode": "distillation"}, {"guidance_scale": 2.0, "guidance_mix": 0.5}])
def test_it_trains_every_parameterisation_and_exports_a_stock_network(
    parameterization: str, steps: int, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    run = distill(
        teacher=str(teacher), steps=3, out=str(tmp_path / "run"), student_steps=steps, equal_share=0.2, **RUN, **options
    )
    plain, before = (UNet2DModel.from_pretrained(path, subfolder="unet") for path in (run.student, teacher))
    assert plain.state_dict().keys() == before.state_dict().keys()
    sampler, student = load_student(run.student)
    assert len(sampler.levels) == steps and sampler.step == DDIM()
    cond, generators = {"class_labels": torch.arange(4)}, lambda: image_generators(0, range(4))
    images = sampler(student.shape, cond, generators())
    own = load_run(tmp_path / "run")[0].method.sampler()
    assert torch.allclose(own(student.shape, cond, generators()), images, atol=1e-4), "the export is the student"


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RUN)
