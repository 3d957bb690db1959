"""A teacher that is one .safetensors file is the teacher of the folder that it was made of, in every command."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffdistill import distill, export, load_teacher
from diffdistill.commands.cli import main
from diffdistill.config import INPUTS
from diffdistill.errors import UserError
from diffdistill.families import _single, load_pipeline, local_folder, read_files_with
from tests import tiny_a, tiny_b
from tests.original_layout import stable_diffusion_file


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No configs are named, and nothing was read before."""
    monkeypatch.setattr(_single, "_CONFIG", [])
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    yield


def written(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A tiny Stable Diffusion's folder, and its single file as its makers name the weights."""
    pipe = tiny_a.stable_diffusion()
    pipe.save_pretrained(tmp_path / "folder")
    file = tmp_path / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in stable_diffusion_file(pipe).items()}, file)
    return tmp_path / "folder", file


def same(one: Any, other: Any) -> bool:
    held = one.state_dict()
    return held.keys() == other.state_dict().keys() and all(
        torch.equal(value, other.state_dict()[name]) for name, value in held.items()
    )


def test_all_parts_of_a_makers_file_have_the_bits_of_the_folder(tmp_path: Path) -> None:
    folder, file = written(tmp_path)
    read_files_with(str(folder))
    teacher, plain = load_teacher(file), load_teacher(folder)
    assert same(teacher.denoiser.network, plain.denoiser.network) and teacher.scheduler == plain.scheduler
    from_file, from_folder = load_pipeline(local_folder(str(file))), load_pipeline(folder)
    assert same(from_file.vae, from_folder.vae) and same(from_file.text_encoder, from_folder.text_encoder)
    assert teacher.source == str(file)


def test_a_file_of_the_network_alone_has_the_folders_other_parts(tmp_path: Path) -> None:
    pipe = tiny_b.flux()
    pipe.save_pretrained(tmp_path / "base")
    changed = {name: value * 1.5 for name, value in pipe.transformer.state_dict().items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    read_files_with(str(tmp_path / "base"))
    network: Any = load_teacher(tmp_path / "tuned.safetensors").denoiser.network
    assert all(torch.equal(value, changed[name]) for name, value in network.state_dict().items())
    made = local_folder(str(tmp_path / "tuned.safetensors"))
    assert made.name == "tuned"
    assert {part.name for part in (tmp_path / "base").iterdir()} <= {part.name for part in made.iterdir()}


def test_it_is_read_once_in_its_own_type_and_again_when_it_has_changed(tmp_path: Path) -> None:
    folder, file = written(tmp_path, torch.float16)
    read_files_with(str(folder))
    made = local_folder(str(file))
    with safe_open(made / "unet" / "diffusion_pytorch_model.safetensors", "pt") as held:
        assert held.get_slice("conv_in.weight").get_dtype() == "F16"
    _single._CONFIG.clear()
    assert local_folder(str(file)) == made
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="needs the configs of its pipeline"):
        local_folder(str(file))


def test_configs_alone_are_enough_for_a_plan(tmp_path: Path) -> None:
    folder, file = written(tmp_path)
    read_files_with(str(folder))
    assert local_folder(str(file), weights=False) == folder and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.diffusion_model.out.2.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}, "8-bit weights"),
        ({"model.diffusion_model.out.2.weight": torch.zeros(2, 2)}, "give --teacher-config FOLDER_OR_ID"),
        ({"blocks.0.weight": torch.zeros(2, 2)}, "or give --teacher-config FOLDER_OR_ID"),
        ({"unet.a.lora_A.weight": torch.zeros(2, 2)}, "a LoRA; fuse it"),
        ({"images": torch.zeros(2, 2)}, "a diffusers folder is needed"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tensors: dict[str, torch.Tensor], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    assert main(["train", "--teacher", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 400


def test_a_file_that_lacks_weights_or_is_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, file = written(tmp_path)
    held = load_file(file)
    del held["model.diffusion_model.out.2.weight"]
    save_file(held, file)
    read_files_with(str(folder))
    with pytest.raises(UserError, match=r"'model.safetensors' does not load as stable_diffusion"):
        load_teacher(file)
    assert not any((tmp_path / "cache").rglob("model_index.json"))
    read_files_with(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"teacher_config: '.*none' is not a folder"):
        load_teacher(file)
    tiny_b.flux().save_pretrained(tmp_path / "flux")
    read_files_with(str(tmp_path / "flux"))
    with pytest.raises(UserError, match=r"'model.safetensors' does not load as flux"):
        load_teacher(file)


@pytest.mark.slow
def test_every_command_takes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = written(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red fox\na blue hen\n")

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    encoded, out = tmp_path / "encoded", tmp_path / "run"
    size = ["--resolution", tiny_a.SIZES["stable_diffusion"]]
    config = ["--teacher-config", folder]
    run("encode", "--teacher", file, *config, "--prompts", tmp_path / "prompts.txt", "--out", encoded, *size)
    few = ["--steps", 2, "--batch-size", 2, "--sample-every", 0]
    run("train", "--method", "dmd2", "--teacher", file, "--prompts", encoded, *few, "--out", out)
    assert json.loads((out / INPUTS).read_text())["teacher"] == str(file)
    run("train", "--resume", out, "--steps", 3)
    assert "model.safetensors" in (out / "student" / "README.md").read_text()
    lora = ["--lora", "student,fake_score", "--export", "lora"]
    run("train", "--method", "dmd2", "--teacher", file, "--prompts", encoded, *few, *lora, "--out", tmp_path / "lora")
    card = (tmp_path / "lora" / "student" / "README.md").read_text()
    line = 'StableDiffusionPipeline.from_single_file("model.safetensors").save_pretrained("TEACHER")'
    assert f"`TEACHER` is a diffusers folder with the weights of `model.safetensors`, as `{line}` writes it." in card
    run("export", out, "--step", 3, "--out", tmp_path / "again")
    assert same(load_pipeline(tmp_path / "again").vae, load_pipeline(folder).vae)
    run(
        "pairs",
        "--teacher",
        file,
        "--prompts",
        encoded,
        "--count",
        2,
        "--sampling-steps",
        2,
        "--out",
        tmp_path / "pairs",
    )
    run("sample", file, "--prompt", "a fox", "--count", 1, "--steps", 2, "--out", tmp_path / "fox.png")
    run("sample", out, "--prompt", "a fox", "--count", 1, "--out", tmp_path / "student.png")
    run("plan", "--teacher", file, "--batch-size", 2)


@pytest.mark.slow
def test_a_folder_in_shards_is_the_teacher_that_it_is_in_one_file(tmp_path: Path) -> None:
    pipe = tiny_a.stable_diffusion()
    pipe.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "unet")
    pipe.unet.save_pretrained(tmp_path / "shards" / "unet", max_shard_size="100KB")
    assert (tmp_path / "shards" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    (tmp_path / "prompts.txt").write_text("a red fox\na blue hen\n")
    students = {}
    for name in ("whole", "shards"):
        out = tmp_path / f"run-{name}"
        given = {"teacher": tmp_path / name, "prompts": tmp_path / "prompts.txt", "batch_size": 2, "sample_every": 0}
        distill("dmd2", **given, resolution=tiny_a.SIZES["stable_diffusion"], steps=2, lr_schedule="constant", out=out)
        students[name] = distill(resume=out, steps=3).student
    marks = [json.loads((tmp_path / f"run-{name}" / INPUTS).read_text())["fingerprints"] for name in students]
    assert marks[0]["teacher's weights"] == marks[1]["teacher's weights"]
    students["again"] = export(tmp_path / "run-shards", step=2, out=tmp_path / "again")
    networks = {name: load_pipeline(Path(folder)).unet for name, folder in students.items()}
    assert same(networks["whole"], networks["shards"]) and not same(networks["whole"], networks["again"])
    shard = next((tmp_path / "shards" / "unet").glob("*-00002-of-*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(shard).items()}, shard)
    with pytest.raises(UserError, match="teacher's weights"):
        distill(resume=tmp_path / "run-shards", steps=4)
    shard.unlink()
    with pytest.raises(UserError, match="does not load as UNet2DConditionModel"):
        load_teacher(tmp_path / "shards")
