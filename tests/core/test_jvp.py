"""Products with the Jacobian of whatever networks are made of, and what is said where there is none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.jvp import forward_derivatives, jvp
from diffdistill.errors import UserError


def central(function: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor, h: float = 1e-5) -> Tensor:
    with torch.no_grad():
        return (function(x + h * dx) - function(x - h * dx)) / (2 * h)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (lambda: nn.GroupNorm(4, 8), (2, 8, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm((4, 8)), (2, 3, 4, 8)),
    "layer norm without weights": (lambda: nn.LayerNorm(8, elementwise_affine=False), (2, 3, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), (2, 3, 8)),
    "softmax": (lambda: nn.Softmax(1), (2, 5, 3)),
    "multi-head attention": (lambda: Heads(), (2, 5, 8)),
}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.inner(x, x, x, need_weights=False)
        assert weights is None
        return out


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_right_tangents_with_right_gradients(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    before = torch.randn(shape[-1], shape[-1], dtype=torch.float64)
    x, dx, g = torch.randn(3, *shape, dtype=torch.float64)

    def tangent(weight: Tensor) -> Tensor:
        return jvp(lambda x: layer(x @ weight), (x,), (dx,))[1]

    output, along = jvp(lambda x: layer(x @ before), (x,), (dx,))
    assert torch.allclose(output, layer(x @ before), atol=1e-12)
    assert torch.allclose(along, central(lambda x: layer(x @ before), x, dx), atol=1e-7)
    # Of layer_norm and softmax it is this that torch itself has wrong or not at all.
    if name == "multi-head attention":  # which takes no notice of what is put in the place of softmax
        return
    weight = before.clone().requires_grad_()
    (grad,) = torch.autograd.grad((tangent(weight) * g).sum(), weight)
    step = torch.randn_like(before)
    assert (grad * step).sum() == pytest.approx((central(tangent, before, step) * g).sum().item(), abs=1e-6)


def test_channels_last_and_autocast() -> None:
    """Samples as convolutions like them; and a float32 tangent where the trainer's passes are in bfloat16."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
    x, dx = torch.randn(2, 2, 4, 8, 8)
    expected = jvp(network, (x,), (dx,))
    last = [part.contiguous(memory_format=torch.channels_last) for part in (x, dx)]
    network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
        got = jvp(network, last[:1], last[1:])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=1e-5)
    half = network.bfloat16()
    output, tangent = jvp(half, (x.bfloat16(),), (dx,))
    assert output.dtype == tangent.dtype == torch.bfloat16
    assert (tangent - expected[1]).norm() / expected[1].norm() < 0.02


def test_no_tangent_and_no_graph() -> None:
    layer = nn.Linear(3, 3)
    x, dx = torch.randn(2, 5, 3)
    (first, second), (change, none) = jvp(lambda x, y: (layer(x) * y, y), (x, x), (dx, None))
    assert first.requires_grad and change.requires_grad and not none.any()
    assert torch.equal(second, x)
    with torch.no_grad():
        output, tangent = jvp(layer, (x,), (dx,))
    assert not output.requires_grad and not tangent.requires_grad
    assert torch.allclose(tangent, dx @ layer.weight.T)


def test_nothing_of_it_is_left_outside() -> None:
    parts = torch.randn(3, 1, 2, 5, 4)
    with forward_derivatives():
        inside = F.scaled_dot_product_attention(*parts.requires_grad_())
    outside = F.scaled_dot_product_attention(*parts)
    assert "_Attention" in type(inside.grad_fn.next_functions[0][0]).__name__ + type(inside.grad_fn).__name__
    assert "ScaledDotProduct" in type(outside.grad_fn).__name__
    with pytest.raises(ZeroDivisionError), forward_derivatives():
        _ = 1 / 0
    assert "ScaledDotProduct" in type(F.scaled_dot_product_attention(*parts).grad_fn).__name__


class Network(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), inner])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x).sqrt()


class Sort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x)


class Opaque(torch.autograd.Function):
    """Twice its input, without a forward derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize(
    ("inner", "line"),
    [
        (Sort(), r"derivative: blocks\.1 \(Sort\) has no forward derivative \(.+\); take --derivative central"),
        (
            Root(),
            r"derivative: the tangent of blocks\.1 \(Root\) is not finite; take --derivative central, or float32.+",
        ),
    ],
)
def test_the_layer_that_has_none_is_named(inner: nn.Module, line: str) -> None:
    x, dx = torch.randn(2, 3, 4)
    with pytest.raises(UserError, match=f"^{line}$"):
        jvp(Network(inner), (x,), (dx,))


def test_a_network_whose_output_is_not_finite_is_named_too() -> None:
    network = Network(nn.Linear(4, 4))
    nn.init.constant_(network.blocks[0].weight, float("nan"))  # type: ignore[arg-type]
    x, dx = torch.randn(2, 3, 4)
    with pytest.raises(UserError, match=r"^derivative: the output of blocks\.0 \(Linear\) is not finite; "):
        jvp(network, (x,), (dx,))
    assert jvp(network, (x,), (dx,), check=False)[1].isnan().any()
