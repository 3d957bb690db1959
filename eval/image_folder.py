"""What a model is to the judge, and a folder of images as one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.files import ends_of, walk
from diffdistill.data.folder import naming_image, using
from diffdistill.data.images import Data, open_data
from diffdistill.data.shards import hash_file
from diffdistill.data.texts import printable
from diffdistill.errors import UserError
from diffdistill.pictures import as_bytes


@dataclass(frozen=True)
class Model:
    """`draw(indices, seed, labels, captions, pictures)` gives images `indices` of the seed (B, C, H, W) on the CPU.

    They are uint8, or floats in about [-1, 1] where the options of sampling say so. `pictures` (B, 3, H, W) in [-1, 1]
    are those that a model changes.
    """

    name: str
    fingerprint: str  #: 16 hex digits: weights and configs
    conditions: str  #: none, classes, prompts, or images: there is nothing to draw
    classes: int | None
    steps: int | None
    call: dict[str, Any]  #: how it is sampled, for the record
    draw: Callable[..., Tensor]
    count: int | None = None  #: images that there are; None: as many as one likes
    reads_image: bool = False  #: it changes pictures
    several: bool = False  #: it may be given pictures, (B, 3, H, W) or several for each image (B, k, 3, H, W)


def open_image_folder(path: Path) -> Model:
    """Image files in the order of their names, numbers as numbers; UserError unless all are of one size and mode."""
    try:
        named = sorted(walk(path))
        files = [path / name for name in sorted(named, key=_in_order)]
        if not files:
            raise UserError(f"eval: {str(path)!r} holds no pipeline (model_index.json) and no images")
        first, digest = None, hashlib.blake2b(digest_size=8)
        for file in files:
            ends_of(file)
            with naming_image(str(file)):
                kind = using(str(file), lambda image: (image.mode, *image.size))
            if kind[0] not in ("L", "RGB"):
                raise UserError(f"eval: {file} is of mode {kind[0]}; give RGB or grey images without alpha or palette")
            first = first or kind
            if kind != first:
                one, other = (f"{width}x{height} {mode}" for mode, width, height in (kind, first))
                raise UserError(f"eval: {file} is {one} where {files[0].name} is {other}; give images of one kind")
            digest.update(os.fsencode(file.name))
            hash_file(digest, file)
        data = open_data(str(path))
    except UserError as error:
        raise UserError(re.sub("^data:", "eval:", str(error))) from None
    if len(data) != len(files):
        counts = f"{str(path)!r} has {len(files)} image files and {len(data)} of them are read as data"
        raise UserError(f"eval: {counts} (it holds splits or a metadata file); give a folder of images alone")
    row = {name: i for i, name in enumerate(named)}  # as `open_data` has them
    rows = torch.tensor([row[file.relative_to(path).as_posix()] for file in files])
    return _images(printable(path.resolve().name), digest.hexdigest(), data, rows)


def open_image_file(path: Path) -> Model:
    """The images of a .npz, .npy or .safetensors file, as samplers save them; UserError if it holds none."""
    try:
        data = open_data(str(path))
    except UserError as error:
        raise UserError(re.sub("^data:", "eval:", str(error))) from None
    return _images(data.name, data.fingerprint, data, torch.arange(len(data)))


def _in_order(name: str) -> list[list[str | int]]:
    """A key that sorts sample_2 before sample_10."""
    parts = (re.split(r"([0-9]+)", part) for part in name.split("/"))
    return [[int(text) if i % 2 else text for i, text in enumerate(part)] for part in parts]


def _images(name: str, fingerprint: str, data: Data, rows: Tensor) -> Model:
    def images(
        indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None,
        pictures: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return as_bytes(data.get(rows[list(indices)]).images)

    return Model(name, fingerprint, "images", None, None, {}, images, count=len(data))
