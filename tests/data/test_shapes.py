"""Drawn shapes, their judge, and a text-to-image teacher of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import diffdistill
from diffdistill import evaluate
from diffdistill.commands.teacher import train_teacher
from diffdistill.data.encoded import encode
from diffdistill.data.images import open_data
from diffdistill.data.shapes import JITTER, NONE, POSITIONS, SHAPES, caption, draw, draw_many, judge, read
from diffdistill.errors import UserError

TINY: dict[str, Any] = {
    "architecture": "stable-diffusion",
    "data": "shapes:32",
    "widths": "16,32",
    "layers": 1,
    "vae_widths": "8,8,16",
    "text_width": 16,
    "batch_size": 8,
    "vae_batch_size": 8,
    "device": "cpu",
    "sample_every": 2,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(**TINY, steps=2, vae_steps=2, out=str(tmp_path_factory.mktemp("shapes") / "teacher"))


def test_the_judge_reads_what_was_drawn() -> None:
    images, _, attributes = draw_many(5, 1000)
    scores = judge(images, attributes)
    assert min(value for name, value in scores.items() if "%" in name) >= 99
    assert abs(scores["spread px"] - JITTER * (2 / 3) ** 0.5) < 0.1
    assert judge(images.flip(3), attributes)["position %"] < 30  # those in the middle stay there


def test_the_judge_is_near_chance_on_other_captions() -> None:
    images, _, attributes = draw_many(5, 1000)
    scores = judge(images, attributes[torch.randperm(1000, generator=torch.Generator().manual_seed(0))])
    for name, chance in (("colour %", 100 / 6), ("shape %", 25), ("position %", 20), ("all three %", 100 / 120)):
        assert abs(scores[name] - chance) < 5, (name, scores)


def test_the_judge_sees_nothing_in_nothing() -> None:
    blank = torch.zeros(2, 3, 32, 32)
    assert (read(blank).attributes == NONE).all()
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (read(noise).attributes[:, 1] == NONE).float().mean() > 0.9


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    images, captions, attributes = draw_many(3, 5)
    alone = draw(3, 4)
    assert torch.equal(images[4], alone.image) and captions[4] == alone.caption
    assert attributes[4].tolist() == list(alone.attributes)
    assert not torch.equal(draw(4, 4).image, alone.image)
    assert caption(0, SHAPES.index("circle"), POSITIONS.index("at the top left")) == "a red circle at the top left"


def test_shapes_are_data() -> None:
    data = open_data("shapes:8")
    assert (len(data), data.shape, len(open_data("shapes"))) == (8, (3, 32, 32), 4000)
    got = data.get(torch.tensor([5, 1]))
    assert torch.equal(got.images[1], draw(0, 1).image) and got.captions == [draw(0, 5).caption, draw(0, 1).caption]
    assert open_data("shapes:8", resolution=16, channels=1).get(torch.tensor([0])).images.shape == (1, 1, 16, 16)
    with pytest.raises(UserError):
        open_data("shapes:0")


def test_stock_diffusers_loads_the_teacher(teacher: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    assert pipeline.safety_checker is None
    assert pipeline.tokenizer.tokenize("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    images = pipeline("a red circle at the top left", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    x = open_data("shapes:32").get(torch.arange(32)).images
    with torch.no_grad():
        latents = pipeline.vae.encode(x).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert abs(float(latents.std()) - 1) < 1e-3
    assert len(list((teacher.parent / "samples").iterdir())) == 2


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = train_teacher(**TINY, steps=3, vae_steps=2, checkpoint_every=1, out=str(tmp_path / "whole"))
    for stop, path in (("vae", tmp_path / "a"), ("unet", tmp_path / "b")):
        train_teacher(**TINY, steps=3, vae_steps=2, checkpoint_every=1, keep_checkpoints=5, out=str(path))
        kept = path / "vae" / "checkpoints" if stop == "vae" else path / "checkpoints"
        for folder in sorted(kept.iterdir())[1:]:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        if stop == "vae":
            for folder in (path / "checkpoints").iterdir():
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        again = train_teacher(resume=path)
        for part in ("unet", "vae", "text_encoder"):
            for file in (whole / part).glob("*.safetensors"):
                one, other = load_file(file), load_file(again / part / file.name)
                assert all(torch.equal(one[key], other[key]) for key in one), (stop, part)


def test_distilled_and_judged(teacher: Path, tmp_path: Path) -> None:
    prompts = encode(teacher=str(teacher), data="shapes:16", out=str(tmp_path / "prompts"), device="cpu")
    runs = tmp_path / "runs"
    shared = {"teacher": str(teacher), "prompts": str(prompts), "steps": 2, "batch_size": 8, "device": "cpu"}
    diffdistill.distill(method="dmd2", guidance_scale=2.0, **shared, out=str(runs / "dmd2-1"))
    diffdistill.distill(method="lcm", ddim_steps=20, student_steps=4, **shared, out=str(runs / "lcm-4"))
    options: dict[str, Any] = {"teacher_steps": [1, 2], "data": "shapes", "count": 10}
    table = evaluate(runs, **options).rows
    assert [(row["model"], row.get("steps")) for row in table] == [
        ("drawn, through the autoencoder", None),
        ("teacher, guidance 2", 1),
        ("teacher, guidance 2", 2),
        ("teacher", 1),
        ("teacher", 2),
        ("dmd2-1", 1),
        ("lcm-4", 4),
    ]
    assert (runs / "eval" / "comparison.png").is_file()
    written = json.loads((runs / "eval" / "results.json").read_text())["rows"]
    assert [{k: v for k, v in row.items() if k != "intervals"} for row in written] == table
    alone = evaluate(runs / "dmd2-1", **options).rows
    for row, same in zip(alone[:3] + alone[3:], table[:3] + table[5:6], strict=True):
        assert {k: v for k, v in row.items() if k != "ms per image"} | {"model": ""} == {
            k: v for k, v in same.items() if k != "ms per image"
        } | {"model": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits"}, "resolution: .* 3 channels"),
        ({"parameterization": "edm"}, "parameterization: edm"),
        ({"text_width": 24}, "text_width: 24"),
        ({"vae_widths": "4,8"}, "vae_widths: '4,8'"),
        ({"widths": "16,x"}, "widths: '16,x'"),
        ({"attention": "2"}, "attention: '2'"),
        ({"vae_batch_size": 64}, "batch_size 64"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_teacher(**TINY | options, steps=1, vae_steps=1, out=str(tmp_path / "run"))


def test_shapes_judge_no_model_of_digits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images of shapes are 32x32 and the protocol's 8x8"):
        evaluate("digits", teacher_steps=[1], data="shapes", count=100, out=tmp_path)
