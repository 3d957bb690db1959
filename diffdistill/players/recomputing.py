"""Gradient checkpointing of a player's network, each pass computed again as it was: with its adapter, gap and scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffdistill.core.recompute import recomputed
from diffdistill.errors import UserError
from diffdistill.players.call_inputs import CallInput, taking
from diffdistill.players.lora import LoraNetwork, active, active_adapter, inputs_of
from diffdistill.players.scale_input import ScaleFeatures
from diffdistill.players.two_times import TimeGap


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute the network's activations in the backward pass, with adapter, gap and scale of the forward pass."""
    base: Any = network.base if isinstance(network, LoraNetwork) else network
    if not getattr(base, "_supports_gradient_checkpointing", False):
        raise UserError(f"gradient_checkpointing: {type(base).__name__} has none; use false")
    own = [part for part in base.modules() if isinstance(part, CallInput)]

    def call(module: Any, *args: Any) -> Any:
        adapter = active_adapter(base)  # of whichever player plays
        inputs = inputs_of(base, adapter)
        parts = own + [part for part in inputs if isinstance(part, CallInput)]
        gaps, scales = ([part for part in parts if isinstance(part, kind)] for kind in (TimeGap, ScaleFeatures))
        given = [same[0].given if same else None for same in (gaps, scales)]

        def run(gap: Tensor | None, scale: Tensor | None, *inner: Any) -> Any:
            with active(base, adapter), taking(gaps, gap), taking(scales, scale):
                return module(*inner)

        read = [module if isinstance(module, nn.Module) else base, *inputs]
        return recomputed(run, (*given, *args), (p for part in read for p in part.parameters()))

    base.enable_gradient_checkpointing(call)
