"""The small classifiers of digits as measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.eval.features.digit_classifier import DigitClassifier, load_digit_classifier, load_mnist_classifier
from diffdistill.eval.features.measure import Measure, NetworkMeasure, network_fingerprint
from diffdistill.eval.features.preprocessing import middle


def digits(key: str, device: torch.device, weights: str | None) -> Measure:
    """The shipped classifier of 8x8 digits."""
    _refuse_weights(key, weights)
    return classifier_measure(key, device, load_digit_classifier(), "classifier of 8x8 digits")


def mnist(key: str, device: torch.device, weights: str | None) -> Measure:
    """The shipped classifier of MNIST; images of 32x32 are cut to their middle."""
    _refuse_weights(key, weights)
    name = "classifier of 28x28 MNIST, 32x32 cut to the middle 28x28"
    return classifier_measure(key, device, load_mnist_classifier(), name)


def _refuse_weights(key: str, weights: str | None) -> None:
    if weights is not None:
        raise UserError(f"weights: {key}: {weights!r} cannot be used; this measure has the weights that are shipped")


def classifier_measure(key: str, device: torch.device, network: DigitClassifier, name: str) -> Measure:
    """Features, logits and, where there are labels, 1 for an image that is classified as its label, else 0."""
    fingerprint = network_fingerprint(network, name)
    network.to(device)
    shape = tuple(network.shape)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        if key == "mnist" and images.shape[2:] == (32, 32):
            images = middle(images, network.shape[1])
        if images.shape[1:] != shape:
            raise UserError(
                f"images: they have the shape {tuple(images.shape[1:])}, and the measure {key!r} takes {shape}"
            )
        pixels = images.to(device).float()
        pixels = pixels / 127.5 - 1 if images.dtype == torch.uint8 else pixels.clamp(-1, 1)
        features = network.features(pixels)
        logits = network.head(features * network.scale)
        values = {"features": features, "logits": logits}
        return values if labels is None else {**values, "agrees": logits.argmax(1) == labels.to(device)}

    return NetworkMeasure(key, name, fingerprint, columns, takes_floats=True)
