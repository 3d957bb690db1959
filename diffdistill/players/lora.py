"""LoRA players on one shared base: the teacher's own weights, and an adapter for each player, switched per call.

Hu et al. 2021, arXiv:2106.09685. The base is stored once, whoever plays on it: teacher, student and fake score differ
in a few low-rank matrices. At rest no adapter is active, so that the teacher's network gives what it gave before.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer


PLAYER = "player"
"""How the names of players' adapters begin."""


@dataclass(frozen=True)
class LoraSettings:
    """Each adapted layer's weight is W + (alpha / rank) B A; `alpha` is `rank` unless given.

    Adapted are all linear layers and convolutions, or those whose dotted name is, or ends in, one of `targets`.
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] | None = None


def is_lora(module: nn.Module) -> bool:
    """Whether the module is a LoRA player's network."""
    return isinstance(module, LoraNetwork)


def foreign_lora(network: nn.Module) -> str | None:
    """The name of a layer with a LoRA that no player of ours has put there; None if there is none."""
    for name, module in network.named_modules():
        adapters = getattr(module, "lora_A", None)
        if isinstance(adapters, nn.Module) and any(
            not key.startswith(PLAYER) for key in dict(adapters.named_children())
        ):
            return name
    return None


class Input(Protocol):
    """An input that a player has besides those of its base: a module with weights of its own."""

    alone: ClassVar[bool]  #: whether LoRA matrices can stand for it, at the levels of a sampler

    def attach(self, base: nn.Module) -> Callable[[], None]:
        """The base takes it from now on, until what is returned is called."""

    def fold(self, plain: nn.Module) -> None:
        """Put it into a copy of the base, which is a stock network after it."""


class LoraNetwork(nn.Module):
    """The shared base with one adapter, whose matrices are this module's parameters, with those of added inputs.

    The base belongs to the teacher: this module neither moves, nor saves, nor trains it. Its copy is another adapter
    on the same base.
    """

    def __init__(self, base: nn.Module, adapter: str):
        super().__init__()
        self._base = (base,)  # in a tuple: not registered
        self.adapter = adapter
        self.inputs = nn.ModuleDict()
        # Of an export: A (k, in) and B (out, k) by layer, which stand for the inputs where they cannot be folded.
        self.changes: dict[str, tuple[Tensor, Tensor]] = {}
        self.folds_inputs = True
        matrices: dict[str, nn.Module] = {}
        for name, layer in _layers(base):
            if adapter in layer.lora_A:
                matrices[f"{name}.lora_A".replace(".", "|")] = layer.lora_A[adapter]
                matrices[f"{name}.lora_B".replace(".", "|")] = layer.lora_B[adapter]
        self.matrices = nn.ModuleDict(matrices)

    @property
    def base(self) -> Any:
        """The network that the LoRA matrices are laid on, shared with the other players."""
        return self._base[0]

    @property
    def alone(self) -> bool:
        """Whether the LoRA can be exported without its base."""
        return all(bool(part.alone) for part in self.inputs.values())

    def add_input(self, name: str, part: nn.Module) -> None:
        """The player takes that `Input` from now on, which is trained whole."""
        self.inputs[name.replace(".", "|")] = part
        vars(self.base).setdefault("_inputs", {}).setdefault(self.adapter, []).append(part)

    def with_changes(self, changes: dict[str, tuple[Tensor, Tensor]], *, folds_inputs: bool) -> LoraNetwork:
        """The same player, which is exported with those changes; `folds_inputs`: a whole network needs none."""
        twin = copy.copy(self)
        twin.changes, twin.folds_inputs = changes, folds_inputs
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with these LoRA matrices active, and no others."""
        with active(self.base, self.adapter):
            return self.base(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """Of the base, where a discriminator reads features."""
        return self.base.get_submodule(target)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraNetwork:
        config = copy.deepcopy(self.base.peft_config[self.adapter])
        twin = LoraNetwork(self.base, _inject(self.base, config))
        for name, part in self.inputs.items():
            twin.add_input(name, copy.deepcopy(part, memo))
        twin.load_state_dict(self.state_dict())
        for mine, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        memo[id(self)] = twin
        return twin.train(self.training)


def trained_like(weight: Tensor) -> Tensor:
    """The weight for its type; float32 for half precision, where it would not move by a learning rate's worth."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def lora_view(denoiser: Denoiser, settings: LoraSettings) -> Denoiser:
    """The denoiser as a LoRA player: a new adapter on its own weights, which are frozen, without dropout, from here on.

    B is zero at the start and A drawn from torch's global generator. The denoiser itself goes on giving what it gave.
    Raises UserError where there is nothing to adapt, or a target names no layer.
    """
    from peft import LoraConfig  # takes three seconds, through transformers

    base = denoiser.network.base if isinstance(denoiser.network, LoraNetwork) else denoiser.network
    base.eval()
    for name, p in base.named_parameters():
        if ".lora_" not in name:  # those are other players'
            p.requires_grad_(False)
    # Exact types: what reads the weight without calling the layer, as MultiheadAttention does, would miss A and B.
    layers = [
        name.removesuffix(".base_layer")
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and not re.search(r"\.lora_[AB]\.", name)
        and settings.rank % getattr(module, "groups", 1) == 0  # peft divides the rank over a convolution's groups
    ]
    targets = settings.targets
    if not layers:
        raise UserError(f"lora: the teacher's {type(base).__name__} has no linear layer or convolution to adapt")
    if targets is not None:
        named = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
        for target in (target for target, matches in named.items() if not matches):
            ends = sorted({re.sub(r".*\.(?=[A-Za-z_])", "", name) for name in layers})
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ends)}"
            raise UserError(f"lora: the teacher's {type(base).__name__} has no layer called {target} to adapt; {hint}")
        layers = [name for name in layers if any(name in matches for matches in named.values())]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        target_modules="|".join(map(re.escape, layers)),  # matched whole, where a list would match suffixes too
        lora_dropout=0.0,
    )
    return denoiser.with_network(LoraNetwork(base, _inject(base, config)), denoiser.feature_layer)


def _inject(base: nn.Module, config: LoraConfig) -> str:
    """Add an adapter, at rest; returns its name."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    name = f"{PLAYER}{len(getattr(base, 'peft_config', {}))}"
    trained = {p: p.requires_grad for p in base.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several players on one base, on purpose
        inject_adapter_in_model(config, base, name)
    for p, before in trained.items():
        p.requires_grad_(before)  # peft leaves it to the newest adapter alone
    # Kept, since walking through all modules at every call takes milliseconds on a large network.
    vars(base)["_lora_layers"] = [(n, m) for n, m in base.named_modules() if isinstance(m, LoraLayer)]
    for _, layer in _layers(base):
        if name in layer.lora_A:
            for matrix in (layer.lora_A[name], layer.lora_B[name]):
                matrix.to(trained_like(matrix.weight).dtype).requires_grad_(True)
    _switch(base, None)
    return name


def _layers(base: nn.Module) -> list[tuple[str, LoraLayer]]:
    return vars(base).get("_lora_layers", [])


def _switch(base: nn.Module, adapter: str | None) -> None:
    # Not `set_adapter` and `enable_adapters`: these also say which adapter requires a gradient, which is the trainer's.
    for _, layer in _layers(base):
        layer._disable_adapters = adapter is None
        layer._active_adapter = [] if adapter is None else [adapter]
    for detach in vars(base).pop("_detach", []):
        detach()
    if adapter is not None:
        vars(base)["_detach"] = [part.attach(base) for part in inputs_of(base, adapter)]


def inputs_of(base: nn.Module, adapter: str | None) -> list[Any]:
    """The inputs that a player on that base has besides."""
    return [] if adapter is None else vars(base).get("_inputs", {}).get(adapter, [])


def active_adapter(base: nn.Module) -> str | None:
    """The adapter that a base carries now."""
    layer = next((layer for _, layer in _layers(base)), None)
    return layer._active_adapter[0] if layer is not None and layer._active_adapter else None


@contextmanager
def active(base: nn.Module, adapter: str | None) -> Iterator[None]:
    """The base carries that adapter inside the block, and after it what it carried before."""
    before = active_adapter(base)
    _switch(base, adapter)
    try:
        yield
    finally:
        _switch(base, before)


def without_lora(network: nn.Module) -> nn.Module:
    """The network itself if it is a LoRA player's or plain, else its layers with the adapters taken off, in place."""
    if isinstance(network, LoraNetwork):
        return network
    for name, layer in _layers(network):
        if hasattr(layer, "get_base_layer"):
            network.set_submodule(name, layer.get_base_layer())
    for kept in ("peft_config", "_lora_layers", "_inputs", "_detach"):
        vars(network).pop(kept, None)
    return network


def merged(network: LoraNetwork) -> nn.Module:
    """A plain copy of the base with adapter and inputs in its weights, on the CPU; the base stays as it is.

    Adapted layers become float32 where the base is in half precision, which would round the adapter away.
    """
    # What deepcopy is to take for each part: neither adapters nor device are copied.
    memo: dict[int, Any] = {id(kept): {} for name, kept in vars(network.base).items() if name == "_inputs"}
    for _, layer in _layers(network.base):
        plain = copy.deepcopy(layer.get_base_layer()).cpu()
        if network.adapter in layer.lora_A:
            _add(plain, layer.get_delta_weight(network.adapter))
        memo[id(layer)] = plain
    for value in (*network.base.parameters(), *network.base.buffers()):
        kept = value.detach().cpu().clone()
        memo.setdefault(id(value), nn.Parameter(kept, False) if isinstance(value, nn.Parameter) else kept)
    whole = without_lora(copy.deepcopy(network.base, memo))
    for part in network.inputs.values() if network.folds_inputs else ():
        part.fold(whole)  # type: ignore[operator]
    for name, (down, up) in {} if network.folds_inputs else network.changes.items():
        _add(whole.get_submodule(name), up @ down)
    return whole


@torch.no_grad()
def _add(layer: Any, change: Tensor) -> None:
    """To a layer's weight, in float32 at least."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    layer.to(wide).weight += change.to(layer.weight)


def lora_weights(network: LoraNetwork) -> dict[str, Tensor]:
    """The adapter as diffusers' `load_lora_weights` reads it; alpha / rank, which that takes for 1, is in B.

    Of one rank: where changes make a layer's greater, all others have zeros.
    """
    from peft import get_peft_model_state_dict

    config = network.base.peft_config[network.adapter]
    scale = config.lora_alpha / config.r
    weights = {
        name: (value * scale if ".lora_B." in name else value).detach().cpu()
        for name, value in get_peft_model_state_dict(network.base, adapter_name=network.adapter).items()
    }
    for layer, (down, up) in network.changes.items():
        for name, value, axis in ((f"{layer}.lora_A.weight", down, 0), (f"{layer}.lora_B.weight", up, 1)):
            weights[name] = torch.cat([weights[name], value], axis) if name in weights else value
    rank = max(value.shape[0] for name, value in weights.items() if ".lora_A." in name)
    for name, value in weights.items() if network.changes else ():
        axis = 0 if ".lora_A." in name else 1
        shape = [rank - size if place == axis else size for place, size in enumerate(value.shape)]
        weights[name] = torch.cat([value, value.new_zeros(shape)], axis)
    return {name: value.contiguous() for name, value in weights.items()}


def lora(denoiser: Denoiser, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None) -> Denoiser:
    """A LoRA player on the denoiser's own weights (see lora.py)."""
    return lora_view(denoiser, LoraSettings(rank, alpha, targets))
