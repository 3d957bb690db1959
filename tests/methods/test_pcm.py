"""PCM: the exact checks hold, known mistakes are caught, it trains, resumes and is exported to a stock scheduler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.pcm import verify
from diffdistill.methods.pcm import PCM, Config
from diffdistill.players import scale_input
from diffdistill.scaffold.adversary import EdgeAdversary
from diffdistill.scaffold.segments import Jump, SegmentMethod
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {
    **{name: getattr(PCM, name) for name in ("ends", "following", "less_noisy", "sampler")},
    **{name: getattr(EdgeAdversary, name) for name in ("logits", "turn", "level")},
    "jump": SegmentMethod.jump,
    "guide": scale_input.guide,
}


def swapped(self: PCM, x_t: Tensor, x_r: Tensor, at: Jump, *rest: Any) -> Any:
    return REAL["following"](self, x_r, x_t, at._replace(t=at.r, r=at.t), *rest)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "to zero, whatever the phase": (
        PCM,
        "ends",
        lambda self, *at: (lambda top, e: (top, 0 * e))(*REAL["ends"](self, *at)),
    ),
    "a step at an edge is of the next phase": (
        PCM,
        "ends",
        lambda self, step, i, batch: REAL["ends"](self, step, (i + 1).clamp(max=len(self.grid) - 2), batch),
    ),
    "the gradient goes through the less noisy point": (PCM, "following", swapped),
    "f is x0": (SegmentMethod, "jump", lambda self, net, x, t, e, cond: net(x, t, cond).x0),
    "x_r is not at its edge": (SegmentMethod, "jump", lambda self, net, x, t, e, cond: net(x, t + 0.1, cond).at(e)),
    "the teacher is guided by w": (scale_input, "guide", lambda *at: REAL["guide"](*at[:-1], at[-1] - 1)),
    "noised as if clean": (
        EdgeAdversary,
        "logits",
        lambda self, x, e, *rest: REAL["logits"](self, x, 0 * e, *rest),
    ),
    "noise above the phase": (
        EdgeAdversary,
        "level",
        lambda self, stream, e, top, batch: REAL["level"](self, stream, e, top + 0.3, batch),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_edges_are_where_it_is_sampled(parameterization: str, tiny_teacher: Teachers) -> None:
    method = PCM(load_teacher(tiny_teacher(parameterization)), Config(solver_steps=12, phases=4))
    levels = method.sampler().levels
    assert len(levels) == 4
    edges = {float(method.schedule.angle(level)) for level in levels[1:]} | {0.0}
    i = torch.arange(12)
    assert set(method.ends(0, i, None)[1].tolist()) == edges  # type: ignore[arg-type]


def test_refusals(tiny_teacher: Teachers) -> None:
    with pytest.raises(UserError, match="solver_steps: 50 do not divide into 4 phases; say 48"):
        Config(solver_steps=50, phases=4)
    with pytest.raises(UserError, match=r"guidance_spread: 2.0 leads below 0 from guidance_scale \(1.0\)"):
        Config(guidance_spread=2.0)
    teacher = load_teacher(tiny_teacher("vp"))
    teacher.denoiser.null = None
    with pytest.raises(UserError, match=r"teacher: guidance_scale 2 \(1 is none\) needs one that was trained with"):
        PCM(teacher, Config(guidance_scale=2.0))


RUN = {"method": "pcm", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "solver_steps": 4}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [("vp", {"phases": 2, "gan_weight": 0.1}), ("edm", {"phases": 4}), ("flow", {"phases": 1, "distance": "l2"})],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    options = {"phases": 2, "gan_weight": 0.1, "guidance_scale": 2.0, "guidance_spread": 0.5}
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **options, **RUN)
