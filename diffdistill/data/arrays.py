"""Arrays of images and labels in .npz, .npy and .safetensors files. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from diffdistill.errors import UserError

ARRAY_SUFFIXES = {".npz", ".npy", ".safetensors"}
_IMAGES, _LABELS = ("images", "image", "x", "data", "arr_0"), ("labels", "label", "y", "arr_1")
_MOST_TIMES, _MUCH = 200, 1 << 26  # an array that is larger than this many bytes may be compressed so many times


def load_arrays(path: Path, split: str | None) -> tuple[Tensor, Tensor | None]:
    """The images and, if there are any, the labels of a .npz or .safetensors file, found by name; those of a .npy."""
    if path.suffix.lower() == ".npy":
        return _lone_array(path), None
    is_safetensors, part, whole = path.suffix.lower() == ".safetensors", split or "train", not split
    names = [f"{part}_images", f"x_{part}"] + [*_IMAGES] * whole
    label_names = [f"{part}_labels", f"y_{part}"] + [*_LABELS] * whole

    def load(key: str) -> Tensor:
        if is_safetensors:
            return file.get_tensor(key)
        if _is_pickled(path, key):
            raise UserError(f"data: {path} holds pickled objects in {key!r}, which are never loaded; save plain arrays")
        check_expansion(path, key, "data")
        array = file[key]
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    if not is_safetensors and not zipfile.is_zipfile(path):
        raise UserError(
            f"data: {path} is no .npz archive, and nothing pickled is ever loaded; save arrays with numpy.savez"
        )
    try:
        opened: Any = safe_open(path, "pt") if is_safetensors else np.load(path, allow_pickle=False)
        with opened as file:
            held = sorted(file.keys())
            images, labels = (next((load(k) for k in keys if k in held), None) for keys in (names, label_names))
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and safetensors raise many unrelated types
        raise UserError(f"data: cannot read {path}: {error}") from error
    if images is None:
        raise UserError(f"data: {path} holds {held}; the images are looked for as {names}")
    return images, labels


def _lone_array(path: Path) -> Tensor:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # which compares its size with the file's
        return torch.from_numpy(np.array(mapped, dtype=mapped.dtype.newbyteorder("=")))
    except Exception as error:  # numpy and torch raise many unrelated types
        raise UserError(f"data: cannot read {path}: {error}") from error


def _is_pickled(path: Path, key: str) -> bool:
    """Whether an array of a .npz file holds Python objects, by its header alone."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        read = headers.get(np.lib.format.read_magic(member))
        return read is not None and read(member)[2].hasobject


def check_expansion(path: Path, key: str, field: str) -> None:
    """UserError, which begins with `field`, for an array of a .npz that fills the memory from nothing."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
    if member.file_size > max(_MUCH, _MOST_TIMES * member.compress_size):
        sizes = f"{member.compress_size >> 10} KiB that expand to {member.file_size >> 20} MiB"
        raise UserError(f"{field}: {path} holds {sizes} in {key!r}; save such arrays with numpy.savez, uncompressed")


def holds_arrays(path: Path) -> bool:
    """Whether a .npz file holds images, by the names of its arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(f"{name}.npy" in archive.namelist() for name in _IMAGES)
