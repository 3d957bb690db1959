"""`diffdistill prune`: which blocks go, what is left of the network, and a training that takes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffdistill import UserError, distill, encode, load_teacher, prune
from diffdistill.commands.cli import main
from diffdistill.players.pruning import block_lists, least_important, skipped, without_blocks
from tests import tiny, tiny_a

Teachers = Callable[[str], Path]


def test_of_a_unet_each_level_loses_its_second_block(tmp_path: Path) -> None:
    made = prune("digits", keep=0.5, out=tmp_path / "small", device="cpu")
    network: Any = load_teacher(made).denoiser.network
    whole: Any = load_teacher("digits").denoiser.network
    assert network.config.layers_per_block == 1 and whole.config.layers_per_block == 2
    assert [len(block.resnets) for block in (*network.down_blocks, *network.up_blocks)] == [1, 1, 2, 2]
    kept, own = network.state_dict(), whole.state_dict()
    for ours, theirs in (
        ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv1.weight"),
        ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.0.resnets.2.conv1.weight"),
        ("mid_block.resnets.1.conv1.weight", "mid_block.resnets.1.conv1.weight"),
    ):
        assert torch.equal(kept[ours], own[theirs])


def test_a_training_takes_it(tmp_path: Path) -> None:
    made = prune("digits", out=tmp_path / "small", device="cpu")
    options: dict[str, Any] = {"batch_size": 2, "steps": 1, "sample_every": 0, "device": "cpu"}
    run = distill("boot", student=made, options={"solver_steps": 2}, **options, out=tmp_path / "run")
    network: Any = load_teacher(made).denoiser.network
    weights = sum(p.numel() for p in network.parameters())
    from safetensors.torch import load_file

    saved = load_file(run.student / "unet/diffusion_pytorch_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == weights


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A DiT of five blocks, of which the second and the fourth hardly do anything."""
    pipeline = tiny.PIPELINES["dit"]()
    old: Any = pipeline.transformer
    torch.manual_seed(0)
    network: Any = type(old).from_config(dict(old.config) | {"num_layers": 5})
    for p in network.parameters():
        p.data = 0.1 * torch.randn_like(p)
    for k in (1, 3):
        for p in network.transformer_blocks[k].parameters():
            p.data *= 0.5
    pipeline.register_modules(transformer=network)
    pipeline.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_of_a_transformer_the_least_important_blocks_go(deep: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["prune", str(deep), "--keep", "0.6", "--out", str(tmp_path / "small"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out
    assert "transformer_blocks.1: " in lines and lines.count("taken out") == 2
    teacher, smaller = load_teacher(deep), load_teacher(tmp_path / "small")
    whole: Any = teacher.denoiser.network
    assert len(smaller.denoiser.network.transformer_blocks) == 3  # type: ignore[arg-type]
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.4, 1.2]).double()
    cond = teacher.sample_cond(2)
    with torch.no_grad(), skipped(whole.transformer_blocks[1]), skipped(whole.transformer_blocks[3]):
        expected = teacher.denoiser(x, t, cond).y
    with torch.no_grad():
        assert torch.allclose(smaller.denoiser(x, t, cond).y, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(teacher.denoiser(x, t, cond).y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart_sigma", "sana", "qwen_image", "z_image", "wan"])
def test_every_kind_of_transformer_stays_one(name: str) -> None:
    """Without a block it is the whole one with that block skipped, whichever list it is from."""
    network: Any = tiny.PIPELINES[name]().transformer
    lists = block_lists(network)
    for entry in lists:
        blocks = network.get_submodule(entry)
        smaller: Any = without_blocks(network, {entry: {0}})
        assert len(smaller.get_submodule(entry)) == len(blocks) - 1
        own, kept = blocks[1].state_dict(), smaller.get_submodule(entry)[0].state_dict()
        assert all(torch.equal(own[key], value) for key, value in kept.items())
    assert lists or all(len(part) < 2 for part in network.children() if isinstance(part, nn.ModuleList))


def test_of_a_text_to_image_model_by_its_prompts(tmp_path: Path) -> None:
    folder, size = tmp_path / "teacher", {"resolution": tiny.SIZES["sd3"]}
    tiny.PIPELINES["sd3"]().save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n", encoding="utf-8")
    shared: dict[str, Any] = {"teacher": str(folder), "device": "cpu", **size}
    prompts = encode(**shared, prompts=str(tmp_path / "prompts.txt"), out=tmp_path / "encoded")
    made = prune(folder, prompts=prompts, out=tmp_path / "small", count=2, sampling_steps=2, device="cpu")
    options: dict[str, Any] = {"batch_size": 2, "steps": 1, "sample_every": 0, "options": {"solver_steps": 2}}
    run = distill("boot", **shared, **options, student=made, prompts=prompts, out=tmp_path / "run")
    assert json.loads((run.student / "transformer/config.json").read_text())["num_layers"] == 1
    assert json.loads((folder / "transformer/config.json").read_text())["num_layers"] == 2


def test_the_least_important_of_all_lists_and_one_of_each_stays() -> None:
    scores = {"a": [0.1, 0.2, float("inf")], "b": [0.3, 0.05]}
    assert least_important(scores, 2) == {"a": {0}, "b": {1}}
    assert least_important(scores, 3) == {"a": {0, 1}, "b": {1}}
    assert least_important({"a": [1.0, 2.0]}, 5) == {"a": {0}}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep: 0.9 of 2 blocks in each level leaves them all; give less"):
        prune("digits", keep=0.9, out=tmp_path / "small")
    with pytest.raises(UserError, match=r"keep: 1\.0 must be less than 1"):
        prune("digits", keep=1.0, out=tmp_path / "small")
    tiny.PIPELINES["sd3"]().save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="prompts: the blocks of a text-to-image teacher are compared with prompts"):
        prune(tmp_path / "text", out=tmp_path / "small")
    tiny_a.consistency_model().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"keep: 0.5 of 1 blocks in each level leaves them all"):
        prune(tmp_path / "teacher", out=tmp_path / "small")
