"""A short run of tests/killed_at_random.py: what it compares is the same after kills, judgings and stages too."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.killed_at_random import content

SCRIPT = Path(__file__).parents[1] / "killed_at_random.py"


@pytest.mark.slow
def test_killed_trainings_end_as_whole_ones() -> None:
    argv = [sys.executable, str(SCRIPT), "--methods", "dmd2,progressive", "--kills", "2", "--judge-every", "4"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "4 kills of 2 methods: 0 parts differ" in done.stdout, done.stdout + done.stderr


def test_what_is_compared(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "step-00000002" / "student.optimizer.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds_per_step": 0.1, "loss": 2.0}\n')
    (tmp_path / "looks.jsonl").write_text("")
    before = content(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds_per_step": 0.2, "loss": 2.0}\n')
    assert content(tmp_path) == before, "but for times"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    file.write_bytes(b"2")
    assert [name for name, value in content(tmp_path).items() if before[name] != value] == [
        "checkpoints/step-00000002/student.optimizer.safetensors",
        "metrics.jsonl:1",
    ]
