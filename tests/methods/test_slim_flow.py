"""SlimFlow: the exact checks hold, known mistakes are caught, it trains from pairs in both stages, and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import slim_flow
from diffdistill.methods.checks.slim_flow import verify
from diffdistill.methods.slim_flow import Config, SlimFlow
from tests.methods.short_runs import same_when_resumed, trains, with_pairs

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(SlimFlow, name) for name in ("line", "beta", "guide", "after_step", "velocities")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "beta rises": (SlimFlow, "beta", lambda self, step: 1 - REAL["beta"](self, step)),
    "beta is squared": (SlimFlow, "beta", lambda self, step: REAL["beta"](self, step) ** 2),
    "the noise grows": (slim_flow, "annealed", lambda z, fresh, beta: z + beta * fresh),
    "the line's end is the pair's noise": (
        SlimFlow,
        "line",
        lambda self, step, batch: REAL["line"](self, step, batch)._replace(eps=batch.pair.z),
    ),
    "the velocity's sign": (
        SlimFlow,
        "velocities",
        lambda self, *at: (lambda u: (u[0], -u[1]))(REAL["velocities"](self, *at)),
    ),
    "the guide says where it was asked": (SlimFlow, "guide", lambda self, x, z, batch: x.detach()),
    "the guide is the teacher": (SlimFlow, "reflowed", property(lambda self: self.teacher)),
    "the guide's times are the other way round": (slim_flow, "MIDDLE", (0.8, 0.2)),
    "the guide is what the student began as": (
        SlimFlow,
        "after_step",
        lambda self, step: self.stage.done.fill_(step + 1) and None,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_a_student_takes_one_step_after_both_stages_and_any_number_without_the_second(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("flow"))
    method = SlimFlow(teacher, Config(reflow_steps=3, distill_steps=2))
    assert method.whole == 5
    with pytest.raises(UserError, match="student_steps: this student is trained for 1 steps and no others"):
        method.in_steps(7)
    method = SlimFlow(teacher, Config(distill_steps=0))
    method.in_steps(7)
    assert len(method.sampler().levels) == 7 and method.whole is None


RUN = {"method": "slim_flow", "batch_size": 4, "sample_every": 0, "device": "cpu"}
STAGES = {"anneal_steps": 2, "reflow_steps": 1, "distill_steps": 1}


@pytest.fixture
def pairs(tiny_teacher: Teachers, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    return lambda kind: with_pairs(tmp_path, tiny_teacher(kind))


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, pairs: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    trains(tmp_path, **pairs(parameterization), **RUN, **STAGES)


def test_a_resumed_run_has_the_same_bits(pairs: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    same_when_resumed(tmp_path, **pairs("vp"), **RUN, anneal_steps=4, reflow_steps=2, distill_steps=2)
