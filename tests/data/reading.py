"""What the tests of data read, and how."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data.images import Data, Samples, open_data
from diffdistill.errors import UserError


def every(data: Data) -> Samples:
    return data.get(torch.arange(len(data)))


def labels_of(samples: Samples) -> list[int]:
    assert samples.labels is not None and samples.labels.dtype == torch.int64
    return samples.labels.tolist()


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, colour: object = "red", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def refused(spec: object, **how: int) -> str:
    with pytest.raises(UserError) as caught:
        every(open_data(str(spec), **how))
    assert "\n" not in str(caught.value)
    return str(caught.value)
