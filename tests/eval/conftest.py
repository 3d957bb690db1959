"""Fixtures of evaluations by a small protocol."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model

from diffdistill.commands.cli import main
from tests import tiny_a
from tests.eval.sixty import PROTOCOL, Run


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_DATA", "nowhere")


@pytest.fixture
def protocol(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "sixty.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (PROTOCOL | changes).items() if v is not None}))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: Callable[[str], Path], protocol: Callable[..., str]) -> Run:
    """Options of the command -> the report; the model is an untrained teacher of digits in two steps."""

    def evaluate(out: str, folder: object = None, *more: str, **changes: Any) -> dict[str, Any]:
        teacher = folder or tiny_teacher("v")
        steps = () if folder else ("--steps", "2")
        where = tmp_path / out
        command = ["eval", str(teacher), "--protocol", protocol(**changes), *steps, "--out", str(where), *more]
        assert main(command) == 0
        return json.loads((where / "results.json").read_text())

    return evaluate


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of 32x32 images with its tokenizer and image processor, as a folder."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tiny_a.clip_config(max_position_embeddings=77)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_a.clip_tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2") / "tiny-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder
