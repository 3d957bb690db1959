"""The time to jump to as a second input of a network that stays the same class.

In the normal form a flow map is an ordinary prediction whose output also depends on r: the DDIM step of the pair (x0,
eps)(x_t, t, r) to the angle r is the map. What the network sees of r is the gap between t and r in fractions of its
schedule's own time. A student's n levels are k/n there, so that all its n jumps have the gap 1/n: what the gap adds is
then a constant, which an export puts into a bias. The exported network is a stock one, for that number of steps; before
the export a student takes any number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.experts import Experts
from diffdistill.errors import UserError
from diffdistill.players.call_inputs import Beside, CallInput, InPlace, add_part, add_to_bias, layer_at, taking
from diffdistill.players.lora import LoraNetwork, trained_like

TIME_LAYERS = (
    *("time_embedding", "timestep_embedder", "time_embedder", "t_embedder", "time_step_proj"),
    "time_embeddings",
)
"""What diffusers' networks call the layers that embed the time, and each block of DiT its own."""


class TimeGap(CallInput):
    """What the gap between the two times adds to a network's embedding of the time: MLP(gap).

    The MLP has no biases and its features are 0 at the gap 0, so that the network at r = t is always its plain self;
    its last layer begins at zero, so that the network begins as it was for every r. Frequencies are low: a derivative
    with respect to the time is taken. `given` (B,) is the gap of one call (`taking`); without it, it is `default`.
    `like` (width, ...) says the width of the embedding, type and device.
    """

    frequencies: Tensor

    def __init__(self, like: Tensor, default: float):
        super().__init__()
        self.begin(like, default)

    def begin(self, like: Tensor, default: float) -> None:
        """Makes the layers."""
        width = len(like)
        last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(nn.Linear(17, width, bias=False), nn.SiLU(), last).to(like)
        frequencies = torch.pi / 2 * torch.arange(1, 9, dtype=torch.float64)
        self.register_buffer("frequencies", frequencies.to(like), persistent=False)
        self.register_buffer("default", torch.tensor([float(default)]).to(like), persistent=False)

    def of_gap(self, gap: Tensor) -> Tensor:
        """(B,) -> (B, width), what the gap adds to the embedding."""
        gap = gap[:, None].to(self.frequencies)
        phase = gap * self.frequencies
        return self.mlp(torch.cat([gap, phase.sin(), 1 - phase.cos()], 1))

    def added(self, embedding: Tensor) -> Tensor:
        """The embedding (B, width), or of one row where the whole batch has one time, with what the gap adds."""
        return embedding + self.of_gap(self.default if self.given is None else self.given).to(embedding.dtype)

    def usual(self) -> Tensor:
        """(width,) what the default gap adds."""
        return self.of_gap(self.default)[0]


class SecondTime(InPlace, TimeGap):
    """The last linear layer of a time embedding, which also takes the gap: W h + b + MLP(gap)."""

    def __init__(self, layer: nn.Linear, default: float):
        nn.Module.__init__(self)
        self.layer = layer
        self.begin(layer.weight, default)


class AddedTime(Beside, TimeGap):
    """The same for LoRA players."""

    alone: ClassVar[bool] = True

    def __init__(self, layer: nn.Linear, default: float, name: str):
        TimeGap.__init__(self, trained_like(layer.weight), default)
        self.name = name


def time_layers(network: nn.Module) -> list[str]:
    """The names of the last linear layers of a network's embeddings of the time, a row of which is a sample."""
    names: list[str] = []
    config = getattr(network, "config", None)
    if getattr(config, "causal_condition", False) or getattr(config, "zero_cond_t", False):
        return names  # it embeds the time 0 besides, of the words or images that come with a sample, in the same call
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in TIME_LAYERS:
            inside = [part for part, layer in module.named_modules() if isinstance(layer, nn.Linear)]
            last = [part for part in inside if ".lora_" not in f".{part}"][-1:]
            names += [f"{name}.{part}".removesuffix(".").removesuffix(".base_layer") for part in last]
    return names


def second_times(network: nn.Module) -> list[TimeGap]:
    """The parts of a network that take the gap; none of one that has one time."""
    return [module for module in network.modules() if isinstance(module, TimeGap)]


def time_input(denoiser: Denoiser, *, default: float) -> Denoiser:
    """A copy that takes `Extra.r` (B,), and gives what the denoiser gave for any r until it is trained.

    Without r the gap is `default`, a fraction of the schedule: that of the jumps of the student's sampler. Which
    parameters are trained stays as it was; those of the new part are. A LoRA player is no copy: the new part is its
    own, beside its matrices, and its base does not change. Raises UserError where no layer has one of the names
    `TIME_LAYERS`.
    """
    lora = isinstance(denoiser.network, LoraNetwork)
    network: Any = denoiser.network.base if lora else denoiser.network
    names = time_layers(network)
    if isinstance(network, Experts):
        raise UserError(
            "teacher: its network is two, each for a part of the noise, and a student of two takes no second time; use "
            "a method whose student takes one time"
        )
    if not names:
        raise UserError(
            f"time_input: {type(network).__name__} has no layer to which a second time could be added; "
            f"those that embed the time are called {', '.join(TIME_LAYERS)}"
        )
    twin = denoiser.with_network(denoiser.network, denoiser.feature_layer) if lora else copy.deepcopy(denoiser)
    for name in names:
        add_part(twin.network, name, SecondTime, AddedTime, default)
    inner_call, inner_extra = denoiser.call, denoiser.extra_call

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        with taking(second_times(network), extra.gap):
            if inner_extra is not None:
                return inner_extra(network, x, time, cond, extra)
            return inner_call(network, x, time, cond)

    twin.extra_call = call
    return twin


@torch.no_grad()
def heard(denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of each layer that takes the gap: its inputs (n, in) at angles t (n,) and what r (n,) adds (n, out).

    In float64. x_t (n, ...) and `cond` are any that the network takes.
    """
    network = denoiser.network
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    parts = {name: part for name, part in network.named_modules() if isinstance(part, SecondTime)}
    layers: dict[str, tuple[nn.Module, TimeGap]] = {name: (part, part) for name, part in parts.items()}
    if isinstance(network, LoraNetwork):
        added = [part for part in network.inputs.values() if isinstance(part, AddedTime)]
        layers = {part.name: (layer_at(network.base, part.name), part) for part in added}

    def watch(name: str, layer: nn.Module, part: TimeGap) -> Callable[[], None]:
        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            assert part.given is not None
            seen[name] = args[0].expand(len(t), -1).double(), part.of_gap(part.given).double()

        return layer.register_forward_pre_hook(keep).remove

    undo = [watch(name, *both) for name, both in layers.items()]
    denoiser(x_t, t, cond, Extra(r=r))
    for remove in undo:
        remove()
    return seen


@torch.no_grad()
def with_one_time(denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond) -> nn.Module:
    """A copy of the network with one time, which gives at angles t (n,) what the network gives on the way to r (n,).

    For jumps of several lengths, which no bias can say. What their gaps add goes into the last layer of each time
    embedding, by the least change of its weights that is exact at these n times: a function of the time, as r is one.
    x_t (n, ...) and `cond` are any that the network takes.
    """
    plain = copy.deepcopy(denoiser.network)
    for name, (hidden, added) in heard(denoiser, x_t, t, r, cond).items():
        change = torch.linalg.pinv(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)) @ added
        layer = copy.deepcopy(denoiser.network.get_submodule(f"{name}.layer"))
        assert isinstance(layer, nn.Linear)
        layer.weight += change[:-1].T.to(layer.weight)
        add_to_bias(layer, change[-1])
        plain.set_submodule(name, layer)
    return plain


@torch.no_grad()
def low_rank_changes(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond
) -> dict[str, tuple[Tensor, Tensor]]:
    """`with_one_time` as LoRA has it: A (k, in) and B (out, k) of each layer, k <= n, B A being the change of weights.

    Equal jumps have k = 1, since all their gaps add is the same.
    """
    changes = {}
    for name, (hidden, added) in heard(denoiser, x_t, t, r, cond).items():
        u, s, v = torch.linalg.svd(added, full_matrices=False)
        k = int((s > 1e-9 * s[0]).sum()) or 1
        changes[name] = u[:, :k].T @ torch.linalg.pinv(hidden).T, v[:k].T * s[:k]
    return {name: (down.float().cpu(), up.float().cpu()) for name, (down, up) in changes.items()}


class Change(NamedTuple):
    """Of a linear layer W h + b: B A is added to W and `bias` to b."""

    down: Tensor  #: A (k, in)
    up: Tensor  #: B (out, k)
    bias: Tensor  #: (out,)

    def after(self, other: Change) -> Change:
        """What is to be added to a layer that has the other change, for it to have this one."""
        down, up = torch.cat([self.down, other.down]), torch.cat([self.up, -other.up], 1)
        return Change(down, up, self.bias - other.bias)


@torch.no_grad()
def changes_to_one_time(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond, equal: bool
) -> dict[str, Change]:
    """By the name of each layer that takes the gap, the change with which the network of one time has it.

    As `with_one_time` and `low_rank_changes` make it, or for `equal` jumps `without_inputs`. In float32.
    """
    changes = {}
    for name, (hidden, added) in heard(denoiser, x_t, t, r, cond).items():
        if equal:
            part = _part(denoiser.network, name)
            changes[name] = Change(hidden[:0], added[:0].T, part.usual())
        elif isinstance(denoiser.network, LoraNetwork):
            changes[name] = Change(torch.linalg.pinv(hidden).T, added.T, torch.zeros_like(added[0]))
        else:
            inverse = torch.linalg.pinv(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1))
            changes[name] = Change(inverse[:-1].T, added.T, inverse[-1] @ added)
    return {name: Change(*(value.float().cpu() for value in change)) for name, change in changes.items()}


def _part(network: Any, name: str) -> TimeGap:
    """What takes the gap at that layer."""
    if isinstance(network, LoraNetwork):
        return next(part for part in network.inputs.values() if isinstance(part, AddedTime) and part.name == name)
    part: Any = network.get_submodule(name)
    return part
