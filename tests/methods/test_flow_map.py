"""Flow maps: the exact checks hold, known mistakes are caught; they train, resume and are sampled at any steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffdistill import UserError, distill, load_student, load_teacher
from diffdistill.core.denoiser import Extra
from diffdistill.core.schedule import student_levels
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.flow_map import verify
from diffdistill.methods.flow_map import Config, FlowMap
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.rng import image_generators
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.simulation import rolled_out
from diffdistill.scaffold.tangent import Point, two_time_player
from diffdistill.training.assemble import load_run
from tests.methods.short_runs import same_when_resumed

Teachers = Callable[[str], Path]
REAL: dict[str, Any] = {
    name: getattr(FlowMap, name) for name in ("own", "parts", "arrival", "residual", "direction", "lagrangian")
}


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def without_its_turn(self: FlowMap, at: Point) -> tuple[Tensor, Tensor]:
    x_r, change = REAL["arrival"](self, at)
    return x_r.detach(), change


def with_a_gradient(self: FlowMap, step: int, at: Point) -> Outcome:
    f = self.velocity(at, Extra(r=at.r))
    gap = self.lagrangian(at) if self.config.objective == "lagrangian" else self.progressive(f, at)
    if self.config.objective == "eulerian":
        gap = self.eulerian(f, at, 1.0)
    square = gap.square().flatten(1).sum(1)
    return Outcome((square / (square.detach() + self.config.weight_c) ** self.config.weight_power).mean())


def guided_once(self: FlowMap, x_t: Tensor, v: Tensor, t: Tensor, batch: Batch, cond: Any) -> Tensor:
    return v


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "b where the jump starts": (FlowMap, "own", lambda self, x, t, at: REAL["own"](self, at.x_t, at.t, at)),
    "b at another time": (FlowMap, "own", lambda self, x, t, at: REAL["own"](self, x, t / 2, at)),
    "the parts are swapped": (FlowMap, "parts", lambda self, t, s, r: REAL["parts"](self, t, s, r)[::-1]),
    "two halves whatever the split": (
        FlowMap,
        "parts",
        lambda self, t, s, r: REAL["parts"](self, t, (t + r) / 2, r),
    ),
    "the gradient of X is left out": (FlowMap, "arrival", without_its_turn),
    "an error of F is one of u": (FlowMap, "rho", lambda self, t: torch.ones_like(t)),
    "the targets get a gradient": (FlowMap, "regression", with_a_gradient),
    "guidance is left out": (FlowMap, "direction", guided_once),
    "the share is ignored": (FlowMap, "eulerian", lambda self, f, at, share: REAL["residual"](self, f, at)),
    "no derivative": (FlowMap, "derivative", lambda self, at, speed, extra: 0 * at.x_t),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def batch_of(n: int) -> Batch:
    return Batch(n, (1, 8, 8), {}, torch.zeros(1), torch.device("cpu"), (0, 0, 0))


def test_times_are_on_the_triangle_or_have_the_drawn_length(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("flow"))
    schedule = teacher.denoiser.schedule
    t, r = FlowMap(teacher, Config(equal_share=0.0, end_share=0.0)).times(batch_of(4000))
    late, early = schedule.fraction(t), schedule.fraction(r)
    assert bool((early < late).all())
    assert abs(float(late.mean()) - 2 / 3) < 0.02 and abs(float(early.mean()) - 1 / 3) < 0.02
    t, r = FlowMap(teacher, Config(equal_share=0.4, end_share=0.25)).times(batch_of(4000))
    assert abs(float((t == r).double().mean()) - 0.4) < 0.03
    assert abs(float((r == 0).double().mean()) - 0.25 * 0.6) < 0.03
    config = Config(equal_share=0.0, end_share=0.0, spans="length", length_mean=-0.8)
    t, r = FlowMap(teacher, config).times(batch_of(4000))
    logits = torch.logit(schedule.fraction(t) - schedule.fraction(r))
    assert abs(float(logits.mean()) + 0.8) < 0.06 and abs(float(logits.std()) - 1.0) < 0.06


def test_refusals(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match="path: data is for the eulerian objective in mode training"):
        FlowMap(teacher, Config(path="data", objective="eulerian"))
    with pytest.raises(UserError, match="path: data is for the eulerian objective in mode training"):
        FlowMap(teacher, Config(path="data", objective="lagrangian", mode="training"))


RUN = {"method": "flow_map", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "student_lr": 1e-2}


@pytest.mark.parametrize(
    ("parameterization", "steps", "options"),
    [
        ("vp", 4, {"objective": "lagrangian"}),
        ("edm", 2, {"objective": "progressive", "mode": "training", "split": "midpoint"}),
        ("flow", 1, {"objective": "eulerian", "guidance_scale": 2.0, "tangent_share": 0.9, "tangent_warmup": 2}),
        ("flow", 1, {"objective": "lagrangian", "mode": "training", "derivative": "exact", "guidance_scale": 2.0}),
        ("vp", 2, {"objective": "eulerian", "mode": "training", "path": "data", "matching_weight": 1.0}),
        ("edm", 1, {"objective": "lagrangian", "derivative": "central", "matching_weight": 0.5,
                    "matching_guidance": 2.0, "rollout_steps": [2]}),
    ],
)  # fmt: skip
def test_it_trains_every_parameterisation_and_exports_a_stock_network(
    parameterization: str, steps: int, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    teacher = tiny_teacher(parameterization)
    run = distill(teacher=str(teacher), steps=3, out=str(tmp_path / "run"), student_steps=steps, **RUN, **options)
    plain, before = (UNet2DModel.from_pretrained(path, subfolder="unet") for path in (run.student, teacher))
    assert plain.state_dict().keys() == before.state_dict().keys()
    sampler, student = load_student(run.student)
    assert len(sampler.levels) == steps and sampler.step == DDIM()
    cond, generators = {"class_labels": torch.arange(4)}, lambda: image_generators(0, range(4))
    images = sampler(student.shape, cond, generators())
    method = load_run(tmp_path / "run")[0].method
    own = method.sampler()
    assert torch.allclose(own(student.shape, cond, generators()), images, atol=1e-4), "the export is the student"
    for n in (1, 2, 4, 8):
        levels = student_levels(own.denoiser.schedule, n).tolist()
        assert bool(Sampler(own.denoiser, levels, DDIM())(student.shape, cond, generators()).isfinite().all())


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), matching_weight=1.0, objective="progressive", **RUN)


def test_processes_share_the_jumps_of_a_step(tiny_teacher: Teachers) -> None:
    """Otherwise one would wait for the other's passes."""
    student = two_time_player(load_teacher(tiny_teacher("flow")), 1, None)
    times: dict[int, list[float]] = {0: [], 1: []}
    for rank, seen in times.items():
        batch = Batch(
            2, (1, 8, 8), {"class_labels": torch.arange(2)}, None, torch.device("cpu"), (0, 5, 2 * rank), total=4
        )
        note = student.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(float(args[1][0])))
        rolled_out(student, (2, 4, 8), None, batch)
        note.remove()
    assert times[0] == times[1] and 1 <= len(times[0]) <= 3
