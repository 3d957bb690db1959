"""Videos of drawn shapes that move, with captions, "a red circle moves left", and a judge that reads them by rules.

Video i of a seed is a function of (seed, i) and the number of its frames: a shape begins near the middle and goes in a
straight line at an even speed, so that the first frame does not say where to. The judge reads each frame as that of
still shapes does (`shapes.read`), and the direction from where the shape is in the first frame and in the last.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.images import Data, Samples
from diffdistill.data.shapes import COLOURS, NONE, SHAPES, SIDE, coloured, mask_of, read
from diffdistill.errors import UserError
from diffdistill.rng import generator

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # y downwards
WAYS = tuple(DIRECTIONS)
TRAVEL = 8.0  # pixels from the first frame to the last
RADII = (5.0, 6.0)
JITTER = 1.5  # pixels, of the beginning, either way in x and y


def moving_caption(colour: int, shape: int, way: int) -> str:
    """The caption of the attributes at these indices, such as "a red circle moves left"."""
    return f"a {COLOURS[colour]} {SHAPES[shape]} moves {WAYS[way]}"


ATTRIBUTES = {
    moving_caption(*each): each for each in itertools.product(range(len(COLOURS)), range(len(SHAPES)), range(len(WAYS)))
}
"""Indices of colour, shape and direction by caption."""


def draw_moving(seed: int, count: int, frames: int) -> tuple[Tensor, list[str]]:
    """Videos 0..count-1 of the seed, (N, 3, frames, SIDE, SIDE) in [-1, 1], and captions; all attributes uniform."""
    videos, captions = torch.empty(count, 3, frames, SIDE, SIDE), []
    kinds = list(ATTRIBUTES.items())
    for i in range(count):
        g = generator("cpu", seed, i, "moving")
        text, (colour, shape, way) = kinds[int(torch.randint(len(kinds), (), generator=g))]
        size, dx, dy, brightness = torch.rand(4, generator=g).tolist()
        x, y = (SIDE / 2 + JITTER * (2 * d - 1) for d in (dx, dy))
        radius = RADII[0] + (RADII[1] - RADII[0]) * size
        for f, gone in enumerate(_gone(frames).tolist()):
            at = x + gone * DIRECTIONS[WAYS[way]][0], y + gone * DIRECTIONS[WAYS[way]][1]
            videos[i, :, f] = coloured(mask_of(SHAPES[shape], SIDE, *at, radius), 0.3 * brightness, colour)
        captions.append(text)
    return videos, captions


def _gone(frames: int) -> Tensor:
    """(frames,) pixels of the way that are behind the shape in each."""
    return torch.linspace(0, TRAVEL, frames) if frames > 1 else torch.zeros(1)


def open_moving(name: str, count: int, frames: int, size: tuple[int, int], conditioned: bool, seed: int = 0) -> Data:
    """The first videos of the seed as data; `conditioned`: each with its first frame, which it begins with.

    UserError for another size than SIDE, in which alone they can be judged.
    """
    if size != (SIDE, SIDE):
        raise UserError(f"data: {name!r} is of {SIDE}x{SIDE} pixels, and this teacher's videos {size[1]}x{size[0]}")
    videos, captions = draw_moving(seed, count, frames)
    digest = hashlib.blake2b(videos.mul(127).round().to(torch.int8).numpy().data, digest_size=8).hexdigest()

    def read_rows(indices: list[int]) -> Samples:
        rows = videos[indices]
        return Samples(rows, captions=[captions[i] for i in indices], conditions=rows[:, :, 0] if conditioned else None)

    return Data(name, (3, frames, *size), None, digest, count, read_rows)


class MovingReading(NamedTuple):
    """What `read_moving` sees in N videos."""

    attributes: Tensor  #: (N, 3) indices of colour, shape and direction; NONE where none is seen
    strayed: Tensor  #: (N,) pixels, root mean square over frames, from the straight way at an even speed


def read_moving(videos: Tensor) -> MovingReading:
    """What videos (N, 3, F, SIDE, SIDE) in [-1, 1] show.

    A colour or shape is seen where all frames show the same, and a direction where the shape goes at least half the
    way, within 45 degrees of it.
    """
    count, frames = len(videos), videos.shape[2]
    reading = read(videos.transpose(1, 2).flatten(0, 1))
    each, middle = reading.attributes.view(count, frames, 3), reading.middle.view(count, frames, 2)
    seen = torch.where((each == each[:, :1]).all(1), each[:, 0], NONE)
    ways = torch.tensor(list(DIRECTIONS.values())).to(middle)
    along = (middle[:, -1] - middle[:, 0]) @ ways.T
    way = torch.where(along.max(1).values >= TRAVEL / 2, along.argmax(1), NONE)
    straight = middle[:, :1] + _gone(frames).to(middle).view(1, -1, 1) * ways[along.argmax(1)][:, None]
    strayed = (middle - straight).square().sum(2).mean(1).sqrt()
    return MovingReading(torch.stack([seen[:, 0], seen[:, 1], way], 1), strayed)
