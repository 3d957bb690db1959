"""`eval`, `compare`, `speed`, `sample` and `bench`: the same device, threads, seed and out, from a shell and Python."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffdistill
from diffdistill import compare, distill, evaluate, load_student, load_teacher, sample, speed
from diffdistill.commands.cli import main

COMMANDS = {
    "eval": ["eval", "digits", "--teacher-steps", "1", "--count", "100", "--bootstrap", "0"],
    "compare": ["compare", "digits", "digits", "--steps", "1", "--count", "100", "--bootstrap", "0"],
    "speed": ["speed", "digits", "--teacher-steps", "1", "--repeats", "1", "--batch-sizes", "1"],
    "sample": ["sample", "digits", "--steps", "1", "--count", "2"],
    "bench": ["bench", "--methods", "dmd2:digits", "--budget", "1"],
}


@pytest.fixture(scope="module")
def run(tiny_teacher: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a student of an untrained teacher."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options: dict[str, Any] = {"steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    distill("dmd2", teacher=tiny_teacher("vp"), out=folder, **options)
    return folder


@pytest.mark.parametrize("command", [*COMMANDS])
def test_a_gpu_that_is_not_there_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*COMMANDS[command], "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    message = "device: 'cuda' was asked for and torch sees no GPU; use --device cpu or auto"
    assert capsys.readouterr().err == f"diffdistill: {message}\n"


@pytest.mark.parametrize("command", ["eval", "compare", "speed", "sample"])
def test_no_command_chooses_a_device_by_itself(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch says that there is a GPU, which here cannot be used, the CPU does as it is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda n, own=torch.set_num_threads: (threads_set.append(n), own(n)))
    threads_set: list[int] = []
    try:
        assert main([*COMMANDS[command], "--device", "cpu", "--threads", "3", "--out", str(tmp_path / "out")]) == 0
        assert threads_set == [3]
    finally:
        torch.set_num_threads(threads)


def test_the_seed_is_that_of_the_images(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "count": 100, "device": "cpu"}
    zero, one = (sample("digits", seed=seed, **options).images for seed in (0, 1))
    assert torch.equal(zero, sample("digits", **options).images) and not torch.equal(zero, one)
    judged = {
        seed: evaluate("digits", protocol="digits", seed=seed, out=tmp_path / str(seed), bootstrap=0, **options).rows
        for seed in (0, 1)
    }
    assert judged[0][0]["frechet distance"] != judged[1][0]["frechet distance"]


def test_a_teacher_s_folder_stays_as_it_is(
    tiny_teacher: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = Path(shutil.copytree(tiny_teacher("vp"), tmp_path / "models" / "mine"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*")}
    for more in ([], ["--protocol", "digits", "--steps", "2"]):
        assert main(["eval", str(teacher), "--count", "100", "--bootstrap", "0", *more]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*")} == before
    assert (tmp_path / "runs" / "eval" / "mine" / "comparison.png").is_file()
    assert (tmp_path / "runs" / "eval" / "mine" / "digits-2steps" / "samples.png").is_file()


def test_a_student_is_judged_in_its_run_and_on_its_card(
    run: Path, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    result = evaluate(run / "student", count=100, teacher_steps=[1, 2], bootstrap=0)
    assert result.out == run / "eval" and (run / "eval" / "results.json").is_file()
    assert [(row["model"], row["steps"]) for row in result.rows] == [("teacher", 1), ("teacher", 2), ("student", 1)]
    again = evaluate(run, count=100, teacher_steps=[1, 2], bootstrap=0)  # from what was measured
    assert [{**row, "ms per image": 0} for row in again.rows] == [{**row, "ms per image": 0} for row in result.rows]
    card = (run / "student" / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "| student |" in card and "not FID" in card
    mine = Path(shutil.copytree(run / "student", tmp_path / "mine"))
    (mine / "README.md").write_text("my own words")
    evaluate(mine, teacher=tiny_teacher("vp"), count=100, teacher_steps=[1], bootstrap=0, out=tmp_path / "out")
    assert (mine / "README.md").read_text() == "my own words", "what lies outside of a run is somebody's own"


def test_loaded_models_are_judged_as_their_folders_are(
    run: Path, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, shared = tiny_teacher("vp"), {"count": 100, "bootstrap": 0}
    teacher, student = load_teacher(folder), load_student(run / "student")
    both: dict[str, Any] = {"teacher_steps": [1, 2], **shared}
    of_folders = evaluate(run, out=tmp_path / "a", **both).rows
    of_objects = evaluate(student, teacher=teacher, out=tmp_path / "b", **both).rows
    assert [row["frechet distance"] for row in of_objects] == [row["frechet distance"] for row in of_folders]
    result = compare([teacher, student, run], steps=2, out=tmp_path / "c", **shared)  # type: ignore[arg-type]
    assert [row["frechet distance"] for row in result.rows[1:]] == [of_folders[2]["frechet distance"]] * 2
    assert [row["steps"] for row in result.rows] == [2, 1, 1]
    assert {d["difference"] for d in result.differences if d["model"] == "loaded"} == set()
    assert torch.equal(sample(student, count=4).images, sample(run, count=4).images)
    options: dict[str, Any] = {"repeats": 1, "batch_sizes": [1], "teacher_steps": 3}
    rows = speed([teacher, student], out=tmp_path / "d", **options).rows
    assert [(row["model"], row["passes"]) for row in rows] == [("loaded teacher", 3), ("loaded student", 1)]
    assert len(speed(student, out=tmp_path / "e", **options).rows) == 1


def test_a_prompt_with_a_comma_is_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(diffdistill.UserError, match="takes no prompts"):
        sample("digits", prompt="a round, red thing")
    from diffdistill.config import SampleConfig
    from diffdistill.options import build

    assert build(SampleConfig, {"model": "m", "prompt": "a round, red thing"}).prompt == ("a round, red thing",)


def test_one_seed_or_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMANDS["bench"], "--seed", "1", "--seeds", "0,1", "--out", str(tmp_path)]) == 2
    assert "seed: 1 was given beside seeds" in capsys.readouterr().err
