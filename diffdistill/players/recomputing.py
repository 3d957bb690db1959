"""Gradient checkpointing of a player's network, each pass computed again as it was: with its adapter and its gap."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffdistill.core.recompute import recomputed
from diffdistill.errors import UserError
from diffdistill.players.lora import LoraNetwork, active, active_adapter, inputs_of
from diffdistill.players.two_times import TimeGap, jumping, second_times


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute the network's activations in the backward pass, each with adapter and gap of its forward pass."""
    base: Any = network.base if isinstance(network, LoraNetwork) else network
    if not getattr(base, "_supports_gradient_checkpointing", False):
        raise UserError(f"gradient_checkpointing: {type(base).__name__} has none; use false")
    own = second_times(base)

    def call(module: Any, *args: Any) -> Any:
        adapter = active_adapter(base)  # of whichever player plays
        inputs = inputs_of(base, adapter)
        layers = own + [part for part in inputs if isinstance(part, TimeGap)]
        gap = layers[0].gap if layers else None

        def run(gap: Tensor | None, *inner: Any) -> Any:
            with active(base, adapter), jumping(layers, gap):
                return module(*inner)

        read = [module if isinstance(module, nn.Module) else base, *inputs]
        return recomputed(run, (gap, *args), (p for part in read for p in part.parameters()))

    base.enable_gradient_checkpointing(call)
