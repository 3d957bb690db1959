"""Checkpoints: folders of safetensors and one JSON, complete or absent.

A checkpoint is written beside its place and renamed into it, and renamed before it is removed, so an interruption
never costs the last good one. Its record, state.json, holds a checksum of every file, which is verified when it is
read: where one does not match, the checkpoint before is used. It holds no generator state: all randomness is a
function of (seed, step).
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.core.divided import divided_like, put_together
from diffdistill.environment import is_first_process
from diffdistill.errors import UserError, first_line, one_line, shown
from diffdistill.files import atomic_folder, file_digest, json_object

FORMAT = 1
"""Of the records that are written. Those without a number are from before there were checksums."""

_LATER: dict[str, Any] = {"skipped": 0, "best": None}
"""What records had not from the start, and what it is where it is not there."""

_NAME = re.compile(r"step-(\d{8,})$")
_LEFT = re.compile(r"(\.step-\d{8,}\.(partial|replaced|removed)|step-\d{8,}\.damaged)$")
_STATE, _TENSORS = "state.json", ".safetensors"


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by '<parameter>|<slot>'; what is no tensor there is a number of steps."""
    flat = {}
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}|{slot}"] = torch.as_tensor(value)
    return flat


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Put what `optimizer_state` gave into an optimizer; KeyError for a parameter that the module lacks."""
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
    return torch.empty_like(parameter, dtype=value.dtype).copy_(divided_like(value, parameter))


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `<folder>/step-<step>` whole: one safetensors file for each key of `tensors`, and state.json.

    `state` has `world_size`, `totals`, `skipped` and `best`, the step and the value of the best judging. The record
    holds a checksum of every other file, and one of itself.
    """
    with atomic_folder(folder / f"step-{step:08d}", _STATE) as partial:
        files = {}
        for name, group in tensors.items():
            # clone(): tensors that share memory are refused by safetensors.
            whole = {k: put_together(v.detach()).cpu().contiguous().clone() for k, v in group.items()}
            save_file(whole, partial / f"{name}.safetensors")
            files[f"{name}.safetensors"] = file_digest(partial / f"{name}.safetensors")
        record = {"format": FORMAT, "step": step, **state, "files": dict(sorted(files.items()))}
        record["checksum"] = _own_checksum(record)
        (partial / _STATE).write_text(json.dumps(record, indent=2) + "\n")


def _own_checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its checksum, whatever the order of its names."""
    text = json.dumps({k: v for k, v in record.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def remove_old(folder: Path, keep: int, best: int | None = None) -> None:
    """Delete all complete checkpoints of a run but the newest `keep`, at least 1, and that of the step `best`.

    With them goes what is left of others.
    """
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) == best:
            continue
        # Renamed first: a removal that is interrupted leaves no checkpoint that lacks files.
        hidden = path.rename(folder / f".{path.name}.removed")
        shutil.rmtree(hidden)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes and removals, or `set_aside`, have left among a run's checkpoints."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        part = _NAME.match(path.name) and path.is_dir() and not (path / _STATE).is_file()
        if part or _LEFT.match(path.name):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which are damaged, so that none of them counts as kept.

    They are deleted once the next whole checkpoint has been written, or when the run is resumed once more.
    """
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = folder / f"{path.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that have a record, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name) and (p / _STATE).is_file())


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextmanager
def full_disk_said(run: Path) -> Iterator[None]:
    """A run folder that cannot be written to any more becomes a UserError that says what is kept, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not isinstance(error.__cause__, SafetensorError):
            raise
        kept = checkpoints(run / "checkpoints")
        last = f"the last good checkpoint is {kept[-1].name}" if kept else "no checkpoint had been written yet"
        raise UserError(
            f"out: {shown(str(run))} cannot be written to ({error.strerror or first_line(error)}); {last}: free some "
            f"space, and go on with --resume {run}"
        ) from error


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, which its name has."""
    return int(checkpoint.name.split("-")[1])


class Damaged(UserError):
    """A checkpoint does not hold what was saved."""


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the record of one checkpoint; `Damaged` unless every file is what was saved."""
    try:
        record = json_object(path / _STATE)
        _check_record(record, path)
        for name, checksum in record["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            if file_digest(path / name) != checksum:
                raise ValueError(f"{name} is not what was saved")
        return {name.removesuffix(_TENSORS): load_file(path / name) for name in record["files"]}, record
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(f"checkpoint: {path} is damaged: {first_line(error)}") from None


def _check_record(record: dict[str, Any], path: Path) -> None:
    """ValueError, which says what is wrong, for a record that `save_checkpoint` has not written."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def total(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and isinstance(value[0], float) and whole(value[1])

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "format": (lambda v: whole(v) and v == FORMAT, f"must be {FORMAT}; another version of diffdistill wrote it"),
        "step": (lambda v: whole(v) and path.name == f"step-{v:08d}", "must be the step of the folder's name"),
        "world_size": (lambda v: whole(v) and v >= 1, "must be a number of processes"),
        "totals": (lambda v: isinstance(v, dict) and all(map(total, v.values())), "must be sums and their counts"),
        "best": (lambda v: v is None or _is_best(v), "must be a step and its value"),
        "skipped": (whole, "must be a number of updates"),
        "files": (lambda v: isinstance(v, dict) and all(map(_is_file_sum, v.items())), "must be files and checksums"),
        "checksum": (lambda v: v == _own_checksum(record), "does not belong to it: the record was changed"),
    }
    for name, (holds, rule) in rules.items():
        if name not in record and name not in _LATER:
            raise ValueError(f"{_STATE} has no {name!r}")
        if not holds(record.get(name, _LATER.get(name))):
            raise ValueError(f"{_STATE}: {name!r} is {shown(record[name])}, and {rule}")


def _is_best(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [int, float]


def _is_file_sum(item: tuple[str, Any]) -> bool:
    name, checksum = item
    plain = name.endswith(_TENSORS) and name == Path(name).name
    return plain and isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum) is not None


def best_step(run: Path) -> int:
    """The step of the best checkpoint by the judgings of a run; UserError where there were none, or it is gone."""
    kept = checkpoints(run / "checkpoints")
    try:
        best = json_object(kept[-1] / _STATE).get("best") if kept else None
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint: {kept[-1]} is damaged: {first_line(error)}") from None
    if best is None or not _is_best(best):
        raise UserError(f"best: {shown(str(run))} was not judged while it trained; leave --best out")
    if best[0] not in map(step_of, kept):
        raise UserError(f"best: the checkpoint of step {best[0]}, which was the best, is gone; give --step")
    return int(best[0])


def load_newest(folder: Path) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its tensors and record; None where there has been none.

    Each damaged one that is passed over is named in a note on stderr. UserError if all of them are damaged.
    """
    passed_over: list[Damaged] = []
    for path in reversed(checkpoints(folder)):
        try:
            tensors, record = load_checkpoint(path)
        except Damaged as error:
            passed_over.append(error)
            continue
        for damaged in passed_over:
            if is_first_process():  # of several processes one says it
                print(one_line(f"note: {damaged}; {path.name}, the one before, is used instead"), file=sys.stderr)
        return path, tensors, record
    if passed_over:
        raise UserError(f"{passed_over[0]}; no earlier checkpoint is whole, so that the run must be started anew")
    return None


def state_tensors(name: str, tensors: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state's in a checkpoint; the student's of a slow target that is not there, since the student was its own."""
    whole = f"state.{name}"
    return tensors["student"] if name == "target" and whole not in tensors else tensors[whole]


def load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict` with the tensors of the checkpoint at `path`; UserError if the network is another."""
    try:
        own = module.state_dict()
        module.load_state_dict({name: divided_like(value, own.get(name)) for name, value in state.items()})
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} is of another network ({first_line(error)})") from None
