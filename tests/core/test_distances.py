"""Distances: their values, the data's units, and LPIPS where its package is or is not there."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError
from diffdistill.core.distances import distance


def test_l1_l2_and_huber_are_in_the_datas_units() -> None:
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert torch.allclose(distance("l2", (1, 2, 2), 0.5)(x, y), torch.tensor([0.25, 2.25]))
    assert torch.allclose(distance("l1", (1, 2, 2), 0.5)(x, y), torch.tensor([0.5, 1.5]))
    huber = distance("huber", (1, 2, 2), 0.5, 0.3)(x, y)
    assert torch.allclose(huber, (torch.tensor([1.0, 3.0]) ** 2 + 0.09).sqrt() - 0.3)
    c = 0.00054 * 2
    default = distance("huber", (1, 2, 2))(x, y)
    assert torch.allclose(default, (torch.tensor([2.0, 6.0]) ** 2 + c**2).sqrt() - c)
    with pytest.raises(ValueError, match="'l3' is not"):
        distance("l3", (1, 2, 2))


class Fake(nn.Module):
    """Stands for lpips.LPIPS: records its images, and gives (B, 1, 1, 1) as that does."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()
        assert net == "vgg" and not verbose
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen += [x, y]
        return (self.weight * (x - y).square()).mean((1, 2, 3), keepdim=True)


def module(make: Any) -> ModuleType:
    lpips = ModuleType("lpips")
    lpips.LPIPS = make  # type: ignore[attr-defined]
    return lpips


@pytest.mark.parametrize(("shape", "side"), [((1, 8, 8), 224), ((3, 256, 256), 256)])
def test_lpips_sees_colour_images_of_224_pixels_or_more(
    shape: tuple[int, ...], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Fake] = []
    monkeypatch.setitem(sys.modules, "lpips", module(lambda **kw: made.append(Fake(**kw)) or made[0]))
    x, y = torch.full((2, *shape), 2.0, requires_grad=True), torch.zeros(2, *shape)
    got = distance("lpips", shape, 0.5)(x, y)
    assert got.shape == (2,) and torch.allclose(got, torch.ones(2)), "in the data's units, 2 is 1"
    assert made[0].seen[0].shape == (2, 3, side, side) and not made[0].training
    got.sum().backward()
    assert made[0].weight.grad is None and math.isclose(float(x.grad.sum()), 2.0, rel_tol=1e-4)  # type: ignore[union-attr]


def test_lpips_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(**kw: Any) -> None:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="lpips is not installed; pip install lpips torchvision, or use l2"):
        distance("lpips", (1, 8, 8))
    monkeypatch.setitem(sys.modules, "lpips", module(no_weights))
    with pytest.raises(UserError, match=r"needs torchvision's vgg16-397923af.pth in .*checkpoints"):
        distance("lpips", (1, 8, 8))
    with pytest.raises(UserError, match="samples are of shape"):
        distance("lpips", (4, 8, 8))
