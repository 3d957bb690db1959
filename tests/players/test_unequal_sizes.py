"""Samples of another height than width: encoded, trained on, exported, and drawn by diffusers without diffdistill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffdistill
from diffdistill import distill, export
from diffdistill.commands.cli import main
from diffdistill.data.encoded import open_encoded
from diffdistill.families import load_student, load_teacher, student_record
from diffdistill.players.discriminator import DiscriminatorHead
from tests.players.tiny import PROMPTS, SIZES, apart, drawn_by_a_stranger, ours

# One of each way to tell a network or a pipeline its size; stock latents of all families are in test_families.
SOME = ("stable_diffusion", "sdxl", "pixart_alpha", "sana", "sd3", "flux", "krea2", "wan")


@pytest.mark.parametrize("name", SOME)
def test_a_student_of_another_height_than_width(
    name: str, encoded: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    height, width = SIZES[name], 2 * SIZES[name]
    folder, prompts = encoded(name, f"{height}x{width}")
    data = open_encoded(prompts)
    cond, shape = data.get(torch.tensor([1])).cond, tuple(data.settings["shape"])
    assert shape[-1] == 2 * shape[-2] and data.settings["pixels"] == [height, width]
    lora = {"lora": "student", "lora_rank": 2, "lora_alpha": 6.0, "student_lr": 0.5} if name == "sd3" else {}
    run = tmp_path / "run"
    # The size is that of the prompts.
    student = distill(
        "dmd2", teacher=folder, prompts=prompts, batch_size=2, steps=2, update_ratio=1, student_steps=2,
        **{"student_lr": 1e-3, **lora}, warmup_steps=0, sample_every=1, device="cpu", out=run,
    ).student  # fmt: skip
    record = student_record(student)
    assert record.resolution == f"{height}x{width}" and load_student(student)[1].shape == shape
    assert record.call is not None and (record.call["height"], record.call["width"]) == (height, width)
    assert f"height={height}, width={width}" in (student / "README.md").read_text()
    image, before = ours(run, cond, shape), ours(run, cond, shape, trained=False)
    assert apart(image, before) > 1e-2
    job = {"student": str(student), "base": "", "what": {"prompt": PROMPTS[1]}, "type": "latent"}
    (got,) = drawn_by_a_stranger([job], tmp_path)
    assert apart(got.reshape(image.shape), image) < 1e-3
    drawn = diffdistill.sample(student, prompt=PROMPTS[1], count=1).images
    assert drawn.shape[-2:] == (height, width)
    again = export(run, out=tmp_path / "again")
    assert json.loads((again / "diffdistill.json").read_text())["resolution"] == f"{height}x{width}"


@pytest.mark.parametrize("size", ["64x16", "16x64"])
def test_a_discriminator_reads_maps_that_are_higher_or_wider(
    size: str, encoded: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, prompts = encoded("stable_diffusion", size)
    options: dict[str, Any] = {"teacher": folder, "prompts": prompts, "batch_size": 2, "steps": 1, "sample_every": 0}
    run = distill("dmd2", **options, gan_weight=0.1, update_ratio=1, device="cpu", out=tmp_path / "run")
    assert run.student.is_dir()


def test_a_head_fills_up_maps_that_are_shorter_than_its_own() -> None:
    head = DiscriminatorHead(8, 8)
    maps = torch.randn(2, 8, 4, 16)
    filled = torch.cat([maps, torch.zeros(2, 8, 4, 16)], 2)
    assert torch.equal(head(maps), head(filled)) and head(maps).shape == (2,)


def test_a_size_is_given_in_many_ways_and_stays_one(encoded: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, _ = encoded("stable_diffusion")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    made = [
        diffdistill.encode(teacher=folder, prompts=tmp_path / "prompts.txt", resolution=size, out=tmp_path / str(i))
        for i, size in enumerate(((16, 24), "16x24", "16 X 24"))
    ]
    settings = [open_encoded(path).settings for path in made]
    assert settings[0] == settings[1] == settings[2] and settings[0]["resolution"] == "16x24"
    # A teacher as an object has its size.
    loaded = load_teacher(folder, resolution=(16, 24))
    again = diffdistill.encode(teacher=loaded, prompts=tmp_path / "prompts.txt", out=tmp_path / "object")
    assert open_encoded(again).settings["shape"] == settings[0]["shape"] == [4, 8, 12]


def test_an_image_is_cropped_to_the_ratio(encoded: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    from PIL import Image

    folder, _ = encoded("stable_diffusion")
    for name, size in (("tall", (16, 96)), ("wide", (96, 16))):
        images = tmp_path / name
        images.mkdir()
        picture = Image.new("RGB", size, "black")
        middle = (0, 32, 16, 64) if name == "tall" else (32, 0, 64, 16)
        picture.paste("white", middle)
        picture.save(images / "a.png")
        (images / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "white"}))
        resolution = "32x16" if name == "tall" else "16x32"
        out = diffdistill.encode(teacher=folder, data=images, resolution=resolution, out=tmp_path / f"{name}-encoded")
        latents = load_file(out / "00000.safetensors")["latents"]
        # The middle alone, which is white throughout: without the crop it would be a third of the picture.
        blank = tmp_path / f"{name}-blank"
        blank.mkdir()
        Image.new("RGB", size, "white").save(blank / "a.png")
        (blank / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "white"}))
        plain = diffdistill.encode(teacher=folder, data=blank, resolution=resolution, out=tmp_path / f"{name}-plain")
        assert torch.allclose(latents, load_file(plain / "00000.safetensors")["latents"], atol=2e-2)


def test_a_student_is_judged_beside_its_teacher_at_its_size(
    encoded: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A square one of another size than the teacher's own too, of which several differ."""
    folder, _ = encoded("stable_diffusion")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    options = ["--count", "20", "--bootstrap", "0", "--teacher-steps", "1", "--device", "cpu"]
    for name, resolution, pixels in (("runs/a", "16x32", "32x16"), ("runs/b", "24", "24x24")):
        distill(
            "dmd2", teacher=folder, prompts=tmp_path / "prompts.txt", resolution=resolution, batch_size=2, steps=1,
            update_ratio=1, sample_every=0, device="cpu", out=tmp_path / name,
        )  # fmt: skip
        capsys.readouterr()
        assert main(["eval", str(tmp_path / name), *options]) == 0
        assert f"of 20 real images in {pixels} pixels" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "runs"), *options]) == 2
    assert "eval: b and a make samples of two shapes, (4, 12, 12) and (4, 8, 16)" in capsys.readouterr().err


def test_a_teacher_is_sampled_at_a_size(encoded: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = encoded("sdxl")
    assert diffdistill.sample(folder, prompt="a", count=1, steps=1, resolution="16x32").images.shape[-2:] == (16, 32)
    videos, _ = encoded("wan")
    drawn = diffdistill.sample(videos, prompt="a", count=1, steps=1, resolution="16x32", frames=5).images
    assert drawn.shape[-2:] == (16, 32)
    with pytest.raises(diffdistill.UserError, match="frames: 5 was given, and sdxl makes images"):
        diffdistill.sample(folder, prompt="a", count=1, frames=5)
    with pytest.raises(diffdistill.UserError, match=r"resolution: .* is a model of pixels"):
        diffdistill.sample("digits", count=1, resolution=16)
