"""What is kept is what was saved: damage in a run folder is found, and a changed run is not taken for the old one."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from diffdistill import UserError, distill
from diffdistill.commands.cli import main
from diffdistill.training.checkpoint import checkpoints, load_checkpoint, load_newest, remove_old

Teachers = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path, Path], Any]
NEWEST, BEFORE = "step-00000004", "step-00000002"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    for label in range(10):
        (folder / str(label)).mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / str(i % 10) / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def whole(tiny_teacher: Teachers, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    teacher = shutil.copytree(tiny_teacher("vp"), root / "teacher")
    options: dict[str, Any] = {"gan_weight": 0.1, "student_lr": 1e-3, "update_ratio": 1}
    fit: dict[str, Any] = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "sample_every": 0}
    distill(teacher=teacher, data=data, out=root / "run", device="cpu", options=options, **fit)
    return root


@pytest.fixture
def run(whole: Path, data: Path, tmp_path: Path) -> Path:
    """A copy of the run whose teacher and data are its own."""
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copytree(data, tmp_path / "data")
    out = tmp_path / "whole" / "run"
    config = yaml.safe_load((out / "config.yaml").read_text())
    config |= {"teacher": str(tmp_path / "whole" / "teacher"), "data": str(tmp_path / "data")}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    return out


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :])


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(path: Path, name: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))


DAMAGE: dict[str, Damage] = {
    "a bit of a weight": lambda new, old: flipped(new / "student.safetensors", -3),
    "a bit of a header": lambda new, old: flipped(new / "student.safetensors", 20),
    "a header's length": lambda new, old: (new / "student.safetensors").write_bytes(struct.pack("<Q", 2**60)),
    "a block of zeros": lambda new, old: zeroed(new / "fake_score.optimizer.safetensors"),
    "a file of the step before": lambda new, old: shutil.copy(old / "student.safetensors", new),
    "the record of the step before": lambda new, old: shutil.copy(old / "state.json", new),
    "a file that is gone": lambda new, old: (new / "student.safetensors").unlink(),
    "a total": lambda new, old: edited(new / "state.json", totals={"student/loss": [1.0, 2]}),
    "no step": lambda new, old: without(new / "state.json", "step"),
    "no files": lambda new, old: without(new / "state.json", "files"),
    "a step that is a text": lambda new, old: edited(new / "state.json", step="four"),
    "files that are a list": lambda new, old: edited(new / "state.json", files=[["student.safetensors"]]),
    "a world of none": lambda new, old: edited(new / "state.json", world_size=None),
    "a list": lambda new, old: (new / "state.json").write_text("[]"),
    "a deep list": lambda new, old: (new / "state.json").write_text("[" * 100_000),
    "bytes": lambda new, old: (new / "state.json").write_bytes(bytes(range(256))),
    "long": lambda new, old: edited(new / "state.json", step="x\n" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_not_used_but_the_one_before(damage: Damage, run: Path, capsys: Capture) -> None:
    folder = run / "checkpoints"
    damage(folder / NEWEST, folder / BEFORE)
    newest = load_newest(folder)
    assert newest is not None and newest[0].name == BEFORE and newest[2]["step"] == 2
    note = capsys.readouterr().err
    assert note.startswith("note: checkpoint: ") and NEWEST in note and f"{BEFORE}, the one before, is used" in note
    assert note.count("\n") == 1 and len(note) < 300
    with pytest.raises(UserError, match=f"{NEWEST} is damaged") as refused:
        load_checkpoint(folder / NEWEST)
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


def test_a_run_goes_on_from_the_checkpoint_before_with_the_same_bits(run: Path, capsys: Capture) -> None:
    weights = run / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    saved, lines = load_file(weights), (run / "metrics.jsonl").read_text()
    flipped(run / "checkpoints" / NEWEST / "student.safetensors", -3)
    distill(resume=run)
    again = load_file(weights)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines.splitlines()) == 4
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [BEFORE, NEWEST]
    load_checkpoint(run / "checkpoints" / NEWEST)


def test_where_all_are_damaged_it_is_said(run: Path) -> None:
    for path in checkpoints(run / "checkpoints"):
        zeroed(path / "student.safetensors")
    with pytest.raises(UserError, match=r"student.safetensors is not what was saved; no earlier checkpoint is whole"):
        distill(resume=run)


def test_what_interrupted_removals_left_is_cleaned_up(run: Path) -> None:
    folder = run / "checkpoints"
    for name in ("step-00000001", ".step-00000001.removed", ".step-00000003.partial", "step-00000009.damaged"):
        (folder / name).mkdir()
        (folder / name / "student.safetensors").write_text("x")
    (folder / "mine").mkdir()
    remove_old(folder, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["mine", NEWEST]


ODD_LINES = ["[1]", "3", '"step"', "{", '{"step": "2"}', '{"step": null}', "[" * 5000, '{"no": 1}', "\x00\ufffd", ""]


def test_odd_lines_of_metrics_are_left_out(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"\xff\xfe\n" + "\n".join(ODD_LINES).encode() + b"\n" + metrics.read_bytes())
    assert [line["step"] for line in distill(resume=run, steps=5).metrics] == [1, 2, 3, 4, 5]
    assert len(metrics.read_text().splitlines()) == 5


# -- a run that reads anything else than when it began ------------------------------------------------------


def option_edited(run: Path, name: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {name: value}))


def weights_replaced(run: Path) -> None:
    file = run.parent / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})


def data_of(run: Path) -> Path:
    return run.parent.parent / "data"


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "seed": (lambda run: option_edited(run, "seed", 7), r"seed \(0, now 7\)"),
    "batch size": (lambda run: option_edited(run, "batch_size", 2), r"batch_size \(4, now 2\)"),
    "an option of the method": (lambda run: option_edited(run, "gan_weight", 0.2), r"gan_weight \(0.1, now 0.2\)"),
    "the teacher's weights": (weights_replaced, r"teacher's weights \("),
    "the scheduler": (
        lambda run: edited(run.parent / "teacher" / "scheduler" / "scheduler_config.json", clip_sample=True),
        r"teacher's scheduler \(",
    ),
    "an image gone": (lambda run: (data_of(run) / "0" / "00.png").unlink(), r"data \(12 of \w+, now 11 of"),
    "an image changed": (
        lambda run: Image.new("L", (8, 8)).save(data_of(run) / "0" / "00.png"),
        r"data \(12 of \w+, now 12 of",
    ),
    "no record": (lambda run: (run / "inputs.json").unlink(), "has no inputs.json"),
    "a damaged record": (lambda run: (run / "inputs.json").write_text('{"format": 1}'), "inputs.json' is damaged"),
}


@pytest.mark.parametrize("change, says", CHANGES.values(), ids=CHANGES)
def test_a_changed_run_is_refused_or_allowed(
    change: Callable[[Path], Any], says: str, run: Path, capsys: Capture
) -> None:
    change(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) < 300 and "--allow-change" in line
    with pytest.raises(UserError, match=says):
        distill(resume=run, steps=5)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}, "nothing is touched"
    assert main(["train", "--resume", str(run), "--steps", "5", "--allow-change"]) == 0
    assert "note: " in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--steps", "6"]) == 0, "the change is what the run is now"


def test_a_run_and_its_teacher_and_data_may_be_moved(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "elsewhere")
    for name, path in {"teacher": tmp_path / "whole" / "teacher", "data": tmp_path / "data"}.items():
        option_edited(moved, name, str(path.rename(tmp_path / f"moved {name}")))
    distill(resume=moved, steps=5)


def test_options_are_changed_on_the_command_line_only_if_allowed(run: Path, capsys: Capture) -> None:
    argv = ["train", "--resume", str(run), "--steps", "5", "--batch-size", "2"]
    assert main(argv) == 2
    assert "batch_size: cannot change when a run is resumed, unless with --allow-change" in capsys.readouterr().err
    assert main([*argv, "--allow-change", "student-lr"]) == 2
    assert "unless with --allow-change batch-size; what can" in capsys.readouterr().err
    assert main([*argv, "--allow-change", "batch_sizes"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*argv, "--allow-change", "batch-size", "--allow-change", "bach-size"]) == 2
    assert "allow_change: nothing here is called 'bach-size'; did you mean 'batch-size'?" in capsys.readouterr().err
    assert main([*argv, "--allow-change", "batch-size"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["batch_size"] == 2
    assert main(["train", "--allow-change", "--out", str(run.parent / "new")]) == 2
    assert "allow_change: it is for a run that is resumed" in capsys.readouterr().err


def test_of_two_changes_the_one_that_is_not_allowed_is_refused(run: Path, capsys: Capture) -> None:
    option_edited(run, "student_lr", 0.002)
    option_edited(run, "beta1", 0.4)
    argv = ["train", "--resume", str(run), "--steps", "5"]
    assert main(argv) == 2
    assert "go on with --allow-change student-lr --allow-change beta1\n" in capsys.readouterr().err
    assert main([*argv, "--allow-change", "student_lr"]) == 2
    line = capsys.readouterr().err
    assert "beta1 (0.0, now 0.4)" in line and "student_lr (" not in line
    with pytest.raises(UserError, match="beta1"):
        distill(resume=run, steps=5, allow_change=["student_lr"])
    assert distill(resume=run, steps=5, allow_change=["student_lr", "beta1"]).folder == run


@pytest.mark.parametrize(
    "change",
    [
        ["--lora", "student"],
        ["--gan-weight", "0"],
        ["--method", "sid"],
        ["--discriminator-depths", "0.5"],
    ],
)
def test_what_the_checkpoint_cannot_be_taken_to_is_refused_even_if_allowed(
    change: list[str], run: Path, capsys: Capture
) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", "--resume", str(run), "--steps", "5", *change, "--allow-change"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("diffdistill: ") and len(line) < 300, line
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}, "nothing is touched"
