"""The throughput benchmark: both sides do the same work, and it says what it measured. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from diffdistill.eval.benchmarks import throughput
from diffdistill.eval.benchmarks.throughput import COLUMNS, main, our_distance, their_distance, two_sets
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.moments import statistics


def test_both_distances_are_equal_and_those_of_the_whole_sets() -> None:
    real, fake = two_sets(300, 24)
    expected = frechet_distance(statistics(fake), statistics(real))
    assert expected > 0.01
    assert our_distance(real, fake, 7) == pytest.approx(expected, rel=1e-11)
    assert their_distance(real, fake, 7) == pytest.approx(expected, rel=1e-9)


def test_a_small_run_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "throughput.json"
    small = {"images": 2, "batch-size": 1, "size": 32, "rows": 400, "width": 32, "feature-batch": 16, "pairs": 2}
    assert main([f"--{name}={value}" for name, value in (small | {"out": out}).items()]) == 0
    report = json.loads(out.read_text())
    features, distance = report["rows"]
    assert set(features) == set(distance) == set(COLUMNS)
    assert distance["work"] == "distance of 2 x 400 x 32 features in batches of 16"
    assert distance["relative difference"] < 1e-9
    assert features["relative difference"] < 1e-4
    for row in report["rows"]:
        assert 0 < row["from"] <= row["times as fast"] <= row["to"]
    assert report["environment"]["torch"] == torch.__version__ and report["options"]["rows"] == 400
    assert "| times as fast |" in capsys.readouterr().out


def test_parts_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure_features", None)
    assert main(["--images", "0", "--rows", "50", "--width", "4", "--out", str(tmp_path / "a.json")]) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("--images 3 --batch-size 4", "images: 3"), ("--rows 1", "rows: 1"), ("--pairs 0", "pairs: 0")],
)
def test_what_cannot_be_run_is_refused(wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*wrong.split(), "--out", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "a.json").exists()
