"""docs/performance.md holds what was measured, and says of the rest that it was not."""

import json
from pathlib import Path

import pytest

from diffdistill.environment import environment
from diffdistill.eval.benchmarks import performance


def test_it_prints_no_figure_that_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no runs
    rows = [{"players": "lora", "peak MB": 12.5}]
    made = {"rows": rows, "columns": ["players", "peak MB"], "environment": environment()}
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "memory.json").write_text(json.dumps(made))
    assert performance.main(["--only", "speed", "--folder", "kept", "--out", "p.md"]) == 0
    text = (tmp_path / "p.md").read_text()
    assert "| lora | 12.50 |" in text and str(environment()["commit"])[:10] in text
    assert "was not measured here: it takes runs/demo, which `make demo`" in text
    for benchmark in performance.BENCHMARKS:
        assert f"## {benchmark.title}" in text and benchmark.command in text
    assert text.count("\n| ---") == 1  # one table: what was measured


def test_a_section_of_the_page_stays_where_no_rows_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows, its command and its commit, while the section beside it is written anew, with its summary."""
    monkeypatch.chdir(tmp_path)
    made = {"columns": ["a"], "environment": environment()}
    for name in ("overhead", "attention"):
        (tmp_path / f"{name}.json").write_text(json.dumps(made | {"rows": [{"a": 1}]}))
    assert performance.main(["--only", "", "--folder", ".", "--out", "p.md"]) == 0
    before = (tmp_path / "p.md").read_text()
    (tmp_path / "overhead.json").unlink()
    assert performance.main(["--only", "", "--folder", ".", "--out", "p.md"]) == 0
    assert (tmp_path / "p.md").read_text() == before
    (tmp_path / "attention.json").write_text(json.dumps(made | {"rows": [{"a": 2}], "summary": "It grows."}))
    assert performance.main(["--only", "", "--folder", ".", "--out", "p.md"]) == 0
    after = (tmp_path / "p.md").read_text()
    assert after.count("| 1 |") == 1 and after.count("| 2 |") == 1 and "It grows.\n" in after


def test_a_benchmark_that_fails_keeps_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"rows": [{"a": 1}], "columns": ["a"], "environment": environment()}
    (tmp_path / "overhead.json").write_text(json.dumps(made))
    failing = performance.Benchmark("overhead", "O", ("diffdistill.eval.benchmarks.overhead", "--no-such"), "")
    monkeypatch.setattr(performance, "BENCHMARKS", (failing,))
    assert performance.main(["--folder", ".", "--out", "p.md"]) == 1
    assert "not measured, it failed with exit code 2" in capsys.readouterr().err
    assert "| 1 |" in (tmp_path / "p.md").read_text()


def test_an_unknown_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--only", "quality", "--folder", str(tmp_path)]) == 2
    assert "'quality' is no benchmark" in capsys.readouterr().err
