"""Inception-v3 2015-12-05 as a measure: FID's features and the Inception score's logits, by three resizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.eval.features.inception import Resize, folded, load_inception
from diffdistill.eval.features.measure import Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.features.weights import INCEPTION, read_weights


def inception(key: str, device: torch.device, weights: str | None) -> Measure:
    """The measure of that key, which says the resize; `weights` is a weights file."""
    resizes: dict[str, Resize] = {"inception-pytorch-fid": "pytorch-fid", "inception-clean": "clean"}
    resize = resizes.get(key, "tf1")
    preprocessing = {
        "tf1": "TensorFlow 1 bilinear to 299, 8 bit",
        "pytorch-fid": "bilinear to 299 by half-pixel centres as pytorch-fid, 8 bit",
        "clean": "8 bit, bicubic antialiased to 299 without rounding as clean-fid",
    }[resize]
    tensors, what = read_weights(key, INCEPTION, weights)
    try:
        network = load_inception(tensors, resize)
    except ValueError as error:
        raise UserError(f"weights: {key}: {weights!r} is not of {INCEPTION.what}: {error}") from error
    fingerprint = network_fingerprint(network, preprocessing)
    network = folded(network).to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        features = network(images.to(device))
        return {"features": features, "logits": network.logits(features)}

    return NetworkMeasure(key, f"{what}, {preprocessing}", fingerprint, columns)
