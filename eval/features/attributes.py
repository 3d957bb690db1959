"""Do images of captions show what the captions say? Drawn shapes, read by the rules of data/shapes.py, as a measure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.data import shapes
from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure
from diffdistill.eval.protocol import digest


def attributes(key: str, device: torch.device, weights: str | None) -> Measure:
    """The measure; it has no weights."""
    if weights is not None:
        raise UserError(f"weights: {key}: {weights!r} cannot be used; this measure reads images by rules")
    return Attributes()


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
        for text in captions or [""]:
            if text not in self._captions:
                raise UserError(
                    f"prompts: {text!r} is no caption of a drawn shape; 'a red circle in the middle' is one"
                )
        true = torch.tensor([self._captions[text] for text in captions or ()])
        reading = shapes.read(images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images)
        right = reading.attributes == true
        columns = {"colour": right[:, 0], "shape": right[:, 1], "position": right[:, 2], "all": right.all(1)}
        places = torch.tensor(list(shapes.PLACES.values())).to(reading.middle)[true[:, 2]]
        offset = (reading.middle - places).square().sum(1).sqrt().where(right[:, 2], torch.tensor(math.nan))
        return {name: column.float() for name, column in columns.items()} | {"offset": offset}
