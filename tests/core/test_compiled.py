"""Tangents of compiled networks, and of what is compiled around them: those of the network itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.jvp import jvp
from diffdistill.core.recompute import recomputed


class Net(nn.Module):
    """Attention and a norm, which torch itself has no forward derivative for, or a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.first(x)
        return self.last(self.norm(F.scaled_dot_product_attention(q, q, x)).tanh())


def block_of(net: Any) -> Callable[[Tensor], Tensor]:
    def again(x: Tensor) -> Tensor:
        return recomputed(net, (x,), net.parameters())

    return again


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


WAYS: dict[str, Callable[[Net], Callable[..., Any]]] = {
    "the network": lambda net: torch.compile(net, backend="aot_eager"),
    "in place": compiled_in_place,
    "a block that is computed again": lambda net: block_of(compiled_in_place(net)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_networks_tangent(way: str) -> None:
    torch.manual_seed(0)
    net = Net()
    x, v, cotangent = torch.randn(3, 2, 1, 5, 8)
    expected = jvp(net, (x,), (v,))
    plain = net(x)
    grads = torch.autograd.grad(expected, list(net.parameters()), (cotangent, cotangent))
    torch._dynamo.reset()
    other = WAYS[way](net)
    assert torch.allclose(other(x), plain, atol=1e-6), "compiled outside of a product"
    for _ in range(2):
        got = jvp(other, (x,), (v,))
        assert torch.allclose(got[0], expected[0], atol=1e-6) and torch.allclose(got[1], expected[1], atol=1e-6)
        assert float(got[1].abs().max()) > 1e-2
        again = torch.autograd.grad(got, list(net.parameters()), (cotangent, cotangent))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, grads, strict=True))
        assert torch.allclose(other(x), plain, atol=1e-6)


def test_a_product_inside_a_compiled_function() -> None:
    torch.manual_seed(0)
    net = Net()
    x, v = torch.randn(2, 2, 1, 5, 8)
    expected = jvp(net, (x,), (v,))
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def both(x: Tensor, v: Tensor) -> Any:
        return jvp(net, (2 * x / 2,), (v,))

    for ours, right in zip(both(x, v), expected, strict=True):
        assert torch.allclose(ours, right, atol=1e-6)
