"""How images become a network's input: resizes, crops and normalisations, as the authors of each metric do them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 to uint8, antialiased, as Pillow does it: where both sides shrink alike, 0.5 % of values are one level off.

    Where they do not, Pillow rounds its two passes in the other order, and a fifth of the values are.
    """
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def middle(images: Tensor, side: int) -> Tensor:
    """The middle square; what is odd goes to the bottom right."""
    top, left = ((size - side) // 2 for size in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def clip_pixels(images: Tensor, side: int) -> Tensor:
    """CLIP's own preprocessing: short side to `side`, bicubic, in 8 bit; the middle square (B, C, side, side)."""
    short, long = sorted(images.shape[2:])
    other = int(side * long / short)
    size = (side, other) if images.shape[2] == short else (other, side)
    return middle(bicubic(images, *size), side)


def normalised(x: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Images in 0..255, grey or RGB, as (x / 255 - mean) / std of three channels."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in constants)
    return (x.float() / 255 - mean) / std
