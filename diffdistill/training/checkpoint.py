"""Checkpoints: folders of safetensors and one JSON, complete or absent.

A checkpoint is written beside its place and renamed into it, so an interrupted write never costs the last
good one. It holds no generator state: all randomness is a function of (seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.files import atomic_folder

_NAME = re.compile(r"step-(\d{8})$")
_STATE = "state.json"


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by '<parameter>|<slot>'; what is no tensor there is a number of steps."""
    flat = {}
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}|{slot}"] = torch.as_tensor(value)
    return flat


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Put tensors named "parameter|slot" into an optimizer; KeyError for a parameter that the module lacks."""
    parameters = dict(module.named_parameters())
    for key, value in flat.items():
        name, slot = key.rsplit("|", 1)
        # torch's own AdamW counts steps in a tensor, bitsandbytes' in a number.
        number = slot == "step" and not isinstance(optimizer, torch.optim.AdamW)
        optimizer.state[parameters[name]][slot] = int(value) if number else _laid_out_like(parameters[name], value)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    # Fused AdamW walks parameter and moments by address, so a channels_last parameter needs channels_last
    # moments; its step count must be on the device too.
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `<folder>/step-<step>` whole: one safetensors file for each key of `tensors`, and state.json."""
    with atomic_folder(folder / f"step-{step:08d}", _STATE) as partial:
        for name, group in tensors.items():
            # clone(): tensors that share memory are refused by safetensors.
            whole = {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
            save_file(whole, partial / f"{name}.safetensors")
        (partial / _STATE).write_text(json.dumps({"step": step, "groups": sorted(tensors), **state}, indent=2) + "\n")


def remove_old(folder: Path, keep: int) -> None:
    """Delete all complete checkpoints of a run but the newest `keep`, at least 1."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name) and (p / _STATE).is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of one checkpoint; UserError if a file of it is damaged."""
    try:
        state = json.loads((path / _STATE).read_text())
        return {name: load_file(path / f"{name}.safetensors") for name in state["groups"]}, state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint: {path} is damaged ({error}); remove it to resume from the one before") from None


def load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict` with the tensors of the checkpoint at `path`; UserError if the network is another."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} is of another network ({str(error).splitlines()[0]})") from None
