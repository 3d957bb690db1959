"""A student judged while it is trained: the best is kept and exported, and the training's bits are as without."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffdistill import UserError, distill, evaluate, export
from diffdistill.commands.in_training import JudgedInTraining, counted
from diffdistill.eval.protocol import load
from diffdistill.families import read_record
from diffdistill.training.checkpoint import checkpoints, load_checkpoint
from diffdistill.training.trainer import Interrupted, Trainer
from tests.training.test_trainer import TwoPlayers, metrics, options, same, student, trainer_of

Teachers = Callable[[str], Path]


def judged(teacher: Path, out: Path, **more: Any) -> dict[str, Any]:
    return options(teacher, out, **{"sample_every": 0, "judge_every": 2, "judge_count": 100, **more})


@pytest.fixture(scope="module")
def whole(tiny_teacher: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    distill(**judged(tiny_teacher("vp"), out, export_best=False))
    return out


def values(run: Path) -> dict[int, float]:
    return {line["step"]: line["judge/frechet distance"] for line in metrics(run) if "judge/frechet distance" in line}


def test_it_is_judged_as_eval_judges_it_and_trains_to_the_same_bits(
    whole: Path, tiny_teacher: Teachers, tmp_path: Path
) -> None:
    assert list(values(whole)) == [0, 2, 4, 6]
    distill(**options(tiny_teacher("vp"), tmp_path / "run", sample_every=0))
    assert same(student(whole), student(tmp_path / "run"))
    losses = [line for line in metrics(whole) if "student/loss" in line]
    assert losses == [line for line in metrics(tmp_path / "run") if "student/loss" in line]
    score = evaluate(whole, protocol="digits", count=100, threads=0, out=tmp_path / "eval").rows[0]
    assert score["frechet distance"] == pytest.approx(values(whole)[6], rel=1e-5)
    assert not [path for path in whole.iterdir() if path.name.startswith(".")], "nothing is left of it"


def test_a_stopped_run_is_judged_to_the_same_bits(
    whole: Path, tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "began", property(lambda self: -math.inf, lambda self, value: None), raising=False)
    with pytest.raises(Interrupted):
        distill(**judged(tiny_teacher("vp"), tmp_path / "run", export_best=False, max_hours=1.0, checkpoint_every=0))
    monkeypatch.undo()
    distill(resume=tmp_path / "run", max_hours=0.0, checkpoint_every=2)
    assert same(student(whole), student(tmp_path / "run")) and metrics(whole) == metrics(tmp_path / "run")
    tensors = [load_checkpoint(checkpoints(run / "checkpoints")[-1]) for run in (whole, tmp_path / "run")]
    assert tensors[0][1]["best"] == tensors[1][1]["best"] is not None


def test_the_best_is_kept_and_exported(
    tiny_teacher: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = JudgedInTraining.__call__
    monkeypatch.setattr(JudgedInTraining, "__call__", lambda self, step: (call(self, step)[0], float(step)))
    run = tmp_path / "run"
    distill(**judged(tiny_teacher("vp"), run, steps=8, keep_checkpoints=1, checkpoint_every=4))
    assert "the student is that of step 2, the best that was judged (2)" in capsys.readouterr().out
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000008"]
    assert getattr(read_record(run / "student"), "step") == 2  # noqa: B009
    best = student(run)
    export(run)
    assert not same(best, student(run)), "that of the last"
    export(run, best=True)
    assert same(best, student(run))
    with pytest.raises(UserError, match="best: --step 8 names another"):
        export(run, best=True, step=8)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with pytest.raises(UserError, match="the checkpoint of step 2, which was the best, is gone"):
        export(run, best=True)


class Told:
    every = 1

    def __init__(self, values: list[float], lower: bool):
        self.values, self.lower = values, lower

    def __call__(self, step: int) -> tuple[dict[str, float], float | None]:
        return {"judge/it": self.values[step]}, self.values[step]


@pytest.mark.parametrize("lower, best", [(True, 3), (False, 4)])
def test_the_best_is_the_lowest_distance_or_the_highest_score(lower: bool, best: int, tmp_path: Path) -> None:
    trainer = trainer_of(TwoPlayers(), tmp_path, steps=5, checkpoint_every=0, keep_checkpoints=1)
    trainer.judge = Told([0.0, 5.0, math.nan, 1.0, 9.0, 3.0] if lower else [9.0, 5.0, math.nan, 1.0, 9.0, 3.0], lower)
    trainer.fit()
    assert trainer.best is not None and trainer.best[0] == best
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-{k:08d}" for k in (best, 5)]
    again = trainer_of(TwoPlayers(), tmp_path, steps=5)
    again.resume()
    assert again.best == trainer.best


def test_which_value_counts() -> None:
    assert counted(load("digits"), None) == ("frechet distance", True)
    assert counted(load("shapes"), None) == ("colour %", False)
    assert counted(load("digits"), "class agreement %") == ("class agreement %", False)
    with pytest.raises(UserError, match="judge_by: 'fid' is no value of digits; they are frechet"):
        counted(load("digits"), "fid")
