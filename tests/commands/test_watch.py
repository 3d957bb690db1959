"""The terminal view of a run: what it draws of files as a training leaves them, and of damaged ones."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from diffdistill import UserError
from diffdistill.commands.cli import main
from diffdistill.commands.watch import sparkline, view
from diffdistill.training.lock import FILE


def run_of(folder: Path, lines: list[dict[str, Any]], steps: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"method: dmd2\nteacher: digits\nsteps: {steps}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "seconds_per_step": 6.0, "peak_memory_mb": 512.0, "student/gap": step / 10, **values}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [line(k, **({"warnings": ["collapse: alike"]} if k == 20 else {})) for k in (10, 20, 30, 40)]
    run = run_of(tmp_path / "run", [*lines, {"step": 40, "judge/it": 3.5, "judge/best step": 30}])
    (run / "looks.jsonl").write_text(json.dumps({"step": 10, "faults": ["noise: rough"]}) + "\n")
    return run


def test_a_run_is_drawn(run: Path) -> None:
    lines, done = view(run, 80)
    text = "\n".join(lines)
    assert not done and f"{run}: dmd2, digits"[:77] in text
    assert "step 40 of 100 (40%), 6 s a step, 6 min left, 512 MiB at most" in text
    assert "judged best at step 30" in text and "no process trains it now" in text
    (gap,) = [row for row in lines if row.startswith("student/gap")]
    assert gap.split() == ["student/gap", "4", "▁▃▆█", "1", "..", "4"]
    assert lines[-3:] == ["warnings:", "  step 10: noise: rough", "  step 20: collapse: alike"]
    assert max(map(len, lines)) <= 80 and not any("seconds_per_step" in row for row in lines)


def test_who_trains_it(run: Path) -> None:
    for pid, host, expected in [
        (os.getpid(), socket.gethostname(), f"trained by process {os.getpid()} on "),
        (1, "elsewhere", "trained by process 1 on elsewhere"),
        (2**22 + 1, socket.gethostname(), "no process trains it now"),  # above the largest number of a process
    ]:
        (run / FILE).write_text(json.dumps({"pid": pid, "host": host}))
        assert any(row.startswith(expected) for row in view(run, 200)[0])
    (run / FILE).write_text("{")
    assert "no process trains it now" in view(run, 80)[0]


def test_the_command_draws_once_or_until_it_is_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run), "--once", "--only", "judge/"]) == 0
    text = capsys.readouterr().out
    assert "judge/it" in text and "student/gap" not in text
    run_of(run, [line(100)])
    assert main(["watch", str(run)]) == 0, "it is done, and so is the view"
    assert "step 100 of 100 (100%)" in capsys.readouterr().out
    assert main(["watch", str(run), "--once", "--only", "fid"]) == 2
    assert "only: no curve begins with 'fid'; they are student/gap" in capsys.readouterr().err


def test_what_is_no_run_or_has_begun_just_now(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        view(tmp_path, 80)
    assert any("no line in its metrics.jsonl yet" in row for row in view(run_of(tmp_path / "run", []), 80)[0])


def test_odd_values_are_passed_over(tmp_path: Path) -> None:
    odd = [line(1, a="text", b=None, c=float("nan"), warnings="no list"), line(2, c=1.0, d=True, warnings=[3, "x\ny"])]
    run = run_of(tmp_path / "run", odd, steps=0)
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"\xff\n{\n[1]\n")
    text = "\n".join(view(run, 80)[0])
    assert "step 2: x y" in text and "text" not in text


def test_a_sparkline() -> None:
    assert sparkline([0.0, 7.0], 10) == "▁█" and sparkline([2.0, 2.0], 10) == "▁▁"
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█" and sparkline([0.0, 1.0], 9, "_#") == "_#"
    assert len(sparkline([float(k) for k in range(1000)], 33)) == 33
