"""The time to jump to as a second input of a network that stays the same class.

In the normal form a flow map is an ordinary prediction whose output also depends on r: the DDIM step of the pair (x0,
eps)(x_t, t, r) to the angle r is the map. What the network sees of r is the gap between t and r in fractions of its
schedule's own time. A student's n levels are k/n there, so that all its n jumps have the gap 1/n: what the gap adds is
then a constant, which an export puts into a bias. The exported network is a stock one, for that number of steps; before
the export a student takes any number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.errors import UserError

TIME_LAYERS = ("time_embedding", "timestep_embedder", "time_embedder", "t_embedder")
"""What diffusers' networks call the layers that embed the time, and each block of DiT its own."""


class SecondTime(nn.Module):
    """The last linear layer of a time embedding, which also takes the gap between the two times: W h + b + MLP(gap).

    The MLP has no biases and its features are 0 at the gap 0, so that the network at r = t is always its plain self;
    its last layer begins at zero, so that the network begins as it was for every r. Frequencies are low: a derivative
    with respect to the time is taken. `gap` (B,) is set for one call (`jumping`); without it, it is `default`.
    """

    default: Tensor
    frequencies: Tensor

    def __init__(self, layer: nn.Linear, default: float):
        super().__init__()
        self.layer = layer
        width, like = layer.out_features, layer.weight
        last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(nn.Linear(17, width, bias=False), nn.SiLU(), last).to(like)
        frequencies = torch.pi / 2 * torch.arange(1, 9, dtype=torch.float64)
        self.register_buffer("frequencies", frequencies.to(like), persistent=False)
        self.register_buffer("default", torch.tensor([float(default)]).to(like), persistent=False)
        self.gap: Tensor | None = None

    def of_gap(self, gap: Tensor) -> Tensor:
        """(B,) -> (B, width), what the gap adds to the embedding."""
        gap = gap[:, None].to(self.frequencies)
        phase = gap * self.frequencies
        return self.mlp(torch.cat([gap, phase.sin(), 1 - phase.cos()], 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, in) -> (B, out), or of one row where the whole batch has one time."""
        return self.layer(hidden) + self.of_gap(self.default if self.gap is None else self.gap).to(hidden.dtype)


def second_times(network: nn.Module) -> list[SecondTime]:
    """The layers of a network that take the gap; none of one that has one time."""
    return [module for module in network.modules() if isinstance(module, SecondTime)]


@contextmanager
def jumping(layers: list[SecondTime], gap: Tensor | None) -> Iterator[None]:
    """The layers see that gap inside the block, and after it what they saw before."""
    before = [layer.gap for layer in layers]
    for layer in layers:
        layer.gap = gap
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.gap = value


def time_input(denoiser: Denoiser, *, default: float) -> Denoiser:
    """A copy that takes `Extra.r` (B,), and gives what the denoiser gave for any r until it is trained.

    Without r the gap is `default`, a fraction of the schedule: that of the jumps of the student's sampler. Which
    parameters are trained stays as it was; those of the new part are. Not for LoRA, whose layers are its teacher's too.
    Raises UserError where no layer has one of the names `TIME_LAYERS`.
    """
    twin = copy.deepcopy(denoiser)
    for name, module in list(twin.network.named_modules()):
        if name.rpartition(".")[2] in TIME_LAYERS:
            linear = [(part, layer) for part, layer in module.named_modules() if isinstance(layer, nn.Linear)]
            if linear:
                part, layer = linear[-1]
                twin.network.set_submodule(f"{name}.{part}" if part else name, SecondTime(layer, default))
    layers = second_times(twin.network)
    if not layers:
        raise UserError(
            f"time_input: {type(denoiser.network).__name__} has no layer to which a second time could be added; "
            f"those that embed the time are called {', '.join(TIME_LAYERS)}"
        )
    inner_call, inner_extra = denoiser.call, denoiser.extra_call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        with jumping(second_times(network), extra.gap):
            if inner_extra is not None:
                return inner_extra(network, x, time, cond, extra)
            return inner_call(network, x, time, cond)

    twin.extra_call = call
    return twin


@torch.no_grad()
def with_one_time(denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond) -> nn.Module:
    """A copy of the network with one time, which gives at angles t (n,) what the network gives on the way to r (n,).

    For jumps of several lengths, which no bias can say. What their gaps add goes into the last layer of each time
    embedding, by the least change of its weights that is exact at these n times: a function of the time, as r is one.
    x_t (n, ...) and `cond` are any that the network takes.
    """
    seen: dict[SecondTime, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(module, SecondTime) and module.gap is not None
        seen[module] = args[0].expand(len(t), -1).double(), module.of_gap(module.gap).double()

    handles = [module.register_forward_pre_hook(keep) for module in second_times(denoiser.network)]
    denoiser(x_t, t, cond, Extra(r=r))
    for handle in handles:
        handle.remove()
    plain = copy.deepcopy(denoiser.network)
    for name, module in denoiser.network.named_modules():
        if isinstance(module, SecondTime):
            hidden, added = seen[module]
            change = torch.linalg.pinv(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)) @ added
            layer = copy.deepcopy(module.layer)
            layer.weight += change[:-1].T.to(layer.weight)
            bias = change[-1].to(layer.weight)
            layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias, requires_grad=False)
            plain.set_submodule(name, layer)
    return plain


def without_second_time(network: nn.Module) -> nn.Module:
    """A copy with one time, which gives the same at the default gap; the network itself where it has no second time."""
    if not second_times(network):
        return network
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, SecondTime):
            with torch.no_grad():
                added = module.of_gap(module.default)[0]
                bias = added if module.layer.bias is None else module.layer.bias + added
            module.layer.bias = nn.Parameter(bias, requires_grad=False)
            plain.set_submodule(name, module.layer)
    return plain
