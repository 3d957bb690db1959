"""Folders as they are found: parts left out, null or of other names, sizes of two numbers, files that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, describe, family_of, load_pipeline, load_teacher, local_folder, parts_of
from diffdistill.families._parts import copy_part, stored_dtypes
from tests.tiny_a import stable_diffusion
from tests.tiny_b import sd3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "sd"
    stable_diffusion().save_pretrained(folder)
    return folder


def edited(folder: Path, to: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the folder, of which one JSON file is changed."""
    shutil.copytree(folder, to)
    values = json.loads((to / file).read_text())
    change(values)
    (to / file).write_text(json.dumps(values))
    return to


def prompt(pipeline: Any) -> torch.Tensor:
    return pipeline.encode_prompt(["a red square"], "cpu", 1, False)[0]


@pytest.mark.parametrize("file", ["text_encoder/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_part_whose_weights_have_other_names_is_refused(plain: Path, tmp_path: Path, file: str, prefix: str) -> None:
    bad = shutil.copytree(plain, tmp_path / "bad")
    path = bad / f"{file}.safetensors"
    save_file({prefix + name: value for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{file.split('/')[0]} does not load .*it has no .*{prefix}"):
        load_pipeline(bad)
    if file.startswith("unet"):
        with pytest.raises(UserError, match=prefix):
            load_teacher(bad)


def test_one_missing_weight_of_a_text_encoder_is_named(plain: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(plain, tmp_path / "bad")
    path = bad / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder does not load as CLIPTextModel \(it has no .*fc1.weight\)"):
        load_pipeline(bad)


def test_an_active_lora_is_refused_with_what_to_do(plain: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(plain, tmp_path / "bad")
    path = bad / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name.replace("to_q.weight", "to_q.base_layer.weight"): value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="unload_lora_weights"):
        load_teacher(bad)


def test_a_variant_alone_is_read_and_copied_under_plain_names(plain: Path, tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "variant", variant="fp16")
    got, expected = prompt(load_pipeline(tmp_path / "variant")), prompt(load_pipeline(plain))
    assert torch.equal(got, expected)
    assert load_teacher(tmp_path / "variant").shape == load_teacher(plain).shape
    copy_part(tmp_path / "variant" / "vae", tmp_path / "vae")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    for file in (tmp_path / "variant" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"unet has no .safetensors weights.*fp16"):
        load_teacher(tmp_path / "variant")


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(UserError, match=r"would be unpickled.*safe_serialization=True"):
        load_teacher(tmp_path / "bin")


def test_parts_that_no_image_needs_may_be_missing(plain: Path, tmp_path: Path) -> None:
    def names(index: dict[str, Any]) -> None:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]

    folder = edited(plain, tmp_path / "named", "model_index.json", names)
    assert torch.equal(prompt(load_pipeline(folder)), prompt(load_pipeline(plain)))
    nulls = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    folder = edited(plain, tmp_path / "nulls", "model_index.json", lambda index: index.update(nulls))
    assert torch.equal(prompt(load_pipeline(folder)), prompt(load_pipeline(plain)))
    folder = edited(plain, tmp_path / "no-vae", "model_index.json", lambda index: index.update(vae=None))
    with pytest.raises(UserError, match="names no vae"):
        load_pipeline(folder)


@pytest.mark.parametrize("null", [None, [None, None]])
def test_stable_diffusion_3_without_t5(tmp_path: Path, null: Any) -> None:
    sd3().save_pretrained(tmp_path / "whole")
    nulls = {"text_encoder_3": null, "tokenizer_3": null}
    folder = edited(tmp_path / "whole", tmp_path / "two", "model_index.json", lambda index: index.update(nulls))
    for part in nulls:
        shutil.rmtree(folder / part)
    family = FAMILIES["sd3"]
    assert family.text is not None
    pipeline = load_pipeline(folder, leave_out=("transformer",))
    cond = family.text.encode(pipeline, ["a red square"], None)  # type: ignore[arg-type]
    assert bool(cond["encoder_hidden_states"].isfinite().all())


def test_lists_that_are_no_parts() -> None:
    index = {"vae": ["diffusers", "AutoencoderKL"], "layers": [1, 2], "words": ["a", "b", "c"], "none": [None, None]}
    assert parts_of(index | {"empty": [], "_class_name": ["file", "Class"]}) == ["vae"]


def test_sizes_of_two_numbers_or_none(plain: Path, tmp_path: Path) -> None:
    channels, *native = describe(plain).shape
    for i, size in enumerate(([8, 8], [8, 12], None, [8], "8")):

        def change(config: dict[str, Any], size: Any = size) -> None:
            config["sample_size"] = size

        folder = edited(plain, tmp_path / str(i), "unet/config.json", change)
        assert describe(folder, 16).shape == describe(plain, 16).shape
        if size in ([8, 8], [8, 12]):
            assert native == [8, 8] and list(describe(folder).shape) == [channels, *size]
        else:
            with pytest.raises(UserError, match=r"sample_size is .* give --resolution"):
                describe(folder)


def test_a_vae_config_without_what_is_the_default(plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path / "vae", "vae/config.json", lambda config: config.pop("latent_channels"))
    assert describe(folder).shape == describe(plain).shape


def test_a_network_that_also_reads_a_mask_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path / "inpainting", "unet/config.json", lambda config: config.update(in_channels=9))
    with pytest.raises(UserError, match="takes 9 channels and the VAE gives 4"):
        describe(folder)


def test_what_is_no_pipeline_says_what_it_is(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds a LoRA.*fuse_lora"):
        family_of(tmp_path / "lora")
    with pytest.raises(UserError, match="holds one network"):
        family_of(plain / "unet")
    with pytest.raises(UserError, match="from_single_file"):
        local_folder(str(tmp_path / "model.safetensors"))


def test_a_half_text_encoder_is_copied_to_load_in_float32(tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    pipeline = stable_diffusion()
    pipeline.text_encoder.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    copy_part(tmp_path / "half", tmp_path / "copy")
    assert stored_dtypes(tmp_path / "copy")[1] is torch.bfloat16
    assert CLIPTextModel.from_pretrained(tmp_path / "copy").dtype is torch.float32
    assert CLIPTextModel.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16).dtype is torch.bfloat16
