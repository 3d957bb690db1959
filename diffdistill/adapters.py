"""Small trainable parts on a network that stays the same class: LoRA, and the guidance scale as an input."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .errors import UserError
from .players import trainable_copy


def lora(denoiser: Denoiser, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None) -> Denoiser:
    """A copy of the denoiser that is trained through LoRA alone (Hu et al. 2021, arXiv:2106.09685).

    Each adapted layer's weight is W + (alpha / rank) B A with W frozen, B zero at the start, A drawn from
    torch's global generator; `alpha` is `rank` unless given. Adapted are all linear layers and convolutions,
    or those whose dotted name is, or ends in, one of `targets`. Raises UserError where there is none.
    """
    twin = trainable_copy(denoiser).requires_grad_(False)
    # Exact types: what reads the weight without calling the layer, as MultiheadAttention does, would miss A and B.
    layers = [name for name, module in twin.network.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    if targets is not None:
        layers = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not layers:
        wanted = "linear layer or convolution" if targets is None else f"layer called {' or '.join(targets)}"
        raise UserError(f"lora: the teacher's {type(twin.network).__name__} has no {wanted} to adapt")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules="|".join(map(re.escape, layers)),  # matched whole, where a list would match suffixes too
        lora_dropout=0.0,
    )
    inject_adapter_in_model(config, twin.network)
    return twin


class GuidanceEmbedding(nn.Module):
    """A class embedding that also takes the guidance scale: table(label) + MLP(features(scale)).

    The MLP's last layer begins at zero, so that the network begins as it was for every scale. `default` is the
    scale where none is given (`guidance_input`) and the one `plain_network` keeps.
    """

    frequencies: Tensor
    default: Tensor

    def __init__(self, table: nn.Embedding, default: float):
        super().__init__()
        self.table = table
        # Periods from 3 to 100 for scales of 1 to 15. Frequencies of 1000 would turn the scale into a
        # lookup key, which generalises to no scale in between.
        frequencies = torch.exp2(torch.linspace(-4, 1, 16))
        width, like = table.embedding_dim, table.weight
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(2 * len(frequencies), width), nn.SiLU(), last).to(like)
        self.register_buffer("frequencies", frequencies.to(like))
        self.register_buffer("default", torch.tensor(float(default)).to(like))

    def of_scale(self, scale: Tensor) -> Tensor:
        """(B,) -> (B, width), what the scale adds to the class's row."""
        phase = scale[:, None].to(self.frequencies) * self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], 1))

    def forward(self, label_and_scale: Tensor) -> Tensor:
        """(B, 2) floats, the label and the guidance scale -> (B, width)."""
        label, scale = label_and_scale.unbind(1)
        return self.table(label.long()) + self.of_scale(scale)


def guidance_input(denoiser: Denoiser, layer: str = "class_embedding", *, default: float = 1.0) -> Denoiser:
    """A copy that takes the guidance scale (B,) as `cond["guidance_scale"]`, 1 being no guidance.

    `layer` is the network's embedding of class labels, which becomes a `GuidanceEmbedding`: diffusers' networks
    hand their `class_labels` to that layer untouched, so both numbers travel in that one argument. Which
    parameters are trained stays as it was; those of the new part are. Without "guidance_scale" in the
    conditions it is `default`. Raises UserError where `layer` is not an embedding.
    """
    twin = copy.deepcopy(denoiser)
    table = dict(twin.network.named_modules()).get(layer)
    if not isinstance(table, nn.Embedding):
        raise UserError(
            f"guidance_input: this teacher's network has no class embedding ({layer}) to add the guidance scale to; "
            "use a class-conditional teacher or a fixed scale"
        )
    twin.network.set_submodule(layer, GuidanceEmbedding(table, default))
    inner_call, inner_null = denoiser.call, denoiser.null

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        labels = cond["class_labels"]
        scale = cond.get("guidance_scale")
        if scale is None:
            scale = network.get_submodule(layer).default.expand(len(labels))  # type: ignore[operator]
        # Labels are exact in float32, and would not be in half precision.
        packed = torch.stack([labels.float(), scale.float()], 1)
        rest = {key: value for key, value in cond.items() if key != "guidance_scale"}
        return inner_call(network, x, time, rest | {"class_labels": packed})

    def null(cond: Cond) -> Cond:
        assert inner_null is not None
        rest = {key: value for key, value in cond.items() if key != "guidance_scale"}
        return cond | inner_null(rest)  # keeps the scale

    twin.call = call
    twin.null = None if inner_null is None else null
    return twin


def plain_network(network: nn.Module) -> nn.Module:
    """The stock network that computes the same, to float rounding: for export.

    LoRA is merged into the weights, and a guidance embedding at its default scale into the class table. A copy,
    or the network itself where it has neither.
    """
    if not any(isinstance(module, LoraLayer | GuidanceEmbedding) for module in network.modules()):
        return network
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    for name, module in list(plain.named_modules()):
        if isinstance(module, GuidanceEmbedding):
            with torch.no_grad():
                module.table.weight += module.of_scale(module.default[None])
            plain.set_submodule(name, module.table)
    if "peft_config" in vars(plain):
        del plain.peft_config
    return plain
