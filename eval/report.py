"""Pictures and tables of an evaluation, with Pillow and the standard library only.

Images are `(N, C, H, W)` in [-1, 1], C = 1 (grey) or 3 (RGB). Functions that build something return
it; the three that write (`save_png`, `write_json`, `write_text`) write whole files or none.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffdistill.files import atomic_write

PAPER = "white"
INK = "#222222"
GAP = 4  # pixels between tiles
MARGIN = 16  # pixels around a labelled picture


def image_grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """All images in rows of `columns`, each pixel drawn as `scale` x `scale`, no outer margin.

    Raises ValueError if columns or scale < 1, or the images are not as the module says.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tiles = _tiles(images, scale)
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return canvas


def side_by_side(rows: Sequence[tuple[str, Tensor]], scale: int = 1) -> Image.Image:
    """One labelled row of images per entry, e.g. teacher and student from the same noise, aligned in columns.

    Raises ValueError if there is no row, or as `image_grid`, or the images are not all of one shape.
    """
    if not rows:
        raise ValueError("no rows to draw")
    if len({images.shape[1:] for _, images in rows}) > 1:
        raise ValueError(f"rows of different image shapes: {[tuple(images.shape) for _, images in rows]}")
    strips = [image_grid(images, len(images), scale) for _, images in rows]
    height = strips[0].height
    font = ImageFont.load_default(size=min(20, max(12, height // 4)))
    label_width = math.ceil(max(font.getlength(label) for label, _ in rows))
    left = MARGIN + label_width + MARGIN
    pitch = height + max(2 * GAP, height // 6)  # rows stand further apart than columns: they are what differs
    size = (left + max(s.width for s in strips) + MARGIN, 2 * MARGIN + (len(rows) - 1) * pitch + height)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = MARGIN + i * pitch
        draw.text((left - MARGIN, top + height / 2), label, fill=INK, font=font, anchor="rm")
        canvas.paste(strip, (left, top))
    return canvas


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """A Markdown table of the named columns, numbers to the right. A missing key or None is a dash."""
    cells = [[_cell(row.get(c)).replace("|", "\\|").replace("\n", " ") for c in columns] for row in rows]
    rules = ["---:" if _numeric(rows, c) else "---" for c in columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(columns), rules, *cells])


def text_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """The same table for a terminal: padded columns under a rule."""
    cells = [[_cell(row.get(c)).replace("\n", " ") for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [_numeric(rows, c) for c in columns]
    lines = [list(columns), ["-" * w for w in widths], *cells]
    return "".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip() + "\n"
        for line in lines
    )


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return atomic_write(path, data.getvalue())


def write_json(value: object, path: str | os.PathLike[str]) -> Path:
    """Raises ValueError on NaN or infinity, which JSON has no word for."""
    return atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    return atomic_write(path, text)


def check_writable(folder: Path) -> None:
    """OSError now and not after the work, for a folder that nothing can be written to."""
    write_text("", folder / ".probe").unlink()


def with_notes(tables: Sequence[str], notes: Sequence[str]) -> str:
    """Markdown tables, and a list of notes below them."""
    return "\n".join(tables) + "\n" + "".join(f"- {line}\n" for line in notes)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: 8-bit ones as they were."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _tiles(images: Tensor, scale: int) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"want images (N, 1 or 3, H, W), got {tuple(images.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if not images.isfinite().all():
        raise ValueError("images are not finite")
    levels = as_bytes(images.detach().float()).cpu()
    pixels = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    pixels = np.ascontiguousarray(pixels.repeat(scale, axis=1).repeat(scale, axis=2))
    return [Image.fromarray(tile) for tile in pixels]


def _numeric(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _cell(value: object) -> str:
    """Floats at four significant digits, or whole where that is more: 0.9950, 12.34, 50000."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 999.95 <= abs(value) < 1e9 else f"{value:#.4g}"
