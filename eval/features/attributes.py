"""Do images of captions show what the captions say? Drawn shapes, still ones read by the rules of data/shapes.py and
moving ones by those of data/moving.py, as measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffdistill.data import moving, shapes
from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure
from diffdistill.eval.protocol import digest


def attributes(key: str, device: torch.device, weights: str | None) -> Measure:
    """The measure; it has no weights."""
    _refuse_weights(key, weights)
    return Attributes()


def motion(key: str, device: torch.device, weights: str | None) -> Measure:
    """That of videos; it has no weights."""
    _refuse_weights(key, weights)
    return Motion()


def _refuse_weights(key: str, weights: str | None) -> None:
    if weights is not None:
        raise UserError(f"weights: {key}: {weights!r} cannot be used; this measure reads images by rules")


def _known(captions: Sequence[str] | None, known: Mapping[str, tuple[int, ...]], kind: str) -> Tensor:
    """The attributes (B, ..) that captions name; UserError for a caption of another kind."""
    for text in captions or [""]:
        if text not in known:
            raise UserError(f"prompts: {text!r} is no caption of {kind}; {next(iter(known))!r} is one")
    return torch.tensor([known[text] for text in captions or ()])


def _in_floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


class Attributes:
    """Do images (B, 3, 32, 32) show the colour, shape and position of their captions? 1 or 0 each, and of all three.

    The offset, in pixels, is how far a shape is from the middle of the place where it should be; NaN where it is nearer
    to another place. Captions are those of drawn shapes; UserError for others.
    """

    key = "attributes"
    name = "colour, shape and position read by the rules of diffdistill.data.shapes"
    conditional = True
    fingerprint = digest([shapes.PALETTE, shapes.SHAPES, shapes.PLACES, shapes.RADII, shapes.CLEAN, "offset"])

    def __init__(self) -> None:
        sizes = (len(shapes.COLOURS), len(shapes.SHAPES), len(shapes.POSITIONS))
        self._captions = {shapes.caption(*each): each for each in itertools.product(*map(range, sizes))}

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Columns (B,): 1 or 0 for each attribute and for all three, and the offset in pixels."""
        true = _known(captions, self._captions, "a drawn shape")
        reading = shapes.read(_in_floats(images))
        right = reading.attributes == true
        columns = {"colour": right[:, 0], "shape": right[:, 1], "position": right[:, 2], "all": right.all(1)}
        places = torch.tensor(list(shapes.PLACES.values())).to(reading.middle)[true[:, 2]]
        offset = (reading.middle - places).square().sum(1).sqrt().where(right[:, 2], torch.tensor(math.nan))
        return {name: column.float() for name, column in columns.items()} | {"offset": offset}


class Motion:
    """Do videos (B, 3, F, 32, 32) show their captions' colour, shape and direction? 1 or 0 each, and of all three.

    `strayed`, in pixels, is how far a shape is from the straight way at an even speed, a root mean square over frames;
    NaN where the direction is not the caption's. Captions are those of drawn videos; UserError for others.
    """

    key = "motion"
    name = "colour, shape and direction read by the rules of diffdistill.data.moving"
    conditional = True
    fingerprint = digest([Attributes.fingerprint, moving.DIRECTIONS, moving.TRAVEL, moving.RADII, "strayed"])

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Columns (B,): 1 or 0 for each attribute and for all three, and pixels off the way."""
        if images.ndim != 5:
            raise UserError("protocol: 'motion' measures videos, and these are images; name another protocol")
        true = _known(captions, moving.ATTRIBUTES, "a drawn video")
        reading = moving.read_moving(_in_floats(images))
        right = reading.attributes == true
        columns = {"colour": right[:, 0], "shape": right[:, 1], "direction": right[:, 2], "all": right.all(1)}
        strayed = reading.strayed.where(right[:, 2], torch.tensor(math.nan))
        return {name: column.float() for name, column in columns.items()} | {"strayed": strayed}
