"""LPIPS 0.1 of AlexNet as a measure of diversity."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.features.weights import ALEXNET, Standard, load_state, read_weights


class AlexLPIPS(nn.Module):
    """LPIPS 0.1 of AlexNet (Zhang et al. 2018, arXiv:1801.03924). Parameters are named as in the two weights files."""

    WIDTHS = (64, 192, 384, 256, 256)
    SMALLEST = 31  # pixels a side

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        for i, width in enumerate(self.WIDTHS):
            self.register_buffer(f"lin{i}", torch.ones(1, width, 1, 1))
        self.eval().requires_grad_(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The five ReLUs of uint8 (B, 1 or 3, H, W), each pixel's channels of unit length."""
        shift = torch.tensor([-0.030, -0.088, -0.188], device=images.device).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], device=images.device).view(3, 1, 1)
        x = (images.float() / 127.5 - 1 - shift) / scale
        activations = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return activations

    def forward(self, images: Tensor, pairs: Tensor) -> Tensor:
        """Distances (P,) of the pairs (2, P) of images."""
        first, second = pairs
        distance = torch.zeros(len(first), device=images.device)
        for i, layer in enumerate(self.layers(images)):
            weighted = (layer[first] - layer[second]).square() * self.get_buffer(f"lin{i}")
            distance += weighted.sum(1).mean((1, 2))
        return distance


LPIPS_HEADS = Standard(
    "the linear layers of LPIPS 0.1 for AlexNet",
    ("alex.pth",),
    "the package torchmetrics",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)


def lpips(key: str, device: torch.device, weights: str | None) -> Measure:
    """Diversity: LPIPS between each image and the next of the batch with the same caption and label."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise UserError(f"measure: {key!r} needs torchmetrics; pip install 'diffdistill[eval]'")
    heads_file = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    heads, _ = read_weights(key, LPIPS_HEADS, str(heads_file))
    tensors, what = read_weights(key, ALEXNET, weights)
    network = AlexLPIPS()
    state = {name: value for name, value in tensors.items() if name.startswith("features.")}
    state |= {f"lin{i}": heads[f"lin{i}.model.1.weight"] for i in range(len(network.WIDTHS))}
    load_state(key, network, state, ALEXNET.what)
    preprocessing = "LPIPS 0.1 to the next of the batch with the same caption and label, 8 bit, no resize"
    fingerprint = network_fingerprint(network, preprocessing)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if min(size := images.shape[2:]) < network.SMALLEST:
            raise UserError(
                f"images: they have {size[0]}x{size[1]} pixels, and {key!r} takes {network.SMALLEST} or more"
            )
        distance = torch.full((len(images),), math.nan)
        pairs = alike(len(images), captions, labels)
        if pairs.numel():
            distance[pairs[0]] = network(images.to(device), pairs.to(device)).cpu()
        return {"distance": distance}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns, conditional=True)


def alike(count: int, captions: Sequence[str] | None, labels: Tensor | None) -> Tensor:
    """Each image and the next one with the same caption and label, (2, P) int64."""
    last: dict[tuple[str | None, int | None], int] = {}
    pairs: list[tuple[int, int]] = []
    for i in range(count):
        condition = (None if captions is None else captions[i], None if labels is None else int(labels[i]))
        if condition in last:
            pairs.append((last[condition], i))
        last[condition] = i
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
