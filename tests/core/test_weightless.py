"""Networks without values: what is held and computed is what a real call would hold and compute."""

import torch
from torch import nn
from torch.nn import functional

from diffdistill.core.weightless import Weightless


def test_a_linear_layers_memory_and_operations() -> None:
    layer, empty = nn.Linear(100, 40), Weightless()
    empty.bare([layer])
    with empty:
        before = empty.restart()
        y = layer(torch.randn(8, 100))
        assert (empty.held - before, empty.flops) == (4 * 8 * 40, 2 * 8 * 100 * 40)
        y.sum().backward()
        assert empty.flops == 4 * 8 * 100 * 40  # of the input there is no gradient
        gradients = 4 * (100 * 40 + 40)
        assert 0 <= empty.held - before - 4 * 8 * 40 - gradients <= 8  # the sum and its gradient
        del y
        layer.zero_grad()
        assert empty.held - before <= 8 and empty.most - before >= gradients


def test_what_has_values_keeps_them() -> None:
    layer, empty = nn.Linear(3, 3), Weightless()
    empty.bare([layer])
    with empty:
        grid = torch.linspace(1, 0, 5)
        assert bool((grid.diff() < 0).all()) and empty.held == 0
        assert layer(grid[None, :3]).shape == (1, 3)
        assert grid.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_modules_that_share_a_weight_share_it_still() -> None:
    first, second, empty = nn.Linear(3, 3), nn.Linear(3, 3), Weightless()
    second.weight = first.weight
    empty.bare([first])
    empty.bare([second])
    assert first.weight is second.weight


def test_attention_is_counted_and_holds_no_square() -> None:
    layer, empty = nn.Linear(16, 16), Weightless()
    empty.bare([layer])
    with empty:
        x = layer(torch.randn(1, 2, 512, 16))
        before = empty.restart()
        functional.scaled_dot_product_attention(x, x, x).sum().backward()
    assert empty.flops > 4 * 2 * 512 * 512 * 16
    assert empty.most - before < 4 * 2 * 512 * 512


def test_a_masks_values_say_how_many_there_are() -> None:
    layer, empty = nn.Linear(3, 3), Weightless()
    empty.bare([layer])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with empty:
        assert layer(torch.randn(2, 3, 3))[mask].shape == (5, 3)
        assert layer(torch.randn(2, 3, 3))[:, mask[0]].shape == (2, 2, 3)


def test_a_table_beside_the_buffers_has_no_values_either() -> None:
    layer, empty = nn.Linear(3, 3, device="meta"), Weightless()
    layer.table = torch.ones(3, device="meta")
    empty.bare([layer])
    with empty:
        assert (layer(torch.ones(2, 3)) + layer.table.to("cpu")).shape == (2, 3)
