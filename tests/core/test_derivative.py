"""The derivative along a trajectory by the product and by differences: their errors, and which is nearer the truth."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.jvp import derivative, nearer_derivative

Kind = Literal["central", "backward", "semi"]


class Network(nn.Module):
    """An MLP of x (B, 4) and sines and cosines of `scale` times t."""

    def __init__(self, scale: float, dropout: float = 0.0):
        super().__init__()
        self.frequencies = scale * torch.exp(-math.log(1e4) * torch.arange(16) / 16)
        widths = (36, 96, 96, 4)
        layers = [[nn.Linear(a, b), nn.SiLU(), nn.Dropout(dropout)] for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*[layer for group in layers for layer in group][:-2])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = (t[:, None] * self.frequencies.to(t)).to(x)
        return self.layers(torch.cat([x, phases.sin(), phases.cos()], -1))


def samples(n: int) -> tuple[Tensor, Tensor, Tensor]:
    x, v = torch.randn(2, n, 4, dtype=torch.float64)
    return x, 0.2 + torch.rand(n, dtype=torch.float64), v


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("kind", "order"), [("central", 2), ("backward", 1), ("semi", 1)])
@torch.no_grad()
def test_the_order_of_differences(kind: Kind, order: int) -> None:
    torch.manual_seed(0)
    network = Network(1.0).double()
    x, t, v = samples(64)
    exact = derivative(network, x, t, v)
    errors = [apart(derivative(network, x, t, v, kind, h), exact) for h in (0.02, 0.01, 0.005)]
    assert errors[0] < 0.1
    for error, half in pairwise(errors):
        assert math.log2(error / half) == pytest.approx(order, abs=0.1)


@torch.no_grad()
def test_a_channel_of_an_embedding_is_damped_by_the_sinc_of_its_frequency() -> None:
    x, t, v = samples(16)
    for omega, h in ((1000.0, 0.005), (562.0, 0.005), (10.0, 0.05)):

        def channel(x: Tensor, t: Tensor, omega: float = omega) -> Tensor:
            return (omega * t).sin()[:, None].expand_as(x)

        ratio = derivative(channel, x, t, v, "central", h) / derivative(channel, x, t, v)
        assert torch.allclose(ratio, torch.full_like(ratio, math.sin(omega * h) / (omega * h)), atol=1e-10)


@torch.no_grad()
def test_backward_is_exact_on_what_turns_with_t() -> None:
    """As the velocity of one x0 and eps does, whose derivative is -x_t."""
    x, t, v = samples(16)
    x0, eps = t.cos()[:, None] * x - t.sin()[:, None] * v, t.sin()[:, None] * x + t.cos()[:, None] * v

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return t.cos()[:, None] * eps - t.sin()[:, None] * x0

    for h in (0.3, 0.01):
        assert torch.allclose(derivative(velocity, x, t, v, "backward", h), -x, atol=1e-12)
        value = velocity(x, t)
        assert torch.allclose(derivative(velocity, x, t, v, "backward", h, value=value), -x, atol=1e-12)


@pytest.mark.parametrize("kind", ["central", "backward", "semi"])
@torch.no_grad()
def test_no_pass_leaves_the_range_of_times(kind: Kind) -> None:
    seen: list[Tensor] = []

    def function(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x * t[:, None] ** 2

    x, _, v = samples(5)
    t = torch.tensor([0.1, 0.11, 0.5, 1.19, 1.2], dtype=torch.float64)
    result = derivative(function, x, t, v, kind, 0.05, times=(0.1, torch.full_like(t, 1.2)))
    assert all(((times >= 0.1 - 1e-12) & (times <= 1.2 + 1e-12)).all() for times in seen)
    assert apart(result, derivative(function, x, t, v)) < 0.2


@torch.no_grad()
def test_differences_need_one_mask_for_all_passes() -> None:
    torch.manual_seed(0)
    network = Network(1.0, dropout=0.2).double()
    x, t, v = samples(64)
    exact = derivative(network, x, t, v, seed=5)
    assert apart(derivative(network, x, t, v, "central", 1e-3, seed=5), exact) < 1e-3
    assert apart(derivative(network, x, t, v, "central", 1e-3), exact) > 10


@torch.no_grad()
def test_half_precision_samples_move_in_float32() -> None:
    torch.manual_seed(0)
    network = Network(1.0)
    x, t, v = samples(64)
    half = derivative(lambda x, t: network(x, t), x.bfloat16(), t, v.bfloat16(), "central", 0.05)
    whole = derivative(network.double(), x.bfloat16().double(), t, v.bfloat16().double(), "central", 0.05)
    assert half.dtype == torch.float32
    assert apart(half.double(), whole) < 1e-3


def mixture_velocity(means: Tensor, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, t) of equal Gaussians in four dimensions."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos()[:, None].to(x), t.sin()[:, None].to(x)
        variance = cos**2 * std**2 + sin**2
        gaps = x[:, None] - cos[..., None] * means.to(x)
        shares = (-gaps.square().sum(-1) / (2 * variance)).softmax(-1)
        x0 = (shares[..., None] * (means.to(x) + (cos * std**2 / variance)[..., None] * gaps)).sum(1)
        return cos * (x - cos * x0) / sin - sin * x0

    return velocity


@pytest.mark.parametrize(("scale", "choice"), [(1.0, "exact"), (2000 / math.pi, "central")])
def test_the_choice_is_the_one_nearer_the_truth(scale: float, choice: str) -> None:
    """Two networks fitted to a known velocity, one that reads the angle and one that reads 0..1000."""
    torch.manual_seed(0)
    means = torch.randn(3, 4)
    velocity = mixture_velocity(means, 0.3)

    def noised(n: int) -> tuple[Tensor, Tensor]:
        t = 0.1 + torch.rand(n) * (math.pi / 2 - 0.2)
        x0 = means[torch.randint(3, (n,))] + 0.3 * torch.randn(n, 4)
        return t.cos()[:, None] * x0 + t.sin()[:, None] * torch.randn(n, 4), t

    network, steps = Network(scale), 400
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / steps)
        x, t = noised(256)
        loss = (network(x, t) - velocity(x, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, t = (part.double() for part in noised(512))
    v = velocity(x, t)
    with torch.no_grad():
        truth = derivative(velocity, x, t, v)
        errors = {kind: apart(derivative(network.double(), x, t, v, kind), truth) for kind in ("exact", "central")}
    assert nearer_derivative(network, x, t, v) == choice
    if choice == "central":
        assert errors["central"] < errors["exact"] / 4
    else:
        assert errors["exact"] < 1.02 * errors["central"]
