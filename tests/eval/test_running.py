"""The benchmark of what a run takes beside its training."""

import json
from pathlib import Path

import pytest

from diffdistill.eval.benchmarks import running


@pytest.mark.slow
def test_a_small_run_says_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "running.json"
    small = ["--methods", "consistency", "--widths", "8,16", "--layers", "1", "--steps", "20", "--rounds", "1"]
    running.main([*small, "--out", str(out)])
    figures, checkpoint, *processes = json.loads(out.read_text())["rows"]
    assert figures["what"] == "figures" and figures["against"] == "40 steps of 32 samples"
    assert checkpoint["what"] == "a checkpoint of 0 MiB" and checkpoint["their seconds"] == 300
    for row in (figures, checkpoint):
        assert row["ratio"] == pytest.approx(row["seconds"] / row["their seconds"])
    for row in processes:  # where there are two cores
        assert row["ratio"] == pytest.approx(2 * row["seconds"] / row["their seconds"])
