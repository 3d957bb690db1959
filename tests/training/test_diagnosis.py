"""Early warnings, each of a run made to fail that way; and figures that leave a run's bits as they are."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffdistill import distill
from diffdistill.options import StudentOptions
from diffdistill.players.sampler import Sampler, one_step_sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Method, Outcome, Turn
from diffdistill.training.diagnosis import Diagnosis
from diffdistill.training.looks import Measures
from diffdistill.training.trainer import Interrupted, Trainer
from tests.training.test_trainer import metrics, options, same, student

Teachers = Callable[[str], Path]


class Failing(Method):
    """A student that moves all its samples to one, or to large values."""

    large = False

    def __init__(self, teacher: Teacher, config: StudentOptions):
        super().__init__(teacher, config)
        self.student = teacher.player("student")
        self.players = {"student": self.student}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> Outcome:
        x = self.sampler().one_step(batch.randn("z"), batch.cond)
        return Outcome(-x.abs().mean() if self.large else (x - x.mean(0).detach()).square().mean())

    def sampler(self) -> Sampler:
        return one_step_sampler(self.student, None)


class Alike(Failing):
    Config = StudentOptions


class Large(Failing):
    large = True
    Config = StudentOptions


RUNS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a fake score that learns nothing": ("diff_instruct", {"fake_score_lr": 1e-8}, "lagging fake score: "),
    "a student's rate too high": (
        "diff_instruct", {"student_lr": 0.1}, "learning rate too high: a step moves a weight of student"),
    "a fake score's rate too high": (
        "diff_instruct", {"fake_score_lr": 0.1}, "learning rate too high: a step moves a weight of fake_score"),
    "a rate too low": ("diff_instruct", {"student_lr": 1e-8}, "learning rate too low: all 30 steps"),
    "samples that become alike": (Alike, {"student_lr": 5e-4}, "collapse: "),
    "samples that become large": (Large, {"student_lr": 3e-4}, "saturation: "),
}  # fmt: skip


def warnings(run: Path) -> list[str]:
    return [warning for line in metrics(run) for warning in line.get("warnings", [])]


def short(method: Any, out: Path, **own: Any) -> Path:
    fit = {"steps": 30, "batch_size": 8, "log_every": 3, "figures_every": 3, "sample_every": 0, "checkpoint_every": 0}
    return distill(method, teacher="digits", out=out, device="cpu", options=own, lr_schedule="constant", **fit).folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_fails_is_warned_of(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, own, expected = RUNS[name]
    run = short(method, tmp_path / "run", **own)
    kinds = [warning.split(":")[0] for warning in warnings(run)]
    assert any(warning.startswith(expected) for warning in warnings(run)), warnings(run)
    assert len(kinds) == len(set(kinds)), "each once"
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step ")]
    assert [line.split(": ", 2)[2] for line in printed] == warnings(run) and max(map(len, printed)) < 300


def test_nothing_is_said_of_a_run_that_goes_well(tmp_path: Path) -> None:
    run = short("dmd2", tmp_path / "run", gan_weight=0.0, guidance_scale=1.0)
    assert not warnings(run)
    last = [line for line in metrics(run) if "look/distance" in line][-1]
    assert last["look/distance"] < 0.5 and 0.5 < last["fake_score/lag"] < 0.97 and last["student/step_size"] > 0


def test_a_judged_run_that_stops_improving_is_warned_of(tiny_teacher: Teachers, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rates = {"student_lr": 1e-30, "fake_score_lr": 1e-30}
    distill(**options(tiny_teacher("vp"), run, steps=8, sample_every=0, judge_every=1, judge_count=100, **rates))
    (warning,) = warnings(run)
    assert warning.startswith("no longer improving: the best judging is of step 1, 5 judgings ago")


def test_a_run_that_comes_no_nearer_is_warned_of() -> None:
    healthy = Measures(1.0, 1.0, 1.0, 1.0, 0.3, 0.5)

    def said(distances: Sequence[float]) -> list[str]:
        diagnosis = Diagnosis(10_000, healthy)
        lines = [{"step": 10 * k, **{f"look/{n}": v for n, v in healthy._replace(distance=d)._asdict().items()}}
                 for k, d in enumerate(distances, 1)]  # fmt: skip
        return [warning for line in lines for warning in diagnosis.add(line)]

    assert not said([1 / k for k in range(1, 60)])
    (warning,) = said([max(1 / k, 0.1) for k in range(1, 60)])
    assert warning.startswith("no longer improving: samples have come no nearer to the teacher's since step 100 of 200")


def test_figures_leave_the_bits_as_they_are_and_a_resumed_run_warns_as_the_whole_one(
    tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = {"log_every": 1, "sample_every": 0, "checkpoint_every": 0, "student_lr": 0.3}

    def run(name: str, **more: Any) -> Path:
        distill(**options(tiny_teacher("vp"), tmp_path / name, **fit, **more))
        return tmp_path / name

    plain, whole = run("plain", figures_every=0), run("whole", figures_every=1)
    assert same(student(plain), student(whole)) and warnings(whole)
    monkeypatch.setattr(Trainer, "began", property(lambda self: -math.inf, lambda self, value: None), raising=False)
    for k in range(5):
        with pytest.raises(Interrupted):
            run("stopped", figures_every=1, max_hours=1.0) if k == 0 else distill(resume=tmp_path / "stopped")
    distill(resume=tmp_path / "stopped")
    assert same(student(whole), student(tmp_path / "stopped"))
    assert json.dumps(metrics(whole)) == json.dumps(metrics(tmp_path / "stopped"))


def test_figures_are_those_of_a_teacher_in_half_precision_too(tiny_teacher: Teachers, tmp_path: Path) -> None:
    own = options(tiny_teacher("vp"), tmp_path / "run", steps=2, sample_every=0, figures_every=2, log_every=2)
    distill(**own, teacher_dtype="bfloat16")
    assert 0.8 < metrics(tmp_path / "run")[0]["fake_score/lag"] < 1.2
