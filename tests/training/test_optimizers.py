"""Muon: orthogonal updates of matrices at AdamW's size, AdamW for the rest, and the same bits after a resume."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffdistill import UserError, distill
from diffdistill.scaffold.method import Optimizer
from diffdistill.training.optimizers import optimizer

RATE = 0.01


class Player(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.kernel = nn.Linear(6, 24), nn.Conv2d(8, 12, 3)
        self.table, self.norm, self.last = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Conv2d(8, 1, 3)


def stepped(kind: str, player: nn.Module, times: int = 1) -> dict[str, torch.Tensor]:
    """How far each parameter went in so many steps with the same gradients."""
    settings = Optimizer(RATE, betas=(0.9, 0.999), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in player.named_parameters()}
    moving = optimizer(kind, [list(player.parameters())], settings, player)
    draw = torch.Generator().manual_seed(1)
    grads = {name: torch.randn(p.shape, generator=draw) for name, p in player.named_parameters()}
    for _ in range(times):
        for name, p in player.named_parameters():
            p.grad = grads[name].clone(memory_format=torch.preserve_format)
            if p.ndim == 4 and not p.is_contiguous():
                p.grad = p.grad.to(memory_format=torch.channels_last)
        moving.step()
    return {name: p.detach() - before[name] for name, p in player.named_parameters()}


def test_matrices_get_nearly_orthogonal_updates_along_the_gradient() -> None:
    moved = stepped("muon", Player())
    for name, shape in (("inner.weight", (24, 6)), ("kernel.weight", (12, 72))):
        update = moved[name].reshape(shape)
        scaled = torch.linalg.svdvals(update) / (RATE * 0.2 * max(shape) ** 0.5)
        assert float(scaled.min()) > 0.6 and float(scaled.max()) < 1.3, name  # its five iterations leave such a spread
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * RATE, rel=0.15)  # AdamW's usual size
    draw = torch.Generator().manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(24, 6, generator=draw), full_matrices=False)
    nearest = -left @ right
    update = moved["inner.weight"]
    assert float((update * nearest).sum() / update.norm() / nearest.norm()) > 0.97


def test_all_else_moves_as_with_adamw() -> None:
    ours, theirs = stepped("muon", Player(), 3), stepped("adamw", Player(), 3)
    for name in ("inner.bias", "kernel.bias", "table.weight", "norm.weight", "norm.bias", "last.weight", "last.bias"):
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("inner.weight", "kernel.weight"):
        assert not torch.allclose(ours[name], theirs[name])


def test_where_the_channels_lie_changes_nothing_but_rounding() -> None:
    other = Player().to(memory_format=torch.channels_last)
    assert not other.kernel.weight.is_contiguous()
    one, two = stepped("muon", Player(), 2)["kernel.weight"], stepped("muon", other, 2)["kernel.weight"]
    assert float((one - two).norm() / one.norm()) < 0.02  # of bfloat16


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"optimizer": "muon", "steps": 6, "checkpoint_every": 3, "sample_every": 0, "batch_size": 4}
    distill("dmd2", out=str(run), threads=1, device="cpu", **options)
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "again" / "student")
    distill(resume=tmp_path / "again")
    files = sorted((run / "checkpoints" / "step-00000006").glob("*.safetensors"))
    assert any("|momentum_buffer" in key for file in files for key in load_file(file))
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / "checkpoints" / file.parent.name / file.name).read_bytes()


def test_what_muon_does_not_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="offload: model moves AdamW's moments, and not those of muon; use none"):
        distill("dmd2", optimizer="muon", offload="model", steps=1, out=str(tmp_path / "run"))
