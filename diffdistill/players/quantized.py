"""A frozen network whose linear layers are stored in 8 or 4 bits, by bitsandbytes: gradients pass, and none is trained.

In 8 bits as LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), in 4 bits as QLoRA's NF4 with double quantization
(Dettmers et al. 2023, arXiv:2305.14314). Layers are packed when they are moved to their device, be it a CPU.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from diffdistill.errors import UserError

Bits = Literal[4, 8]
_OUTLIERS = 6.0  # of LLM.int8(): columns of larger inputs are multiplied in their own type
_STATISTICS = {8: 0.0, 4: 1 / 64}  # bytes a weight of what scales them, beside a number for each row


def quantizable(network: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers by name, without matrices of LoRA and what diffusers keeps in float32."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    return {
        name: layer
        for name, layer in network.named_modules()
        if type(layer) is nn.Linear and ".lora_" not in name and not set(name.split(".")) & set(kept)
    }


def saved(network: nn.Module, bits: Bits) -> int:
    """Bytes that the network's weights take less in so many bits."""
    size = bits / 8 + _STATISTICS[bits]
    weights = (layer.weight for layer in quantizable(network).values())
    return int(sum(w.numel() * (w.element_size() - size) for w in weights))


def quantize(network: nn.Module, bits: Bits, computed: torch.dtype) -> None:
    """Replace the linear layers in place, which compute in that type; UserError where bitsandbytes is not there."""
    library = bitsandbytes()
    for name, layer in quantizable(network).items():
        shape = layer.in_features, layer.out_features, layer.bias is not None
        made: Any
        if bits == 8:
            made = library.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=_OUTLIERS, device="meta")
            made.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = library.nn.Linear4bit(*shape, compute_dtype=computed, quant_type="nf4", device="meta")
            made.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
            # It would pack the layer for passes without a gradient, and later ones would have none.
            made.support_avx512bf16_for_cpu = False
        made.bias = layer.bias
        network.set_submodule(name, made.train(layer.training))


def bitsandbytes() -> Any:
    """The package; UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes as library
    except ImportError:
        needs = "need the package bitsandbytes; pip install 'diffdistill[quantized]', or leave it out"
        raise UserError(f"teacher_bits: 4 and 8 {needs}") from None
    return library
