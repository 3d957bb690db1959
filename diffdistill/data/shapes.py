"""Drawn shapes with captions, "a red circle at the top left", and a judge that reads them back by rules.

Picture i of a seed is a function of (seed, i). The judge needs no network: the colour nearest to the pixels that
differ from the background, the template that overlaps best, the place nearest to the centroid.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.rng import generator

SIDE = 32
HELD_OUT = 1  # the seed that nothing is trained on
PALETTE = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {  # x, y of the middle, y downwards
    "at the top left": (9.5, 9.5),
    "at the top right": (22.5, 9.5),
    "in the middle": (16, 16),
    "at the bottom left": (9.5, 22.5),
    "at the bottom right": (22.5, 22.5),
}
COLOURS, POSITIONS = tuple(PALETTE), tuple(PLACES)
KINDS = len(COLOURS) * len(SHAPES) * len(POSITIONS)
RADII = (5.0, 7.0)
JITTER = 2.5  # pixels, either way in x and y
CLEAN = 0.8
NONE = -1  # what the judge says where it sees none


class Drawing(NamedTuple):
    """A picture of one coloured shape, its caption and the attributes that both show."""

    image: Tensor  #: float32 (3, SIDE, SIDE) in [-1, 1]
    caption: str
    attributes: tuple[int, int, int]  #: indices of colour, shape and position


def caption(colour: int, shape: int, position: int) -> str:
    """The caption of the attributes at these indices, such as "a red circle in the middle"."""
    return f"a {COLOURS[colour]} {SHAPES[shape]} {POSITIONS[position]}"


class Edits(NamedTuple):
    """N pictures, what each was made from, and the attributes that the picture shows."""

    images: Tensor  #: float32 (N, 3, SIDE, SIDE) in [-1, 1]
    conditions: Tensor  #: the same shapes in another colour each
    captions: list[str]  #: "make it red"
    attributes: Tensor  #: (N, 3) indices of colour, shape and position


def draw(seed: int, i: int) -> Drawing:
    """Picture i of the seed: every attribute uniform, with jitter in size, place and the background's brightness."""
    (colour, shape, position), mask, ground, _ = _plan(seed, i)
    return Drawing(coloured(mask, ground, colour), caption(colour, shape, position), (colour, shape, position))


def draw_edits(seed: int, count: int) -> Edits:
    """Edits 0..count-1: picture i of the seed as the condition, and in another colour, which the caption names."""
    rows = []
    for i in range(count):
        (colour, shape, position), mask, ground, g = _plan(seed, i)
        new = (colour + 1 + int(torch.randint(len(COLOURS) - 1, (), generator=g))) % len(COLOURS)
        rows.append((coloured(mask, ground, new), coloured(mask, ground, colour), new, shape, position))
    return Edits(
        torch.stack([row[0] for row in rows]),
        torch.stack([row[1] for row in rows]),
        [f"make it {COLOURS[row[2]]}" for row in rows],
        torch.tensor([row[2:] for row in rows]),
    )


def coloured(mask: Tensor, ground: float, colour: int) -> Tensor:
    """The picture (3, SIDE, SIDE) of a shape's mask in a colour, in [-1, 1]."""
    return 2 * (ground + mask * (torch.tensor(PALETTE[COLOURS[colour]]).view(3, 1, 1) - ground)) - 1


def _plan(seed: int, i: int) -> tuple[tuple[int, int, int], Tensor, float, torch.Generator]:
    """Attributes of picture i, its mask, its background's brightness, and the generator behind them."""
    g = generator("cpu", seed, i, "shapes")
    kind = int(torch.randint(KINDS, (), generator=g))
    rest, position = divmod(kind, len(POSITIONS))
    colour, shape = divmod(rest, len(SHAPES))
    size, dx, dy, brightness = torch.rand(4, generator=g).tolist()
    x, y = PLACES[POSITIONS[position]]
    radius = RADII[0] + (RADII[1] - RADII[0]) * size
    mask = mask_of(SHAPES[shape], SIDE, x + JITTER * (2 * dx - 1), y + JITTER * (2 * dy - 1), radius)
    return (colour, shape, position), mask, 0.3 * brightness, g


def draw_many(seed: int, count: int) -> tuple[Tensor, list[str], Tensor]:
    """Pictures 0..count-1: images (N, 3, SIDE, SIDE), captions, attributes (N, 3)."""
    drawn = [draw(seed, i) for i in range(count)]
    return (
        torch.stack([d.image for d in drawn]),
        [d.caption for d in drawn],
        torch.tensor([d.attributes for d in drawn]),
    )


def mask_of(shape: str, side: int, x: float, y: float, radius: float) -> Tensor:
    """(side, side) coverage of each pixel by the shape, from its signed distance; the middle is at (x, y)."""
    at = torch.arange(side) + 0.5
    u, v = at[None, :] - x, at[:, None] - y
    if shape == "circle":
        distance = (u.square() + v.square()).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(u.abs(), v.abs()) - 0.85 * radius
    elif shape == "triangle":  # of equal sides, its point upwards
        distance = torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.6 * radius
    else:
        arm = torch.maximum(u.abs() - radius, v.abs() - 0.36 * radius)
        distance = torch.minimum(arm, torch.maximum(v.abs() - radius, u.abs() - 0.36 * radius))
    return (0.5 - distance).clamp(0, 1)


# -- the judge ---------------------------------------------------------------------------------------------


@cache
def _templates() -> Tensor:
    """(shapes * sizes, 1, 19, 19), every shape at sizes a little beyond those that are drawn."""
    sizes = torch.linspace(RADII[0] - 0.5, RADII[1] + 0.5, 7).tolist()
    return torch.stack([mask_of(shape, 19, 9.5, 9.5, size)[None] for shape in SHAPES for size in sizes])


class Reading(NamedTuple):
    """What `read` sees in N images."""

    attributes: Tensor  #: (N, 3) indices of colour, shape and position; NONE where none is seen
    middle: Tensor  #: (N, 2) x and y of what differs from the background
    overlap: Tensor  #: (N,) of the best template with it, intersection over union


def read(images: Tensor) -> Reading:
    """What images (N, 3, SIDE, SIDE) in [-1, 1] show.

    Nothing is seen where nothing differs from the background, and no shape where the best template overlaps by less
    than CLEAN: a blur or two shapes in one picture are no shape.
    """
    pixels = (images.float().clamp(-1, 1) + 1) / 2
    border = torch.cat([pixels[:, :, [0, -1]].flatten(2), pixels[:, :, 1:-1, [0, -1]].flatten(2)], 2)
    ground = border.median(2).values
    offset = (pixels - ground[:, :, None, None]).square().sum(1).sqrt()
    strongest = offset.flatten(1).topk(16).values.mean(1).clamp_min(1e-6)
    mask = (offset / strongest[:, None, None]).clamp(0, 1)

    inside = (mask > 0.7).float()
    mean = (pixels * inside[:, None]).sum((2, 3)) / inside.sum((1, 2)).clamp_min(1)[:, None]
    colour = torch.cdist(mean, torch.tensor(list(PALETTE.values())).to(mean)).argmin(1)

    templates = _templates().to(mask)
    common = F.conv2d(mask[:, None], templates, padding=9).flatten(2).max(2).values
    union = mask.square().sum((1, 2))[:, None] + templates.square().sum((1, 2, 3)) - common
    overlap, shape = (common / union).view(len(images), len(SHAPES), -1).max(2).values.max(1)

    at = torch.arange(SIDE).to(mask) + 0.5
    solid = torch.where(mask > 0.3, mask, 0)
    weight = solid.sum((1, 2)).clamp_min(1e-6)
    middle = torch.stack([(solid.sum(1) * at).sum(1), (solid.sum(2) * at).sum(1)], 1) / weight[:, None]
    position = torch.cdist(middle, torch.tensor(list(PLACES.values())).to(middle)).argmin(1)

    seen = torch.stack([colour, shape, position], 1)
    seen[overlap < CLEAN, 1] = NONE
    seen[strongest < 0.15] = NONE
    return Reading(seen, middle, overlap)


def judge(images: Tensor, expected: Tensor) -> dict[str, float]:
    """Percentages of images whose colour, shape, position, and all three, are those expected (N, 3); and the spread.

    The spread, in pixels, is the root mean square distance of shapes from the middle of the place they were to be at,
    where they are nearest to it: how much of the pictures' variety is there.
    """
    reading = read(images)
    right = reading.attributes == expected
    columns = {"colour %": right[:, 0], "shape %": right[:, 1], "position %": right[:, 2], "all three %": right.all(1)}
    places = torch.tensor(list(PLACES.values())).to(reading.middle)[expected[:, 2]]
    away = (reading.middle - places).square().sum(1)[right[:, 2]]
    spread = float(away.mean().sqrt()) if len(away) else 0.0
    return {name: 100 * float(column.float().mean()) for name, column in columns.items()} | {"spread px": spread}
