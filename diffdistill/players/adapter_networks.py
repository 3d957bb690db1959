"""Guidance adapters: small networks that correct a frozen network's layers as classifier-free guidance would.

This file needs nothing of this package: an exported folder holds a copy of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Corrections = Mapping[str, Callable[[Tensor], Tensor]]
"""Layer name -> what is added to its output, as a function of its input; both (B, positions, channels)."""

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


class Site(NamedTuple):
    """A layer that is corrected: its dotted name ('' is the network itself) and its channels, in and out."""

    name: str
    channels_in: int
    channels_out: int


def features(x: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size) cosines and sines with periods from 2 pi to 10,000 times that."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would round the timestep 999
    rate = torch.exp(-math.log(1e4) * torch.arange(size // 2, device=x.device) / (size // 2)).to(x)
    phase = x[:, None] * rate
    return torch.cat([phase.cos(), phase.sin()], 1)


class Embedding(nn.Module):
    """Guidance scale (B,), the network's time (B,) and class labels (B,) -> one token each, (B, 3, hidden)."""

    def __init__(self, hidden: int, num_labels: int):
        super().__init__()
        self.hidden = hidden
        inputs = 2 * (hidden // 2)
        self.scale, self.time = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(2)
        )
        self.label = nn.Embedding(num_labels, hidden)

    def forward(self, scale: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Three tokens (B, 3, hidden) for guidance scales, times and class labels, each (B,)."""
        scale, time = (features(x, self.hidden).to(self.label.weight) for x in (scale, time))
        return torch.stack([self.scale(scale), self.time(time), self.label(labels)], 1)


class Additive(nn.Module):
    """The same correction at every position; it does not look at the layer's input."""

    def __init__(self, channels_in: int, channels_out: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU())
        self.out = nn.Linear(hidden, channels_out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The correction (B, 1, channels_out) of tokens (B, 3, hidden), for a layer's input (B, N, channels_in)."""
        return self.out(self.net(tokens.sum(1)))[:, None]


class CrossAttention(nn.Module):
    """Positions of the layer's input as queries, the embeddings of scale, time and class as keys and values."""

    def __init__(self, channels_in: int, channels_out: int, hidden: int):
        super().__init__()
        self.heads = next(heads for heads in (8, 4, 2, 1) if hidden % heads == 0)
        self.query = nn.Linear(channels_in, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, channels_out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The correction (B, N, channels_out) of a layer's input (B, N, channels_in) and tokens (B, 3, hidden)."""
        parts = (self.query(x), *self.key_value(tokens).chunk(2, -1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLPGate(nn.Module):
    """A perceptron of the layer's input and the embedding at each position, times a gate of the same."""

    def __init__(self, channels_in: int, channels_out: int, hidden: int):
        super().__init__()
        self.inner = nn.Linear(channels_in, hidden)
        self.gate = nn.Linear(2 * hidden, 1)
        self.net = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden))
        self.out = nn.Linear(hidden, channels_out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The correction (B, N, channels_out) of a layer's input (B, N, channels_in) and tokens (B, 3, hidden)."""
        inner = self.inner(x)
        both = torch.cat([inner, tokens.sum(1)[:, None].expand_as(inner)], -1)
        return torch.sigmoid(self.gate(both)) * self.out(self.net(both))


KINDS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "additive": Additive,
    "attention": CrossAttention,
    "mlp_gate": MLPGate,
}


class GuidanceAdapters(nn.Module):
    """One adapter a site, and the embedding that they share. What they add is (scale - 1) times their output.

    The last layers begin at zero, so that the network begins as it was; and at scale 1 it stays so.
    """

    def __init__(self, kind: str, hidden: int, num_labels: int, sites: Sequence[Site | Sequence[Any]]):
        super().__init__()
        self.sites = tuple(Site(*site) for site in sites)
        self.config = {"kind": kind, "hidden": hidden, "num_labels": num_labels, "sites": [[*s] for s in self.sites]}
        self.described: dict[str, Any] = {}
        self.embedding = Embedding(hidden, num_labels)
        self.layers = nn.ModuleList(KINDS[kind](s.channels_in, s.channels_out, hidden) for s in self.sites)
        for layer in self.layers:
            nn.init.zeros_(layer.out.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(layer.out.bias)  # type: ignore[union-attr, arg-type]

    def save(self, folder: str | Path, **described: Any) -> None:
        """adapter.safetensors, and adapter.json with what else there is to say of them, into an existing folder."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, Path(folder) / WEIGHTS)
        text = json.dumps(described | {"adapters": self.config}, indent=2) + "\n"
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **unused: Any) -> GuidanceAdapters:
        """Adapters from a folder written by `save`; `described` says the rest of its adapter.json."""
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / WEIGHTS)
        adapters = cls(**config.pop("adapters")).to(next(iter(tensors.values())).dtype)
        adapters.load_state_dict(tensors)
        adapters.described = config
        return adapters

    # diffusers asks every component of a pipeline for these two.
    @property
    def device(self) -> torch.device:
        """Where the adapters' parameters lie."""
        return self.embedding.label.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The adapters' floating-point type."""
        return self.embedding.label.weight.dtype

    def attached(self, network: nn.Module) -> AdaptedNetwork:
        """The network with these adapters, at the scale that their folder gives where a call gives none."""
        return AdaptedNetwork(network, self, self.described["guidance_scale"])

    def forward(self, scale: Tensor, time: Tensor, labels: Tensor) -> Corrections:
        """What is added at each site, for guidance scales, the network's times and labels, each (B,)."""
        tokens = self.embedding(scale, time, labels)
        strength = (scale - 1).to(tokens)[:, None, None]

        def correct(layer: nn.Module, x: Tensor) -> Tensor:
            return strength * layer(x.to(tokens), tokens)

        return {site.name: partial(correct, layer) for site, layer in zip(self.sites, self.layers, strict=True)}


class AdaptedNetwork(nn.Module):
    """A network whose layers are corrected for the time of a call; the network itself is not touched.

    It takes `guidance_scale` (B,) beside the network's own arguments, 1 being no guidance; `guidance_scale` of
    the constructor is used where none is given. Its state is that of the adapters: the network is another's.
    """

    guidance_scale: Tensor

    def __init__(self, base: nn.Module, adapters: nn.Module, guidance_scale: float):
        super().__init__()
        self.base = base
        self.adapters = adapters
        self.register_buffer("guidance_scale", torch.tensor(float(guidance_scale)))
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    def train(self, mode: bool = True) -> AdaptedNetwork:
        """Set the mode of the adapters; the base, which may be the teacher too, stays in eval mode."""
        super().train(mode)
        self.base.eval()  # it may be the teacher too
        return self

    def forward(self, x: Tensor, time: Tensor, *, guidance_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """The base's output with the corrections added; scale and time are (B,), no scale means the folder's own."""
        scale = self.guidance_scale.expand(len(x)) if guidance_scale is None else guidance_scale
        corrections = self.adapters(scale, time.reshape(-1).expand(len(x)), kwargs["class_labels"])
        handles = []
        try:
            for name, correct in corrections.items():
                layer = self.base.get_submodule(name)
                handles.append(layer.register_forward_hook(partial(_add, correct), with_kwargs=True))
            return self.base(x, time, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _without_base(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}base.")]:
        del state[name]


def _with_base(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    state |= {f"{prefix}base.{name}": value for name, value in module.base.state_dict().items()}  # type: ignore


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer reads: its first argument, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def positions(x: Tensor) -> Tensor:
    """(B, C, ...) feature maps or (B, N, C) tokens or (B, C) vectors -> (B, positions, channels)."""
    if x.ndim == 3:
        return x
    return x.flatten(2).transpose(1, 2) if x.ndim > 3 else x[:, None]


def _add(correct: Callable[[Tensor], Tensor], layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    whole = isinstance(output, Tensor)
    y = output if whole else output[0]
    delta = correct(positions(layer_input(args, kwargs))).to(y)
    if y.ndim == 2:
        delta = delta[:, 0]
    elif y.ndim > 3:
        delta = delta.transpose(1, 2)  # (B, C, positions), of which an additive adapter has one for all
        delta = delta.reshape(*delta.shape[:2], *(y.shape[2:] if delta.shape[2] > 1 else [1] * (y.ndim - 2)))
    return y + delta if whole else (y + delta, *output[1:])
