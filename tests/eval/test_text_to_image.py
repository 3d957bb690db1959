"""Text-to-image pipelines, and the metrics of their protocols, against scipy and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from diffdistill.commands.cli import main
from diffdistill.eval.features.inception import Inception
from diffdistill.pictures import save_png
from tests import tiny_a
from tests.eval.test_inception import randomise


def test_a_text_to_image_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any stock pipeline: captions in, its own call, 8 bit, the protocol's size by its filter."""
    tiny_a.PIPELINES["stable_diffusion"]().save_pretrained(tmp_path / "sd")
    values = {
        "title": "t", "conditions": ["prompts"], "prompts": "p.txt", "count": 12, "resolution": 32, "channels": 3,
        "resize": "lanczos",
        "metrics": [{"name": "colour", "kind": "mean", "measure": "attributes", "column": "colour"}],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "p.txt").write_text("a red circle in the middle\n" * 12)
    command = ["eval", str(tmp_path / "sd"), "--protocol", str(tmp_path / "p.yaml"), "--steps", "2"]
    assert main([*command, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= report["rows"][0]["colour"] <= 1 and report["rows"][0]["steps"] == 2
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 300
    # A caption that is none of a shape is named; and without --prompts it says where they belong.
    (tmp_path / "p.txt").write_text("two dogs\n" * 12)
    assert main([*command, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "other")]) == 2
    assert "'two dogs' is no caption" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "prompts: nowhere/p.txt is not there" in capsys.readouterr().err


def test_fid_and_clip_score_are_those_of_scipy_and_transformers(tmp_path: Path) -> None:
    """Through the whole command, in Inception and CLIP networks of random weights."""
    inception = Inception()
    randomise(inception)
    save_file(inception.state_dict(), tmp_path / "inception.safetensors")
    tokenizer = tiny_a.clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tiny_a.clip_config(max_position_embeddings=77)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    kinds = {}
    for kind in ("real", "drawn"):
        pixels = np.random.default_rng(len(kind)).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
        kinds[kind] = [Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC) for p in pixels]
        for i, image in enumerate(kinds[kind]):
            save_png(image, tmp_path / kind / f"{i}.png")
    prompts = [f"a picture of {i} things" for i in range(10)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    values = {
        "title": "t", "conditions": ["prompts"], "prompts": "p.txt", "count": 10, "resolution": 32, "channels": 3,
        "reference": "r", "metrics": [
            {"name": "FID", "kind": "frechet", "measure": "inception"},
            {"name": "CLIP score", "kind": "mean", "measure": "clip-score", "column": "score"},
        ],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    command = ["eval", str(tmp_path / "drawn"), "--protocol", str(tmp_path / "p.yaml"), "--bootstrap", "0"]
    command += ["--reference", str(tmp_path / "real"), "--prompts", str(tmp_path / "prompts.txt")]
    command += [
        f"--weights=inception={tmp_path / 'inception.safetensors'}",
        f"--weights=clip-score={tmp_path / 'clip'}",
    ]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = report["rows"]

    with torch.no_grad():
        sets = {
            kind: inception.eval()(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]))
            for kind, images in kinds.items()
        }
    a, b = ((x - x.mean(0)).double().numpy() / 3 for x in sets.values())  # a' a is the covariance of ten images
    shift = (sets["real"].double().mean(0) - sets["drawn"].double().mean(0)).square().sum().item()
    # The trace of the root of a product of covariances a'a b'b is the sum of the singular values of a b'.
    expected = shift + (a**2).sum() + (b**2).sum() - 2 * scipy.linalg.svdvals(a @ b.T).sum()
    assert row["FID"] == pytest.approx(expected, rel=1e-5)
    assert "TensorFlow 1 bilinear to 299, 8 bit" in report["metrics"]["FID"]

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        embedded = clip(
            pixel_values=processor(kinds["drawn"], return_tensors="pt")["pixel_values"],
            **tokenizer(prompts, padding=True, return_tensors="pt"),
        )
    cosines = (embedded.image_embeds * embedded.text_embeds).sum(1)
    assert row["CLIP score"] == pytest.approx(100 * cosines.clamp_min(0).double().mean().item(), rel=1e-5)
