"""The benchmark of strangers' teachers, tiny: it makes, trains and judges, goes on, and writes its page."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffdistill.commands.cli import main
from diffdistill.eval.benchmarks import strangers
from diffdistill.eval.report import WRITTEN
from diffdistill.families import load_teacher


def test_a_tiny_benchmark_goes_on_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str], settings: strangers.Settings) -> float:  # here, which saves the imports
        assert main([*arguments, "--device", "cpu"]) == 0
        return 1.0

    monkeypatch.setattr(strangers, "_run", run)
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (40, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", train_images=images, test_images=images[::-1])
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"before\n{WRITTEN[0]}\nnothing yet\n{WRITTEN[1]}\nafter\n")
    command = ["--images", str(tmp_path / "tiny.npz"), "--teachers", "edm", "--methods", "dmd", "--threads", "1"]
    command += ["--widths", "8,8", "--teacher-steps", "2", "--steps", "1", "--pairs", "64"]
    command += ["--count", "12", "--out", str(out)]
    assert strangers.main([*command, "--docs", str(page)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    models = ["teacher, 8 steps", "teacher, 50 steps", "dmd"]
    assert [(row["teacher"], row["model"]) for row in rows] == [("edm", model) for model in models]
    assert all(row["frechet distance"] > 0 for row in rows)
    low, high = map(float, rows[2]["95% of it"].split(" to "))
    assert low < rows[2]["to 8 steps"] < high and low > 0
    assert {row["ahead"] for row in rows if row["model"] == "dmd"} <= {"yes", "no"}
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "nothing yet" not in text
    assert "| edm | dmd | 1 |" in text and page.with_suffix(".png").is_file()
    made = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    assert strangers.main([*command, "--methods", "sid,dmd", "--judge-only"]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    assert json.loads((out / "results.json").read_text())["rows"] == rows


def test_the_teachers_are_stock_pipelines(tmp_path: Path) -> None:
    np.savez(tmp_path / "tiny.npz", train_images=np.zeros((8, 8, 8), dtype=np.uint8))
    settings = strangers.Settings(str(tmp_path / "tiny.npz"), tmp_path, widths=(8, 8), teacher_steps=2)
    predicted = {kind: load_teacher(strangers.make_teacher(kind, settings)) for kind in ("ddpm", "flow", "edm")}
    rows = {"ddpm": "epsilon", "flow": "flow_prediction", "edm": "edm"}
    assert {kind: teacher.denoiser.output.name for kind, teacher in predicted.items()} == rows
    assert predicted["ddpm"].scheduler["clip_sample"]


def test_steps_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str], settings: strangers.Settings, silent: bool = False) -> float:
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True)
        lines = [{"step": 2, "seconds_per_step": 9.0}, *({"step": i, "seconds_per_step": 0.5} for i in (4, 6, 8))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0.0

    monkeypatch.setattr(strangers, "_run", run)
    assert strangers.fitting_steps([], 100, strangers.Settings("x", tmp_path)) == 190
