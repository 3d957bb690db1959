"""Grids of images as PNG files."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.files import atomic_write

PAPER = "white"
INK = "#222222"
GAP = 4  # pixels between tiles
MARGIN = 16  # pixels around a labelled picture


def opaque(images: Tensor) -> Tensor:
    """Images (B, 4, ...) in [0, 1], whose last channel is how opaque they are, on white; (B, 3, ...) as they are."""
    return images if images.shape[1] < 4 else images[:, :3] * images[:, 3:] + 1 - images[:, 3:]


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


def stills(samples: Tensor, columns: int) -> tuple[Tensor, int]:
    """Images as they are and `columns`; of videos (N, C, F, H, W) their frames as images, and F, a row a video."""
    if samples.ndim == 4:
        return samples, columns
    return samples.transpose(1, 2).flatten(0, 1), samples.shape[2]


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


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, whole or not at all; returns the path. Raises OSError if it cannot be written."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return atomic_write(path, data.getvalue())


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: 8-bit ones as they were."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _tiles(images: Tensor, scale: int) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise UserError(f"picture: images of the shape {tuple(images.shape)} cannot be drawn; (N, 1 or 3, H, W) can")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if not images.isfinite().all():
        raise UserError("picture: the images are not finite; the model diverged, or needs a wider type than it has")
    levels = as_bytes(images.detach().float()).cpu()
    pixels = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    pixels = np.ascontiguousarray(pixels.repeat(scale, axis=1).repeat(scale, axis=2))
    return [Image.fromarray(tile) for tile in pixels]
