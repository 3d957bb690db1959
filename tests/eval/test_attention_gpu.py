"""The GPU benchmark of attention, on a CPU, where tiles stand for the kernels. No time is asserted."""

import json
from pathlib import Path

import pytest

from diffdistill.eval.benchmarks.attention_gpu import COLUMNS, main


def test_a_small_run_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    small = ["--lengths=33,64", "--widths=40", "--heads=2", "--dtype=bf16", "--count=1", "--tiny", "--device=cpu"]
    assert main([*small, "--out", str(out)]) == 0
    *rows, ours, math = json.loads(out.read_text())["rows"]
    assert [(row["length"], row["width"]) for row in rows] == [(33, 40), (64, 40)]
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert 0 < row["error of output"] < 5e-3 and 0 < row["error of tangent"] < 5e-3
        assert row["jvp-flash-attention ms"] is None
        assert row["MB"] > 0 and row["times plain"] == row["ours ms"] / row["plain ms"]
    assert (ours["work"], math["work"]) == ("sCM iteration of a DiT, ours", "sCM iteration of a DiT, MATH")
    assert ours["length"] == 16 and "| times plain |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--lengths=0", "--widths=wide", "--heads=0", "--count=0"])
def test_what_cannot_be_run_is_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong, "--device=cpu", "--out", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.startswith(wrong.strip("-").split("=")[0] + ":")
