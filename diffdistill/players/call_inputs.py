"""Parts of a network that take a number of each sample besides its usual inputs, given for one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CallInput(nn.Module):
    """What given numbers add to a layer's output. `given` (B,) are those of one call (`taking`), else the default."""

    default: Tensor
    given: Tensor | None = None

    def added(self, output: Tensor) -> Tensor:
        """The layer's output (B, width), or of one row where the whole batch has one, with what is added."""
        raise NotImplementedError

    def usual(self) -> Tensor:
        """(width,) what is added at the default."""
        raise NotImplementedError

    @torch.no_grad()
    def put_into(self, layer: nn.Embedding | nn.Linear) -> None:
        """The layer gives from now on what it gives at the default."""
        if isinstance(layer, nn.Linear):
            add_to_bias(layer, self.usual())
        else:
            layer.weight += self.usual().to(layer.weight)


class InPlace(CallInput):
    """In the place of the layer."""

    layer: nn.Embedding | nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output with what is added."""
        return self.added(self.layer(inputs))


class Beside(CallInput):
    """Beside a network that others share: it is there while a LoRA player plays (`players.lora.active`)."""

    name: str  #: of the layer

    def attach(self, base: nn.Module) -> Callable[[], None]:
        """From now on the layer's output has what is added, until what is returned is called."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self.added(output)

        return layer_at(base, self.name).register_forward_hook(hook).remove

    def fold(self, plain: nn.Module) -> None:
        """Into the layer of a copy of the base, at the default."""
        layer = layer_at(plain, self.name)
        layer.to(torch.promote_types(layer.weight.dtype, self.default.dtype))
        self.put_into(layer)


def layer_at(network: nn.Module, name: str) -> Any:
    """The layer of that name, or the one that LoRA is laid on."""
    layer: Any = network.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@torch.no_grad()
def add_to_bias(layer: nn.Linear, added: Tensor) -> None:
    """Add (out,) to what the layer gives."""
    added = added.to(layer.weight)
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added, requires_grad=False)


def add_part(network: Any, name: str, in_place: type[InPlace], beside: type[Beside], *settings: Any) -> Any:
    """The part that is made of the layer of that name: in its place, or beside it in a LoRA player's network."""
    made: Any = in_place
    if not hasattr(network, "add_input"):
        part = made(layer_at(network, name), *settings)
        network.set_submodule(name, part)
        return part
    made = beside
    part = made(layer_at(network.base, name), *settings, name)
    network.add_input(name, part)
    return part


@contextmanager
def taking(parts: Sequence[CallInput], value: Tensor | None) -> Iterator[None]:
    """The parts are given that value inside the block, and after it what they were given before."""
    before = [part.given for part in parts]
    for part in parts:
        part.given = value
    try:
        yield
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.given = earlier


def without_inputs(network: nn.Module) -> nn.Module:
    """A copy that takes none, and gives what the network gives at the defaults; the network itself where it has none.

    Of parts in the place of their layers; what is beside a base is folded where a LoRA is merged.
    """
    if not any(isinstance(module, InPlace) for module in network.modules()):
        return network
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, InPlace):
            module.put_into(module.layer)
            plain.set_submodule(name, module.layer)
    return plain
