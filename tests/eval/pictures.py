"""Pictures for tests of feature networks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.errors import UserError


def pictures(n: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random pictures with some noise, uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=g)
    x = F.interpolate(coarse, (height, width), mode="bilinear") * 230 + 25 * torch.rand(
        n, channels, height, width, generator=g
    )
    return x.to(torch.uint8)


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.expand(-1, 3, -1, -1)]


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


CAPTIONS = ["a red circle", "a long caption " * 30, "two blue squares on top of a green one"]


def read(path: Path) -> dict[str, Tensor]:

    return load_file(path)


def errors_of(make: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        make()
    return [str(caught.value)]
