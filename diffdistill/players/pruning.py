"""A smaller network of a network's own blocks: what each of them does, and the network without some.

Of a transformer those blocks go whose absence, each alone, changes the output least (LAPTOP-Diff, Zhang et al. 2024),
of a UNet's levels the last block on the way down and the last but one on the way up (BK-SDM, Kim et al. 2023,
arXiv:2305.15798).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.errors import UserError

Gone = Mapping[str, Collection[int]]
"""By the name of a list of blocks, the places of those that go."""

_FIRST = "transformer_blocks"
_NUMBERS = {"dual_attention_layers"}  # of a config, which name blocks of that list by their places


def block_lists(network: nn.Module) -> dict[str, str]:
    """The lists of blocks of a transformer of diffusers, each with the key of its config that says how many there are.

    Found by making the network, without memory, with one block less.
    """
    config, found = dict(getattr(network, "config", {})), {}
    for name, blocks in network.named_children():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
            continue
        for key in (key for key, value in config.items() if value == len(blocks) and isinstance(value, int)):
            try:
                with torch.device("meta"):
                    fewer: Any = type(network).from_config(config | {key: len(blocks) - 1})  # type: ignore[attr-defined]
            except Exception:  # another meaning of that number
                continue
            if all(len(part) == len(fewer.get_submodule(other)) + (other == name)
                   for other, part in network.named_children() if isinstance(part, nn.ModuleList)):  # fmt: skip
                found[name] = key
                break
    return found


def without_blocks(network: nn.Module, gone: Gone) -> nn.Module:
    """The network without those blocks: its own class, with the weights of the others. UserError where it cannot be."""
    return _filled(network, *_renumbered(network, gone))


def _renumbered(network: nn.Module, gone: Gone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the network without those blocks."""
    keys, config, state = block_lists(network), dict(network.config), {}  # type: ignore[arg-type]
    places: dict[str, dict[int, int]] = {}
    for name, numbers in gone.items():
        kept = [k for k in range(len(network.get_submodule(name))) if k not in numbers]  # type: ignore[arg-type]
        config[keys[name]], places[name] = len(kept), {k: place for place, k in enumerate(kept)}
    for key in _NUMBERS & config.keys():
        config[key] = tuple(places[_FIRST][k] for k in config[key] if k in places[_FIRST])
    for entry, value in network.state_dict().items():
        name, _, rest = entry.partition(".")
        number, _, tail = rest.partition(".")
        if name not in places:
            state[entry] = value
        elif int(number) in places[name]:
            state[f"{name}.{places[name][int(number)]}.{tail}"] = value
    return config, state


def _fits(network: nn.Module, gone: Gone) -> bool:
    """Whether the others can take the places that are left, by their shapes."""
    config, state = _renumbered(network, gone)
    with torch.device("meta"):
        smaller: Any = type(network).from_config(config)  # type: ignore[attr-defined]
    shapes = {name: value.shape for name, value in smaller.state_dict().items()}
    return shapes == {name: value.shape for name, value in state.items()}


def thinner_unet(network: nn.Module, layers: int) -> nn.Module:
    """A UNet with so many blocks in each level, of its own weights."""
    config, state = dict(network.config), network.state_dict()  # type: ignore[arg-type]
    for n in range(config["layers_per_block"], layers, -1):
        shorter = {}
        for entry, value in state.items():
            parts = entry.split(".")
            if len(parts) > 3 and parts[0] in ("down_blocks", "up_blocks") and parts[2] in ("resnets", "attentions"):
                k, last = int(parts[3]), n - 1
                if k == last:
                    continue
                parts[3] = str(k - (parts[0] == "up_blocks" and k > last))
            shorter[".".join(parts)] = value
        state = shorter
    return _filled(network, config | {"layers_per_block": layers}, state)


def _filled(network: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    smaller: Any = type(network).from_config(config)  # type: ignore[attr-defined]
    if next(network.parameters()).dtype != torch.float32:
        smaller.to(next(network.parameters()).dtype)
    try:
        smaller.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"teacher: the blocks of its {type(network).__name__} differ, so that none can take another's place"
        ) from None
    return smaller.eval()


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Inside, the block gives what it reads."""
    real, signature = block.forward, inspect.signature(block.forward)

    def through(*args: Any, **kwargs: Any) -> Any:
        read = signature.bind(*args, **kwargs).arguments
        own, beside = read["hidden_states"], read.get("encoder_hidden_states")
        made = real(*args, **kwargs)
        if not isinstance(made, tuple):
            return own
        first = made[0] is None or (beside is not None and made[0].shape == beside.shape)
        return (None if made[0] is None else beside, own) if first else (own, beside)

    block.forward = through
    try:
        yield
    finally:
        block.forward = real


@torch.no_grad()
def importance(denoiser: Denoiser, name: str, states: Sequence[tuple[Tensor, Tensor, Cond]]) -> list[float]:
    """By how much v changes, mean square over the states (x_t, t, conditions), without each block of a list alone.

    Infinite for a block whose place no other can take.
    """
    network = denoiser.network
    usual, scores = [denoiser(*state).v for state in states], []
    for k, block in enumerate(network.get_submodule(name).children()):
        if not _fits(network, {name: {k}}):
            scores.append(float("inf"))
            continue
        with skipped(block):
            gaps = [(denoiser(*state).v - v).square().mean() for state, v in zip(states, usual, strict=True)]
        scores.append(float(torch.stack(gaps).mean()))
    return scores


def least_important(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, set[int]]:
    """The places of so many blocks of least importance; one of each list stays."""
    gone: dict[str, set[int]] = {name: set() for name in scores}
    for _, name, k in sorted((value, name, k) for name, own in scores.items() for k, value in enumerate(own)):
        if sum(map(len, gone.values())) < count and len(gone[name]) < len(scores[name]) - 1:
            gone[name].add(k)
    return gone
