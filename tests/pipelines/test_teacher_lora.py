"""LoRA files as part of the teacher: the merged teacher is what stock diffusers makes of base and files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from diffdistill import UserError, distill, load_teacher
from tests.players.conftest import encoded
from tests.players.test_player_kinds import options_for

__all__ = ["encoded"]
Encoded = Callable[[str], tuple[Path, Path]]


def lora_file(base: Path, path: Path, seed: int, where: str = "unet", kohya: bool = False) -> Path:
    """A LoRA of rank 2 on the queries of a network, as diffusers or as kohya's scripts write it, with an alpha."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    draw, weights = torch.Generator().manual_seed(seed), {}
    for name, layer in pipeline.unet.named_modules():
        if name.endswith("to_q"):
            wide, out = layer.in_features, layer.out_features
            stem, down, up = f"{where}.{name}", "lora_A", "lora_B"
            if kohya:
                stem, down, up = f"lora_{stem.replace('.', '_')}", "lora_down", "lora_up"
                weights[f"{stem}.alpha"] = torch.tensor(0.5)
            weights[f"{stem}.{down}.weight"] = torch.randn(2, wide, generator=draw)
            weights[f"{stem}.{up}.weight"] = torch.randn(out, 2, generator=draw)
    save_file(weights, path)
    return path


def test_the_merged_teacher_is_that_of_stock_diffusers(encoded: Encoded, tmp_path: Path) -> None:
    base, prompts = encoded("sd_v")
    one, two = (lora_file(base, tmp_path / f"style{i}.safetensors", i, kohya=i == 2) for i in (1, 2))
    options: dict[str, Any] = options_for(base, prompts, "sd_v", "sid", "lora") | {"out": str(tmp_path / "run")}
    files = [str(one), f"{two}:0.5"]
    student = distill(**options, teacher_lora=files).student
    stock = StableDiffusionPipeline.from_pretrained(base)
    for path, scale in ((one, 1.0), (two, 0.5)):
        stock.load_lora_weights(str(path))
        stock.fuse_lora(lora_scale=scale)
        stock.unload_lora_weights()
    name = f"{base.name}+style1+style2-0.5"
    folder = tmp_path / "run" / name
    merged = load_teacher(folder).denoiser.network.state_dict()
    plain = load_teacher(base).denoiser.network.state_dict()
    assert any(not torch.equal(merged[key], plain[key]) for key in plain)
    for key, value in stock.unet.state_dict().items():
        assert torch.allclose(merged[key], value, atol=1e-6), key
    assert "style2.safetensors (scale 0.5)" in (folder / "README.md").read_text()
    assert name in (student / "README.md").read_text()
    assert json.loads((student / "diffdistill.json").read_text())["teacher"] == name
    assert (folder / "vae").is_dir() and (folder / "tokenizer").is_dir()
    assert distill(resume=tmp_path / "run", steps=3).student == student


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "'.*none.safetensors' is no .safetensors file, nor one with :SCALE"),
        ("text.safetensors", "text.safetensors has something for text_encoder; fuse it into a folder"),
        ("other.safetensors", "other.safetensors (does not fit|cannot be read)"),
    ],
)
def test_files_that_do_not_fit_are_one_line(name: str, message: str, encoded: Encoded, tmp_path: Path) -> None:
    base, prompts = encoded("sd_v")
    lora_file(base, tmp_path / "text.safetensors", 0, "text_encoder")
    wrong = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 7)}
    wrong |= {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(9, 2)}
    save_file(wrong, tmp_path / "other.safetensors")
    options = options_for(base, prompts, "sd_v", "sid", "full") | {"out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=f"teacher_lora: {message}"):
        distill(**options, teacher_lora=[str(tmp_path / name)])


def test_pixels_have_no_lora(tiny_teacher: Callable[[str], Path], encoded: Encoded, tmp_path: Path) -> None:
    file = lora_file(encoded("sd_v")[0], tmp_path / "a.safetensors", 0)
    with pytest.raises(UserError, match="teacher_lora: stock diffusers loads no LoRA on ConsistencyModelPipeline"):
        distill(teacher=str(tiny_teacher("vp")), teacher_lora=[str(file)], data="digits", out=str(tmp_path / "run"))
