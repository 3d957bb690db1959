"""The README's picture, cut from those of docs/: each has its command beside it, in the document that shows it.

python docs/gallery.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.pictures import GAP, MARGIN, save_png, side_by_side

DOCS = Path(__file__).parent
SIDE, COUNT = 64, 12
"""Pixels of a shown image, images of a row."""


class Part(NamedTuple):
    """Some rows of a picture."""

    file: str
    tile: int  #: pixels of one of its images
    rows: dict[str, int]  #: label -> row


PARTS = (
    Part(
        "strangers.png",
        28,
        {"28x28 digits: teacher, 50 steps": 1, "dmd2, 1 step": 2, "consistency, 1 step": 3},
    ),
    Part(
        "demo_text.png",
        64,
        {"text to image: teacher, 1 step": 1, "teacher, 32 steps": 6, "dmd2, 1 step": 7},
    ),
    Part(
        "demo_edit.png",
        64,
        {"to change an image: given": 0, "teacher, 16 steps": 4, "student, 1 step": 5},
    ),
)


def row_of(part: Part, row: int) -> Tensor:
    """(12, 3, 64, 64) in [-1, 1]; images stand at the right of a picture, rows below each other."""
    picture = Image.open(DOCS / part.file).convert("RGB")
    step, top = part.tile + GAP, MARGIN + row * (part.tile + max(2 * GAP, part.tile // 6))  # as side_by_side has them
    left = picture.width - MARGIN - COUNT * step + GAP
    tiles = []
    for k in range(COUNT):
        place = left + k * step, top, left + k * step + part.tile, top + part.tile
        tile = picture.crop(place).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(tiles)


if __name__ == "__main__":
    rows = [(label, row_of(part, row)) for part in PARTS for label, row in part.rows.items()]
    save_png(side_by_side(rows), DOCS / "gallery.png")
