"""Pixels as features: no weights, so that images of any kind can be judged at once.

They are the projections on the first principal components of the real images, each in units of its standard deviation
over these, and the root mean square of what the components leave out, standardized likewise. So each counts alike in
a Fréchet distance: in units of pixels the first few would be all that is seen of it. What is left out tells noise and
blur, which hardly show in the components. Images above 32 pixels a side are averaged down to 32 for the components,
which are smooth, and what these leave out is taken at full size. A video's components are of all its frames together,
so that they see motion. Texture and meaning it sees little of: where
Inception, DINOv2 or CLIP can be had, they judge photographs better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Device, FittedMeasure, Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.protocol import digest

MOST = 32  #: components
A_COMPONENT = 8  #: images, of which a component takes at least so many
SIDE = 32  #: pixels a side of the images whose components are taken
LEAST_VARIANCE = 1e-4  #: of a component, in squared units of [-1, 1]; rounding to 8 bit has 5e-6
LEAST_DEVIATION = 1e-3  #: of what is left out, in units of [-1, 1]


def pixels(key: str, device: torch.device, weights: str | None) -> Measure:
    """The measure before it is fitted to real images."""
    if weights is not None:
        raise UserError(f"weights: {key}: {weights!r} cannot be used; this measure is made of the real images")
    fingerprint = digest([MOST, A_COMPONENT, SIDE, LEAST_VARIANCE, LEAST_DEVIATION, "whitened", "rest"])
    return FittedMeasure(key, "principal components of the real images", fingerprint, fit, _measure)


class Components(nn.Module):
    """Images (B, C, H, W) or videos (B, C, F, H, W), uint8 or in [-1, 1] -> features (B, K + 1) float64.

    The frames of a video are as channels, and C is their number times C here.
    """

    mean: Tensor
    axes: Tensor
    deviations: Tensor
    rest: Tensor
    images: Tensor

    def __init__(self, mean: Tensor, axes: Tensor, deviations: Tensor, rest: Tensor, images: Tensor) -> None:
        """Float64: mean (C, h, w); axes (C h w, K), orthonormal; deviations (K,); mean and deviation of the rest (2,).

        `images` (): how many they were taken of.
        """
        super().__init__()
        values = {"mean": mean, "axes": axes, "deviations": deviations, "rest": rest, "images": images}
        for name, value in values.items():
            self.register_buffer(name, value.contiguous())

    def forward(self, images: Tensor) -> Tensor:
        """Projections and what they leave out, in units of their deviations over the real images."""
        projected, rest = _projected(images, self.mean, self.axes)
        return torch.cat([projected / self.deviations, (rest[:, None] - self.rest[0]) / self.rest[1]], 1)


def _projected(images: Tensor, mean: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Projections (B, K), and the root mean square (B,) of the images without them."""
    x = _units(images.to(mean.device))
    flat = (_small(x) - mean).flatten(1)
    projected = flat @ axes
    seen = (projected @ axes.T).unflatten(1, mean.shape) + mean
    rest = x - F.interpolate(seen, x.shape[2:], mode="nearest")
    return projected, rest.square().mean((1, 2, 3)).sqrt()


def _units(images: Tensor) -> Tensor:
    if images.ndim == 5:
        images = images.flatten(1, 2)
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double().clamp(-1, 1)


def _small(x: Tensor) -> Tensor:
    side = (min(x.shape[2], SIDE), min(x.shape[3], SIDE))
    return x if tuple(x.shape[2:]) == side else F.adaptive_avg_pool2d(x, side)


def fit(images: Tensor, device: Device) -> nn.Module:
    """The components of real images (N, C, H, W); UserError where all are alike.

    As many as 32, each of at least 8 images. The sign of each is that of its largest entry, so that they repeat.
    """
    small = torch.cat([_small(_units(part)) for part in images.split(256)])
    mean = small.mean(0)
    x = (small - mean).flatten(1)
    if len(x) < x.shape[1]:  # the same axes, of the smaller matrix of products
        squares, left = torch.linalg.eigh(x @ x.T)
        variances, axes = squares / (len(x) - 1), x.T @ left / squares.clamp_min(1e-12).sqrt()
    else:
        variances, axes = torch.linalg.eigh(x.T @ x / (len(x) - 1))
    most = min(MOST, max(1, len(x) // A_COMPONENT))
    variances, axes = variances.flip(0)[:most], axes.flip(1)[:, :most]
    kept = variances > LEAST_VARIANCE
    if not bool(kept.any()):
        raise UserError("reference: its images are all alike, and have no principal components; give others")
    variances, axes = variances[kept], axes[:, kept]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    rest = torch.cat([_projected(part, mean, axes)[1] for part in images.split(256)])
    about_rest = torch.stack([rest.mean(), rest.std().clamp_min(LEAST_DEVIATION)])
    return Components(mean, axes, variances.sqrt(), about_rest, torch.tensor(len(images))).to(device)


def _measure(state: dict[str, Tensor], device: Device) -> Measure:
    """The measure of components that were fitted."""
    network = Components(**state).to(device)
    height, width = network.mean.shape[1:]
    name = (
        f"{len(network.deviations)} principal components of {int(network.images)} real images in {width}x{height} "
        "pixels, each in units of its deviation, and what they leave out"
    )

    def columns(images: Tensor, captions: object, labels: object) -> dict[str, Tensor]:
        return {"features": network(images)}

    kinds = {"takes_floats": True, "takes_videos": True}
    return NetworkMeasure("pixels", name, network_fingerprint(network, name), columns, fitted=True, **kinds)
