"""The benchmark of memory measures every kind of player that it names."""

from pathlib import Path

import pytest
import torch

from diffdistill.eval.benchmarks import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 16 times fewer channels, and its prompts."""
    path = tmp_path_factory.mktemp("memory")
    tiny = memory.Network(
        "stable_diffusion",
        {"sample_size": 16, "block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 16},
        {"encoder_hidden_states": (7, 16)},
        4,
    )
    memory.prepare(path, tiny, 128, torch.float32)
    return path


def test_a_fake_score_for_each_level_costs_a_network_or_a_lora(folder: Path) -> None:
    rows = {kind: memory.measure(folder, kind, "float32", 1, "cpu") for kind in memory.KINDS}
    one, lora = rows["full"]["trained MB"] / 2, rows["lora"]["trained MB"] / 2  # of student and fake score
    assert rows["full"]["weights MB"] == pytest.approx(3 * one)  # the teacher is the third
    assert rows["lora"]["weights MB"] == pytest.approx(one + 2 * lora)
    assert rows["full, four fake scores"]["weights MB"] == pytest.approx(6 * one)
    assert rows["lora, four fake scores"]["weights MB"] == pytest.approx(one + 5 * lora)
