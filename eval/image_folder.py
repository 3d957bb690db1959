"""What a model is to the judge, and a folder of images as one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.folder import IMAGE_SUFFIXES, naming_image
from diffdistill.data.images import open_data
from diffdistill.data.shards import hash_file
from diffdistill.errors import UserError
from diffdistill.pictures import as_bytes


@dataclass(frozen=True)
class Model:
    """`draw(indices, seed, labels, captions)` gives images `indices` of the seed (B, C, H, W) on the CPU.

    They are uint8, or floats in about [-1, 1] where the options of sampling say so.
    """

    name: str
    fingerprint: str  #: 16 hex digits: weights and configs
    conditions: str  #: none, classes, prompts, or images: there is nothing to draw
    classes: int | None
    steps: int | None
    call: dict[str, Any]  #: how it is sampled, for the record
    draw: Callable[[Sequence[int], int, Tensor | None, Sequence[str] | None], Tensor]
    count: int | None = None  #: images that there are; None: as many as one likes


def open_image_folder(path: Path) -> Model:
    """Image files in sorted order, as they are: all of one size and mode. UserError where they are not."""
    images_below = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(p for p in images_below if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files:
        raise UserError(f"eval: {str(path)!r} holds no pipeline (model_index.json) and no images")
    numbers = [[int(n) for n in re.findall(r"\d+", file.name)] for file in files]
    if all(numbers) and sorted(numbers) != numbers and len({file.parent for file in files}) == 1:
        raise UserError(
            f"eval: the files of {str(path)!r} are not in the order of their numbers, by which captions are "
            "compared; call them 00000.png, 00001.png, .."
        )
    first, digest = None, hashlib.blake2b(digest_size=8)
    for file in files:
        with naming_image(str(file)), Image.open(file) as image:
            kind = (image.mode, *image.size)
        if image.mode not in ("L", "RGB"):
            raise UserError(f"eval: {file} is of mode {image.mode}; give RGB or grey images without alpha or palette")
        first = first or kind
        if kind != first:
            one, other = (f"{width}x{height} {mode}" for mode, width, height in (kind, first))
            raise UserError(f"eval: {file} is {one} where {files[0].name} is {other}; give images of one kind")
        digest.update(file.name.encode())
        hash_file(digest, file)
    data = open_data(str(path))
    if len(data) != len(files):
        counts = f"{str(path)!r} has {len(files)} image files and {len(data)} of them are read as data"
        raise UserError(f"eval: {counts} (it holds splits or a metadata.jsonl); give a folder of images alone")

    def images(indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None) -> Tensor:
        return as_bytes(data.get(torch.tensor(indices)).images)

    return Model(path.resolve().name, digest.hexdigest(), "images", None, None, {}, images, count=len(files))
