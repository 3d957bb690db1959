"""The benchmark of attention: its accounting of memory is exact, and ours is small and linear. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from diffdistill.eval.benchmarks.attention import COLUMNS, exponent, main, measure, peak_mb, product

MB = 2**20


def test_the_peak_is_the_most_that_was_held_at_once() -> None:
    before = torch.empty(64 * MB, dtype=torch.uint8)  # held all along, so it counts for nothing

    def work() -> torch.Tensor:
        a = torch.empty(1 * MB, dtype=torch.uint8)
        b = torch.empty(2 * MB, dtype=torch.uint8)
        del a
        c = torch.empty(4 * MB, dtype=torch.uint8)
        del b, c
        return torch.empty(5 * MB, dtype=torch.uint8)

    assert peak_mb(work) == 6
    assert peak_mb(before.zero_) == 0
    assert peak_mb(before.clone) == 64


def test_plain_products_hold_whole_matrices_and_ours_do_not() -> None:
    """Of 2 x 1024 x 1024 float32, 8 MB each; the targets that the documentation states."""
    rows = {length: measure(length, 2, 64, 1, length == 1024, False, 0) for length in (1024, 2048, 4096)}
    row = rows[1024]
    assert row["MATH MB"] >= 4 * 8
    assert row["of MATH's"] == row["ours MB"] / row["MATH MB"] <= 0.6
    assert row["relative difference"] < 1e-5
    assert exponent(list(rows), [r["ours MB"] for r in rows.values()]) < 1.15
    parts, tangents = ([torch.randn(1, 2, 4096, 64) for _ in range(3)] for _ in range(2))
    assert peak_mb(lambda: product("ours", parts, tangents)) <= 0.5 * 4 * 2 * 64


def test_the_exponent_of_known_powers() -> None:
    assert exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert exponent([10, 20, 40], [5, 20, 80]) == pytest.approx(2)


def test_a_small_run_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    assert main(["--lengths", "64,32", "--math-up-to", "32", "--pairs", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(row["pass"], row["length"]) for row in report["rows"]] == [
        ("output and tangent", 32), ("output and tangent", 64), ("with gradients", 32), ("with gradients", 64),
    ]  # fmt: skip
    assert set(report["rows"][0]) == set(COLUMNS)
    assert "MATH MB" not in report["rows"][1]
    assert report["summary"].startswith("The peak beyond the inputs grows as: output and tangent, ours: L^")
    assert report["options"]["seed"] == 0 and report["environment"]["torch"] == torch.__version__
    assert "| of MATH's |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--lengths=0,5", "--lengths=long", "--heads=0", "--pairs=0"])
def test_what_cannot_be_run_is_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong, "--out", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.startswith(wrong.strip("-").split("=")[0] + ":")
    assert not (tmp_path / "a.json").exists()
