"""A run folder has one trainer, and a training that is stopped says how it goes on, with a code of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.scaffold.method import Batch, Turn
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.lock import FILE, only_trainer
from diffdistill.training.trainer import Trainer

Teachers = Callable[[str], Path]
HOLDER = """
import sys, time
from pathlib import Path
from diffdistill.training.lock import only_trainer
with only_trainer(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def run(tiny_teacher: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    distill("diff_instruct", teacher=tiny_teacher("vp"), steps=2, batch_size=4, sample_every=0, out=out, device="cpu")
    return out


def test_a_second_trainer_is_refused_until_the_first_is_gone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert main(["train", "--resume", str(run), "--steps", "3"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"is being trained by process {holder.pid} on " in line and len(line) < 300
    finally:
        holder.kill()
        holder.wait()
    assert (run / FILE).is_file(), "it was killed and could not clean up"
    distill(resume=run)
    assert sorted(run.rglob("*")) == before


def test_a_new_run_is_locked_too_and_a_refused_one_leaves_no_folder(tiny_teacher: Teachers, tmp_path: Path) -> None:
    options = {"teacher": tiny_teacher("vp"), "steps": 1, "batch_size": 4, "sample_every": 0}
    with (
        only_trainer(tmp_path / "run", "out"),
        pytest.raises(UserError, match=r"^out: .*run' is being trained by process"),
    ):
        distill("diff_instruct", **options, out=tmp_path / "run")
    with pytest.raises(UserError, match="data"):
        distill("dmd2", **options, options={"gan_weight": 1.0}, out=tmp_path / "deep" / "other")
    assert not list(tmp_path.iterdir())


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")


STOPS = {"SIGINT": (130, "SIGINT"), "SIGTERM": (143, "SIGTERM"), "hours": (75, "--max-hours")}


@pytest.mark.parametrize("name", STOPS)
def test_each_stop_has_its_code_and_says_how_to_go_on(
    name: str,
    tiny_teacher: Teachers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, word = STOPS[name]
    options = ["train", "--method", "diff_instruct", "--teacher", str(tiny_teacher("vp")), "--steps", "3"]
    options += ["--batch-size", "4", "--sample-every", "0", "--device", "cpu"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    take = Trainer.take

    def stopped(self: Trainer, turn: Turn, batch: Batch) -> dict[str, Tensor]:
        if self.step == 1 and turn.player == "student" and name != "hours":
            signal.raise_signal(getattr(signal, name))
        return take(self, turn, batch)

    monkeypatch.setattr(Trainer, "take", stopped)
    capsys.readouterr()
    run = tmp_path / "run"
    assert main([*options, "--out", str(run), "--max-hours", "1e-9" if name == "hours" else "9"]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert word in last and "at step" in last and f"go on with: diffdistill train --resume {run}" in last
    assert len(checkpoints(run / "checkpoints")) == 1 and not (run / "student").exists()
    monkeypatch.undo()
    assert main(["train", "--resume", str(run), "--max-hours", "0"]) == 0
    assert all(torch.equal(weights(run)[k], v) for k, v in weights(tmp_path / "whole").items())


def test_the_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {code} " in text for code in (0, 1, 2, 75, 130, 143))


@pytest.mark.slow
def test_two_processes_train_and_judge_and_end_together(tiny_teacher: Teachers, tmp_path: Path) -> None:
    argv = ["train", "--method", "dmd2", "--teacher", str(tiny_teacher("vp")), "--data", "digits", "--steps", "4"]
    argv += ["--batch-size", "4", "--judge-every", "2", "--judge-count", "100", "--figures-every", "1"]
    argv += ["--log-every", "1", "--sample-every", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "diffdistill"]
    done = subprocess.run([sys.executable, *launch, *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nsaved ") == 1 and (tmp_path / "run" / "student").is_dir()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count('"judge/frechet distance"') == 3 and lines.count('"look/distance"') == 4
