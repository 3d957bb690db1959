"""Pairs and prompts that are others than before, and an export of a run whose teacher is another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from diffdistill import UserError, distill, encode, export, make_pairs
from diffdistill.commands.cli import main
from tests import tiny_a
from tests.data.encoding import contents

Teachers = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
FIT: dict[str, Any] = {"steps": 2, "batch_size": 4, "log_every": 1, "sample_every": 0, "device": "cpu"}


def made_pairs(teacher: Path, out: Path, seed: int) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return make_pairs(teacher=teacher, out=out, seed=seed, count=8, sampling_steps=2, device="cpu")


def refused_then_allowed(run: Path, says: str, capsys: Capture) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    argv = ["train", "--resume", str(run), "--steps", "3"]
    assert main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert says in line and "undo that, or go on with --allow-change" in line and len(line) < 300
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}, "nothing is touched"
    other = [*argv, "--allow-change", "seed", "--allow-change=sample-every"]  # allowed, and the same
    assert main(other) == 2 and capsys.readouterr().err.splitlines()[-1] == line
    assert main([*argv, *line.partition("go on with ")[2].split()]) == 0  # the line says what to add
    assert f"note: changed since the run began: {says}" in capsys.readouterr().err


def test_other_pairs_are_refused_or_allowed(tiny_teacher: Teachers, tmp_path: Path, capsys: Capture) -> None:
    teacher, pairs = tiny_teacher("vp"), made_pairs(tiny_teacher("vp"), tmp_path / "pairs", 0)
    distill("dmd", teacher=teacher, pairs=pairs, data="digits", out=tmp_path / "run", **FIT)
    made_pairs(teacher, pairs, 0)
    distill(resume=tmp_path / "run")  # the same pairs made anew are the same
    made_pairs(teacher, pairs, 1)
    refused_then_allowed(tmp_path / "run", "pairs (8 of ", capsys)


def test_other_prompts_are_refused_or_allowed(tmp_path: Path, capsys: Capture) -> None:
    tiny_a.stable_diffusion(prediction_type="v_prediction", zero_snr=True).save_pretrained(tmp_path / "sd")
    texts, folder = tmp_path / "prompts.txt", tmp_path / "encoded"

    def encoded(*prompts: str) -> Path:
        texts.write_text("\n".join(prompts))
        shutil.rmtree(folder, ignore_errors=True)
        return encode(teacher=tmp_path / "sd", prompts=texts, resolution=16, out=folder, device="cpu")

    options = {"teacher": tmp_path / "sd", "prompts": encoded("a", "b", "c", "d"), "resolution": 16}
    distill("dmd2", **options, out=tmp_path / "run", **FIT)
    encoded("a", "b", "c", "e")
    refused_then_allowed(tmp_path / "run", "data (4 of ", capsys)


def test_a_file_of_prompts_that_is_another_is_refused_or_encoded_anew(tmp_path: Path, capsys: Capture) -> None:
    tiny_a.stable_diffusion(prediction_type="v_prediction", zero_snr=True).save_pretrained(tmp_path / "sd")
    texts, run = tmp_path / "prompts.txt", tmp_path / "run"
    texts.write_text("a\nb\nc\nd\n")
    distill("dmd2", teacher=tmp_path / "sd", prompts=texts, resolution=16, out=run, **FIT)
    before = contents(run / "encoded")
    texts.write_text("a\nb\nc\ne\n")
    assert main(["export", str(run), "--out", str(tmp_path / "student")]) == 0, "an export reads no prompts"
    argv = ["train", "--resume", str(run), "--steps", "3"]
    capsys.readouterr()
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert f"resume: changed since the run began: the prompts of {texts}" in line and "--allow-change" in line
    assert contents(run / "encoded") == before
    assert main([*argv, "--allow-change"]) == 0
    assert "note: changed since the run began: data (4 of " in capsys.readouterr().err
    assert contents(run / "encoded") != before
    texts.unlink()
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0, "what is encoded is there"


@pytest.fixture
def run(tiny_teacher: Teachers, tmp_path: Path) -> Path:
    teacher = shutil.copytree(tiny_teacher("vp"), tmp_path / "teacher")
    return distill("dmd2", teacher=teacher, lora="student", lora_rank=2, out=tmp_path / "run", **FIT).folder


def weights_replaced(run: Path) -> None:
    file = run.parent / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})


def scheduler_edited(run: Path) -> None:
    file = run.parent / "teacher" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": True}))


def option_edited(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"lora_alpha": 1.0}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (weights_replaced, r"teacher's weights \("),
        (scheduler_edited, r"teacher's scheduler \("),
        (option_edited, r"lora_alpha \(None, now 1.0\)"),
        (lambda run: (run / "inputs.json").unlink(), "has no inputs.json"),
    ],
)
def test_an_export_of_a_changed_run_is_refused_or_allowed(
    change: Callable[[Path], None], says: str, run: Path, capsys: Capture
) -> None:
    same = export(run, out=run / "same")
    files = [path.relative_to(same) for path in same.rglob("*.safetensors")]
    assert files and all((same / file).read_bytes() == (run / "student" / file).read_bytes() for file in files)
    change(run)
    with pytest.raises(UserError, match=says) as error:
        export(run, out=run / "other")
    assert str(error.value).startswith("export: ") and "--allow-change" in str(error.value)
    assert not (run / "other").exists()
    assert main(["export", str(run), "--out", str(run / "other")]) == 2
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(run / "other"), "--allow-change"]) == 0
    assert capsys.readouterr().err.startswith("note: ") and (run / "other").is_dir()


def test_an_export_reads_no_data(tiny_teacher: Teachers, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    import numpy as np

    np.savez(data, images=np.zeros((8, 8, 8), dtype=np.uint8), labels=np.arange(8))
    run = distill(
        "dmd2", teacher=tiny_teacher("vp"), data=data, options={"gan_weight": 0.1}, out=tmp_path / "run", **FIT
    )
    data.unlink()
    assert export(run.folder, out=tmp_path / "out").is_dir()
