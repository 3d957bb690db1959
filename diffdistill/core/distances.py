"""Distances between two images of unit variance, for losses that compare a sample with a given one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.core.losses import per_sample_mean, pseudo_huber
from diffdistill.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]
"""(B, ...), (B, ...) of unit variance -> (B,)."""


def distance(kind: str, shape: tuple[int, ...], data_std: float = 1.0, huber_c: float | None = None) -> Distance:
    """The distance of samples of a shape, measured in the data's own units.

    'l2' is the mean square. 'huber' is `pseudo_huber` with c = `huber_c`, by default Song & Dhariwal's
    0.00054 sqrt(dimensions) (2023, arXiv:2310.14189, section 3.3). 'lpips' is `lpips_vgg`.
    """
    if kind == "l2":
        return lambda x, y: per_sample_mean((data_std * (x - y)).square())
    if kind == "huber":
        c = 0.00054 * math.sqrt(math.prod(shape)) if huber_c is None else huber_c
        return lambda x, y: pseudo_huber(data_std * x, data_std * y, c)
    if kind == "lpips":
        return lpips_vgg(shape, data_std)
    raise ValueError(f"distance {kind!r} is not 'l2', 'huber' or 'lpips'")


def elementwise(kind: str, x: Tensor, y: Tensor, huber_c: float) -> Tensor:
    """The mean over all elements of d^2 ('l2') or of sqrt(d^2 + c^2) - c ('huber'), with d = x - y (B, ...)."""
    if kind == "l2":
        return F.mse_loss(x, y)
    return (torch.sqrt((x - y).square() + huber_c**2) - huber_c).mean()


def lpips_vgg(shape: tuple[int, ...], data_std: float = 1.0) -> Distance:
    """LPIPS with VGG features (Zhang et al. 2018, arXiv:1801.03924), images enlarged to 224 pixels if smaller.

    The `lpips` package is optional. Raises UserError where it, its weights or its kind of image is missing.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"distance: lpips compares grey or colour images, and samples are of shape {shape}; use l2")
    try:
        import lpips
    except ImportError:
        raise UserError("distance: lpips is not installed; pip install lpips torchvision, or use l2") from None
    try:
        network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
    except OSError:  # torch.hub takes VGG's weights from its cache, or from the network
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"distance: lpips needs torchvision's vgg16-397923af.pth in {folder}, or use l2") from None

    def image(x: Tensor) -> Tensor:
        x = (data_std * x).expand(-1, 3, -1, -1)
        return F.interpolate(x, size=(224, 224), mode="bilinear") if min(x.shape[2:]) < 224 else x

    return lambda x, y: network.to(x.device)(image(x), image(y)).flatten()
