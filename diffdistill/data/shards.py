"""Folders of safetensors shards with an index: made once, resumable, checksummed, memory-mapped when read.

`diffdistill pairs` and `diffdistill encode` keep their results so. The index holds every setting that the content
depends on and a checksum for each shard; a shard that is there and has its checksum is never made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from diffdistill.data.progress import progress
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.files import atomic_write


@dataclass(frozen=True)
class Kind:
    """One sort of folder: what error lines call it, and the command that makes it, `diffdistill <name>` by default."""

    name: str
    what: str
    unit: str
    command: str = ""

    @property
    def index(self) -> str:
        """The file name of the folder's index."""
        return f"{self.name}.json"

    @property
    def made_by(self) -> str:
        """The command that makes such a folder, as an error names it."""
        return f"`diffdistill {self.command or self.name}`"


def start(kind: Kind, out: Path, settings: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    """The folder's index: the one that is there if it is of the same settings, else a new one with `notes` besides.

    UserError if shards of other settings are there.
    """
    others = out.exists() and (not out.is_dir() or any(_foreign(kind, path) for path in out.iterdir()))
    if (out / kind.index).exists():
        index = read_index(kind, out)
        name = next((n for n, value in settings.items() if index["settings"].get(n) != value), None)
        if name is None:
            return index
        if others:  # an index alone, of a start that failed, is replaced
            raise UserError(
                f"out: {str(out)!r} holds {kind.what} made with {name} {index['settings'].get(name)}, "
                f"and {settings[name]} is asked for; choose another --out"
            )
    elif others:
        raise UserError(f"out: {str(out)!r} exists and is no folder of {kind.what}; choose another --out")
    index = {**notes, "settings": settings, "environment": environment(), "shards": {}}
    try:
        write_index(out / kind.index, index)
    except OSError as error:
        raise UserError(f"out: cannot write to {str(out)!r} ({error.strerror}); choose another --out") from None
    return index


def _foreign(kind: Kind, path: Path) -> bool:
    """Whether a file is neither the index nor what a killed write of it left."""
    return path.name != kind.index and not (path.name.startswith(f".{kind.index}.") and path.suffix == ".tmp")


def make(
    kind: Kind, out: Path, index: dict[str, Any], batch_size: int, produce: Callable[[range], dict[str, Tensor]],
    rank: int = 0, world_size: int = 1, quiet: bool = False,
) -> None:  # fmt: skip
    """Make the shards that are missing; `produce` gives the columns (n, ...) of n indices, in batches.

    Of several processes each makes every world_size-th, and those after the first note theirs in an index of their
    own, so that none writes what another does. A batch never depends on who makes it.
    """
    count, size = index["settings"]["count"], index["settings"]["shard_size"]
    is_stream = "asked" in index["settings"]  # which may end before its count
    ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
    names = [f"{k:05d}.safetensors" for k in range(len(ranges))]
    done = read_index(kind, out)["shards"]
    missing = [k for k, name in enumerate(names) if not is_whole(out / name, done.get(name))]
    if not missing:
        if rank == 0 and not quiet:
            print(f"{out} is done: {count} {kind.what}")
        return
    file = out / (kind.index if rank == 0 else f"{kind.name}.{rank}.json")
    if rank > 0:
        index = json.loads(file.read_text()) if file.exists() else {"shards": {}}
    elif world_size == 1:
        index["shards"] = done
        write_index(file, index)
        for others in out.glob(f"{kind.name}.*.json"):  # whose shards are in ours now, and which may be made anew
            others.unlink()
    there = count - sum(len(ranges[k]) for k in missing)
    missing = missing if world_size == 1 else [k for k in missing if k % world_size == rank]
    show = progress(kind.unit, there + sum(len(ranges[k]) for k in missing), there, silent=quiet or rank > 0)
    for done, k in enumerate(missing):
        parts = []
        for first in range(ranges[k].start, ranges[k].stop, batch_size):
            indices = range(first, min(first + batch_size, ranges[k].stop))
            parts.append(produce(indices))
            show(len(indices))
        data = save(_joined(parts))
        left, what_is_left = (1, "the next file") if is_stream else (len(missing) - done, "what is missing")
        need, free = len(data) * left, shutil.disk_usage(out).free
        if free < need:
            raise UserError(f"out: {str(out)!r} has {free >> 20} MiB free and {what_is_left} needs {need >> 20} MiB")
        atomic_write(out / names[k], data)
        if world_size == 1:  # the same command may run a second time, beside this one
            index["shards"] |= read_index(kind, out)["shards"]
        index["shards"][names[k]] = hashlib.sha256(data).hexdigest()
        index["shards"] = dict(sorted(index["shards"].items()))
        write_index(file, index)


def open_shards(kind: Kind, folder: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Settings and columns of a finished folder; every checksum is verified. UserError if it is not whole."""
    index = read_index(kind, folder)
    settings, sums = index["settings"], index["shards"]
    count = -(-settings["count"] // settings["shard_size"])
    again = f"run {kind.made_by} again"
    if len(sums) < count:
        raise UserError(
            f"{kind.name}: {str(folder)!r} is not finished, {len(sums)} of {count} shards are there; {again}"
        )
    for name, checksum in sums.items():
        if not is_whole(folder / name, checksum):
            raise UserError(f"{kind.name}: {folder / name} is missing or damaged; {again}")
    return settings, [mapped(kind, folder / name) for name in sums]


def rows(shards: list[dict[str, Tensor]], size: int, count: int, indices: Tensor) -> dict[str, Tensor]:
    """The rows at int64 indices (B,) of shards of `size` rows, in that order; IndexError outside 0..count-1."""
    chosen = indices.tolist()
    if chosen and not 0 <= min(chosen) <= max(chosen) < count:
        raise IndexError(f"indices {min(chosen)}..{max(chosen)} lie outside 0..{count - 1}")
    return {key: torch.stack([_row(shards[i // size], key, i % size) for i in chosen]) for key in row_shapes(shards[0])}


def bytes_of(tensor: Tensor) -> memoryview:
    """What a fingerprint reads of a tensor, wherever it is and however it lies."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


_KEPT = ".rows"


def without_padding(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of n prompts: float columns (n, L, D) as (all rows, D), without the rows of zeros at the end of each prompt.

    Beside such a column stands `<name>.rows`, int32 (n, 2): how many rows a prompt has, and L. `make` writes both to a
    shard, unless no prompt is shorter than L, and `rows` gives back what was there, padded with zeros.
    """
    packed = {}
    for name, value in columns.items():
        packed[name] = value
        if value.ndim == 3 and value.is_floating_point():
            length = value.shape[1]
            places = torch.arange(1, length + 1, device=value.device)
            kept = ((value != 0).any(-1) * places).amax(1)
            packed[name] = torch.cat([row[:n] for row, n in zip(value, kept.tolist(), strict=True)])
            packed[name + _KEPT] = torch.stack([kept, torch.full_like(kept, length)], 1).int()
    return packed


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of consecutive rows as one; those of which no row is padded in the shape that they had."""
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    for key in [key for key in columns if key.endswith(_KEPT)]:
        kept, whole = columns[key].unbind(1)
        if torch.equal(kept, whole):
            name = key.removesuffix(_KEPT)
            columns[name] = columns[name].unflatten(0, (len(kept), -1))
            del columns[key]
    return columns


def row_shapes(shard: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of a row of each column, padded."""
    whole = {}
    for key, value in shard.items():
        if not key.endswith(_KEPT):
            kept = shard.get(key + _KEPT)
            lead = () if kept is None else (int(kept[0, 1]),)
            whole[key] = (*lead, *value.shape[1:])
    return whole


def _row(shard: Mapping[str, Tensor], key: str, i: int) -> Tensor:
    counts = shard.get(key + _KEPT)
    if counts is None:
        return shard[key][i]
    first, (kept, whole) = int(counts[:i, 0].sum()), counts[i].tolist()
    return functional.pad(shard[key][first : first + kept], (0, 0, 0, whole - kept))


def write_index(file: Path, index: Mapping[str, Any]) -> None:
    """A folder's index, or that of one of the processes that made it, whole or not at all."""
    atomic_write(file, json.dumps(index, indent=2) + "\n")


def read_index(kind: Kind, folder: Path) -> dict[str, Any]:
    """The folder's index; UserError if it is missing, no JSON or without the settings and shards of this kind."""
    try:
        index = json.loads((folder / kind.index).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        made = f"make it with {kind.made_by}"
        raise UserError(f"{kind.name}: {str(folder)!r} has no {kind.index}; {made}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{kind.name}: {folder / kind.index} is not readable JSON ({error})") from None
    settings = index.get("settings") if isinstance(index, dict) else None
    whole = isinstance(settings, dict) and {"count", "shard_size", "shape", "fingerprint"} <= set(settings)
    if not whole or not isinstance(index.get("shards"), dict):
        anew = f"make the folder anew with {kind.made_by}"
        raise UserError(f"{kind.name}: {folder / kind.index} is no index of {kind.what}; {anew}")
    for others in sorted(folder.glob(f"{kind.name}.*.json")):  # of the other processes that made shards
        index["shards"] |= json.loads(others.read_text(encoding="utf-8"))["shards"]
    index["shards"] = dict(sorted(index["shards"].items()))
    return index


def is_whole(path: Path, checksum: str | None) -> bool:
    """Whether the file exists and has this SHA-256 checksum, in hexadecimal; False for None."""
    if checksum is None or not path.is_file():
        return False
    digest = hashlib.sha256()
    hash_file(digest, path)
    return digest.hexdigest() == checksum


def hash_file(digest: Any, path: Path) -> None:
    """Add a file's bytes to a digest of hashlib, in blocks."""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)


def mapped(kind: Kind, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from the disk; UserError if the file is cut short or missing."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{kind.name}: {path} is not a whole safetensors file ({error})") from None
