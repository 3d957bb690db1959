"""TSCD: the exact checks hold, known mistakes are caught, it trains and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, distill, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.tscd import verify
from diffdistill.methods.tscd import TSCD, Config
from diffdistill.training.assemble import load_run, load_student_into
from diffdistill.training.checkpoint import checkpoints, load_checkpoint
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL: dict[str, Any] = {name: getattr(TSCD, name) for name in ("ends", "weights", "stage", "sampler", "segments")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "segments never merge": (TSCD, "segments", lambda self, step: self.config.stages[0]),
    "a border is of the segment below": (
        TSCD,
        "ends",
        lambda self, step, i, batch: REAL["ends"](self, step, (i + 1).clamp(max=len(self.grid) - 2), batch),
    ),
    "a stage begins a step late": (TSCD, "stage", lambda self, step: REAL["stage"](self, max(step - 1, 0))),
    "weights the other way round": (TSCD, "weights", lambda self, step: REAL["weights"](self, step)[::-1]),
    "the weight of the first stage": (TSCD, "weights", lambda self, step: REAL["weights"](self, 0)),
    "samples of the last stage": (TSCD, "stepped", lambda self, step: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


def test_a_student_is_sampled_as_its_stage_says(tiny_teacher: Teachers) -> None:
    method = TSCD(load_teacher(tiny_teacher("vp")), Config(stages=(4, 1), stage_steps=2, student_steps=3))
    assert method.whole == 4
    seen = []
    for step in range(4):
        method.after_step(step)
        sampler = method.sampler()
        seen.append((len(sampler.levels), sampler.step.name))
    assert seen == [(4, "ddim"), (4, "ddim"), (3, "renoise"), (3, "renoise")]
    method.in_steps(8)
    assert len(method.sampler().levels) == 8


def test_refusals() -> None:
    with pytest.raises(UserError, match="stages: 8,4 do not end with 1 segment; give them as 8,4,2,1"):
        Config(stages=(8, 4))
    with pytest.raises(UserError, match=r"stages: 5 segments do not divide solver_steps \(48\)"):
        Config(stages=(5, 1))


RUN = {"method": "tscd", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu", "solver_steps": 4}
OWN = {"stages": [2, 1], "stage_steps": 1}
CASES = [("vp", {**OWN, "gan_weight": 0.1}), ("edm", OWN), ("flow", {**OWN, "distance": "l2"})]
RESUMED = {"stages": [4, 2, 1], "stage_steps": 1, "gan_weight": 0.1, "guidance_scale": 2.0}


@pytest.mark.parametrize(("parameterization", "options"), CASES)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_run_whose_student_was_its_own_target_is_exported(tiny_teacher: Teachers, tmp_path: Path) -> None:
    distill(teacher=str(tiny_teacher("vp")), **RUN, **OWN, steps=2, out=tmp_path / "run")
    path = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors, _ = load_checkpoint(path)
    method: Any = load_run(tmp_path / "run")[0].method
    before = [p.clone() for p in method.target.parameters()]
    del tensors["state.target"]
    load_student_into(method, tensors, path)
    after = method.target.state_dict()
    assert any(not torch.equal(p, q) for p, q in zip(before, method.target.parameters(), strict=True))
    assert all(torch.equal(after[name], q) for name, q in tensors["student"].items())


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RESUMED, **RUN)
