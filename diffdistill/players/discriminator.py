"""The head of a discriminator that reads a denoiser's features."""

from __future__ import annotations

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
