"""Discriminators: the head of one that reads a denoiser's features, and one that reads images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class DiscriminatorHead(nn.Module):
    """Logits (B,) from feature maps (B, C, H, W): strided convolutions to 1x1, then a 1x1 convolution.

    `size` is the shorter side of the maps. Along a longer one there are several logits, whose mean counts; maps that
    are shorter, of a bucket of another ratio, are filled up with zeros.

    The classification head of DMD2 (Yin et al. 2024, arXiv:2405.14867, section 4.3) reads the bottleneck
    of the fake score this way: 8x8 -> 4x4 -> 1x1, with group normalisation and SiLU between.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        # At 1x1 a group of one channel would be normalised to a constant.
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= min(8, channels))

        def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, kernel, stride, padding)
            return [conv, nn.GroupNorm(groups, channels), nn.SiLU()]

        layers: list[nn.Module] = []
        while size > 4:
            layers += block(4, 2, 1)
            size //= 2
        layers += block(size, size, 0)
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """One logit an image, (B,), the mean over positions, of a layer's features (B, C, H, W)."""
        missing = [max(0, self.size - side) for side in features.shape[2:]]
        if any(missing):
            features = functional.pad(features, (0, missing[1], 0, missing[0]))
        return self.layers(features).flatten(1).mean(1)


class ImageDiscriminator(nn.Module):
    """Logits (B,) of images (B, C, H, W), of videos (B, C, F, H, W) frame by frame, or of vectors (B, D).

    Convolutions halve the sides, and each place of the last map has a logit, which is that of a patch (Isola et al.
    2017, arXiv:1611.07004); their mean counts. Vectors are read by two hidden layers.
    """

    WIDTH, MOST = 64, 4  # of the first layer, doubled by each; how often sides are halved at most

    def __init__(self, shape: Sequence[int], latent: bool = False):
        """`shape`: of a sample; of a latent one the images have three channels, and sides that are larger."""
        super().__init__()
        width, images = self.WIDTH, len(shape) > 1
        if not images:
            layers = [nn.Linear(shape[0], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
            self.layers = nn.Sequential(*layers)
            return
        channels, halvings = 3 if latent else shape[0], int(math.log2(min(shape[-2:]))) - (not latent)
        parts: list[nn.Module] = []
        for k in range(min(max(halvings, 1), self.MOST)):
            parts += [nn.Conv2d(channels, width, 4, 2, 1), nn.GroupNorm(8, width) if k else nn.Identity(), nn.SiLU()]
            channels, width = width, 2 * width
        self.layers = nn.Sequential(
            *parts, nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B,)."""
        frames = images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images
        return self.layers(frames).reshape(len(images), -1).mean(1)
