"""Configs as they are found: kinds that are not supported, nulls, other types. One line each, or the right images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, EDMEulerScheduler, UNet2DModel

from diffdistill import distill, sample
from diffdistill.commands.cli import main
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, describe, family_of, load_pipeline, load_student, load_teacher, schedule_of
from diffdistill.pipelines.export import other_parts
from diffdistill.rng import image_generators
from tests.families.test_real_folders import edited
from tests.tiny_a import PIPELINES, sdxl, stable_diffusion
from tests.tiny_b import flux, qwen_image


def pixel_teacher(folder: Path, scheduler: Any = None, **unet: Any) -> Path:
    """A tiny UNet2DModel of 8x8 grey images."""
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    DDPMPipeline(UNet2DModel(**settings | unet), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction", num_train_timesteps=100),
        DDPMScheduler(variance_type="learned_range", thresholding=True),
        DDIMScheduler(set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1),
        EDMEulerScheduler(sigma_data=1.0),
    ],
)
def test_a_student_is_drawn_by_stock_diffusers_as_by_us(scheduler: Any, tmp_path: Path) -> None:
    teacher = pixel_teacher(tmp_path / "teacher", scheduler)
    student = distill(
        "dmd2", teacher=str(teacher), steps=1, batch_size=4, update_ratio=1, sample_every=0, device="cpu",
        out=str(tmp_path / "run"),
    ).student  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    drawn = torch.tensor(pipeline(batch_size=3, generator=image_generators(0, range(3)), output_type="np").images)
    sampler, described = load_student(student)
    ours = (sampler(described.shape, {}, image_generators(0, range(3))).clamp(-1, 1) + 1) / 2
    assert float((drawn.permute(0, 3, 1, 2) - ours).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": None}, "num_train_timesteps is None; it must be a whole number above 1"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1;"),
        ({"beta_start": None}, "beta_start is None; it must be a number above 0"),
        ({"beta_end": "0.02"}, "beta_end is '0.02'"),
        ({"beta_end": 1.5}, "betas do not make noise of an image"),
        ({"beta_schedule": "laplace"}, "beta_schedule: 'laplace' is not supported"),
        ({"trained_betas": [0.1, 0.0, 0.3]}, "betas do not make noise of an image"),
        ({"trained_betas": []}, r"trained_betas is \[\]; it must be a list"),
        ({"trained_betas": [[0.1, 0.2]]}, "trained_betas is"),
        ({"prediction_type": None}, "prediction_type None is not supported"),
        ({"clip_sample_range": None}, "clip_sample_range is None"),
        ({"_class_name": ["file", "Scheduler"]}, "its class is"),
        ({"_class_name": None}, "no _class_name"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": None}, "shift is None"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.0}, "sigma_min is 0.0"),
    ],
)
def test_a_scheduler_that_says_nothing_usable(changes: dict[str, Any], message: str) -> None:
    config = {**DDPMScheduler().config, "_class_name": "DDPMScheduler", **changes}
    with pytest.raises(UserError, match=message):
        schedule_of(config)


def test_numbers_that_are_not_read_may_be_null() -> None:
    unread = {"clip_sample": False, "clip_sample_range": None, "sample_max_value": None, "beta_start": None}
    for first in (0.1, 0.0):  # the first timestep may be clean data
        betas = {"trained_betas": [first, 0.2, 0.3]}
        schedule_of({**DDPMScheduler().config, "_class_name": "DDPMScheduler", **unread, **betas})


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, "holds 'AutoencoderDC'; AutoencoderKL is expected"),
        ("vae/config.json", {"scaling_factor": None}, "vae/config.json has no scaling_factor, by which"),
        ("vae/config.json", {"block_out_channels": None}, "not those of stable_diffusion"),
        ("unet/config.json", {"in_channels": 36}, "takes 36 channels and the VAE gives 4"),
        ("unet/config.json", {"out_channels": 8}, "makes 8 channels and the VAE takes 4"),
        ("unet/config.json", {"num_class_embeds": 10}, "a UNet with num_class_embeds 10 is not supported"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
        ("unet/config.json", {"block_out_channels": None}, "unet/config.json is no config of UNet2DConditionModel"),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "beta_end is None"),
    ],
)
def test_a_latent_pipeline_that_is_not_the_familys(
    file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stable_diffusion().save_pretrained(tmp_path / "sd")
    with pytest.raises(UserError, match=message) as error:
        describe(edited(tmp_path / "sd", tmp_path / "other", file, change(**changes)), 16)
    assert "\n" not in str(error.value)


def test_other_families_say_it_too(tmp_path: Path) -> None:
    sdxl().save_pretrained(tmp_path / "xl")
    with pytest.raises(UserError, match="addition_embed_type is None; that of sdxl is 'text_time'"):
        describe(edited(tmp_path / "xl", tmp_path / "a", "unet/config.json", change(addition_embed_type=None)))
    with pytest.raises(UserError, match=r"sample: the stock pipeline of .* cannot draw \(AttributeError"):
        sample(tmp_path / "a", prompt="one", count=1, steps=1)
    qwen_image().save_pretrained(tmp_path / "qwen")
    null = change(base_shift=None)
    with pytest.raises(UserError, match=r"configs in .* are not those of qwen_image \(TypeError"):
        describe(edited(tmp_path / "qwen", tmp_path / "b", "scheduler/scheduler_config.json", null))


def test_a_teacher_without_a_size_says_so(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "sd")
    folder = edited(tmp_path / "sd", tmp_path / "none", "unet/config.json", change(sample_size=None))
    with pytest.raises(UserError, match=r"sample_size in .* is null, so that its stock pipeline has no size"):
        sample(folder, prompt="one", count=1, steps=1)


@pytest.mark.parametrize("name", ["dit", "pixart_sigma"])
def test_a_size_of_two_equal_numbers_is_one(name: str, tmp_path: Path) -> None:
    PIPELINES[name]().save_pretrained(tmp_path / "one")
    folder = edited(tmp_path / "one", tmp_path / "two", "transformer/config.json", change(sample_size=[8, 8]))
    assert describe(folder).shape == load_teacher(folder).shape == describe(tmp_path / "one").shape
    assert load_pipeline(folder).transformer.config.sample_size == 8


def test_two_texts_in_the_index_are_no_part(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "sd")
    more = change(words=["one", "two"], layers=[1, 2], sizes=[["a", "b"]])
    folder = edited(tmp_path / "sd", tmp_path / "more", "model_index.json", more)
    assert sample(folder, prompt="one", count=1, steps=1).images.isfinite().all()
    assert [part.name for part in other_parts(folder, FAMILIES["stable_diffusion"])] == [
        part.name for part in other_parts(tmp_path / "sd", FAMILIES["stable_diffusion"])
    ]


@pytest.mark.parametrize("name", [None, 7, [], ["a", "b", "c"], {"a": 1}, "KandinskyPipeline"])
def test_an_index_without_a_known_class(name: Any, tmp_path: Path) -> None:
    folder = edited(
        pixel_teacher(tmp_path / "teacher"), tmp_path / "other", "model_index.json", change(_class_name=name)
    )
    with pytest.raises(UserError, match=r"pipeline class .* is not supported"):
        family_of(folder)
    assert main(["eval", str(folder), "--steps", "2", "--count", "100", "--out", str(tmp_path / "out")]) == 2


def test_pixel_networks_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, size in enumerate((None, [8, 12], "8", 0)):
        folder = pixel_teacher(tmp_path / f"size{i}")
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        with pytest.raises(UserError, match=r"sample_size is .*; it must be one whole number"):
            sample(folder, count=1)
    few = pixel_teacher(tmp_path / "few", time_embedding_type="learned", num_train_timesteps=10)
    with pytest.raises(UserError, match="learned time embedding has 10 timesteps, and its scheduler 1000"):
        sample(few, count=1)
    two = pixel_teacher(tmp_path / "two", in_channels=2, out_channels=2)
    assert main(["sample", str(two), "--count", "1", "--out", str(tmp_path / "x.png")]) == 2
    assert "cannot be drawn; (N, 1 or 3, H, W) can" in capsys.readouterr().err


def test_a_network_that_cannot_be_called_with_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux().save_pretrained(tmp_path / "whole")
    bad = edited(
        tmp_path / "whole", tmp_path / "bad", "transformer/config.json", lambda values: values.pop("axes_dims_rope")
    )
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    argv = ["--teacher", str(bad), "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "16", "--steps", "1"]
    assert main(["train", *argv, "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("diffdistill: teacher: ") and "cannot be called" in line and "config.json" in line
    assert not (tmp_path / "out" / "config.yaml").exists()
