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

    'l1' is the mean of absolute values, 'l2' the mean square. 'huber' is `pseudo_huber` with c = `huber_c`, by default
    Song & Dhariwal's 0.00054 sqrt(dimensions) (2023, arXiv:2310.14189, section 3.3). 'lpips' is `lpips_vgg`.
    """
    if kind == "l1":
        return lambda x, y: per_sample_mean((data_std * (x - y)).abs())
    if kind == "l2":
        return lambda x, y: per_sample_mean((data_std * (x - y)).square())
    if kind == "huber":
        c = 0.00054 * math.sqrt(math.prod(shape)) if huber_c is None else huber_c
        return lambda x, y: pseudo_huber(data_std * x, data_std * y, c)
    if kind == "lpips":
        return lpips_vgg(shape, data_std)
    raise ValueError(f"distance {kind!r} is not 'l1', 'l2', 'huber' or 'lpips'")


def elementwise(kind: str, x: Tensor, y: Tensor, huber_c: float) -> Tensor:
    """The mean over all elements of d^2 ('l2') or of sqrt(d^2 + c^2) - c ('huber'), with d = x - y (B, ...)."""
    if kind == "l2":
        return F.mse_loss(x, y)
    return (torch.sqrt((x - y).square() + huber_c**2) - huber_c).mean()


def dissimilarity(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """(B,) 1 - SSIM of feature maps x (B, C, ...) with given ones y, the mean over channels and places; 0: alike.

    Wang et al. 2004 (IEEE TIP 13:4), eq. 13, over square windows of equal weights, on maps that are smaller than one or
    not (B, C, H, W) over the whole, of vectors (B, C) over the vector. The constants are (0.01 L)^2 and (0.03 L)^2 with
    L^2 the mean square of each of y's maps, since features have no range of their own.
    """
    x, y = (z.float() if z.dtype.itemsize < 4 else z for z in (x, y))
    x, y = (z[:, None] if z.dim() == 2 else z for z in (x, y))

    def mean(z: Tensor) -> Tensor:
        whole = z.dim() != 4
        return z.flatten(2).mean(2) if whole else F.avg_pool2d(z, [min(window, side) for side in z.shape[2:]], 1)

    size = y.square().flatten(2).mean(2) + 1e-12
    m_x, m_y = mean(x), mean(y)
    size = size.view(*size.shape, *[1] * (m_x.dim() - 2))
    v_x, v_y, both = mean(x * x) - m_x * m_x, mean(y * y) - m_y * m_y, mean(x * y) - m_x * m_y
    c1, c2 = 1e-4 * size, 9e-4 * size
    alike = (2 * m_x * m_y + c1) * (2 * both + c2) / ((m_x * m_x + m_y * m_y + c1) * (v_x + v_y + c2))
    return 1 - alike.flatten(1).mean(1)


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
