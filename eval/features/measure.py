"""Measures: what a network says of each image, in columns that metrics then read.

Images are uint8 (B, 1 or 3, H, W) on the CPU, or float32 in [-1, 1] for a measure that takes such; videos have their
frames behind the channels. Each measure's name states the network, its weights and every step of the preprocessing,
since another resize or rounding gives other numbers; its fingerprint changes with any of them. All run in float32 (no
TF32), in eval mode, without gradients.

`register` makes a measure of one's own known to protocols:

    from diffdistill.eval.features.measure import module_measure, register

    register("mine", lambda key, device, weights: module_measure(MyNetwork(), key, "my network, 8 bit", device))
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from diffdistill.data.shards import bytes_of
from diffdistill.errors import UserError
from diffdistill.options import nearest

Device = torch.device | str
Columns = Callable[[Tensor, Sequence[str] | None, Tensor | None], dict[str, Tensor]]


class Measure(Interface):
    """What the engine stores of each image."""

    key: str
    name: str  #: for people: network, weights, resize, rounding
    fingerprint: str  #: 16 hex digits of weights and preprocessing
    conditional: bool  #: it says nothing of real images without a caption, or of images in any order

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Columns (B, ...) float32 on the CPU: "features" (B, D), "logits" (B, K), "score" (B,), "agrees" (B,)."""


@dataclass
class FittedMeasure:
    """A measure that is made of the real images, when these are open.

    `fit(images, device)` takes a sample of them as they are measured, uint8 (N, C, H, W) or float32 in [-1, 1]. What it
    gives is kept beside the measured reference, for as long as these images stay the same.
    """

    key: str
    name: str
    fingerprint: str  #: of how it is fitted
    fit: Callable[[Tensor, Device], nn.Module]  #: the network that gives the features
    load: Callable[[dict[str, Tensor], Device], Measure]  #: the measure of that network's state_dict
    conditional: bool = False

    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """UserError: there were no real images."""
        raise UserError(f"reference: {self.key!r} is made of the real images; give them by --reference")


@dataclass
class NetworkMeasure:
    """A measure that is a network behind `columns`. Raises UserError for images that are neither grey nor RGB."""

    key: str
    name: str
    fingerprint: str
    columns: Columns
    conditional: bool = False
    takes_floats: bool = False
    takes_videos: bool = False
    fitted: bool = False  #: to the real images

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Float32 columns, (B,) or (B, D), on the CPU, of images (B, C, H, W); ValueError or UserError for others.

        Videos (B, C, F, H, W) are for a measure that takes them.
        """
        if images.ndim == 5 and not self.takes_videos:
            raise UserError(f"protocol: {self.key!r} measures images, and these are videos; name another protocol")
        if images.dtype == torch.float32 and not self.takes_floats:
            raise UserError(f"eight_bit: {self.key!r} takes uint8 images; set it to true in the protocol")
        if images.dtype not in (torch.uint8, torch.float32) or images.ndim not in (4, 5) or len(images) == 0:
            raise ValueError(f"want uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if images.shape[1] not in (1, 3):
            raise UserError(f"images: they have {images.shape[1]} channels, and {self.key!r} takes 1 (grey) or 3 (RGB)")
        for what, conditions in (("captions", captions), ("labels", labels)):
            if conditions is not None and len(conditions) != len(images):
                raise ValueError(f"{len(conditions)} {what} for {len(images)} images")
        with _float32():
            columns = self.columns(images, captions, labels)
        return {name: column.float().cpu() for name, column in columns.items()}


@contextmanager
def _float32() -> Iterator[None]:
    """No TF32 and no algorithm chosen by the clock: a GPU then repeats itself, and agrees with the CPU to 1e-5."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def module_measure(module: nn.Module, key: str, name: str, device: Device = "cpu") -> Measure:
    """Any network, uint8 (B, C, H, W) on `device` -> features (B, D), as a measure; it is moved there, in eval mode.

    `name` states the network and its preprocessing; the fingerprint is that of the state_dict and of `name`.
    """
    module = module.eval().to(device)

    def columns(images: Tensor, captions: Sequence[str] | None, labels: Tensor | None) -> dict[str, Tensor]:
        features = module(images.to(device))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{name} gives {tuple(features.shape)} for {len(images)} images; want features (B, D)")
        return {"features": features}

    return NetworkMeasure(key, name, network_fingerprint(module, name), columns)


def network_fingerprint(module: nn.Module, preprocessing: str, config: Any = None) -> str:
    """Of weights, preprocessing and, for a network of transformers, what its config says besides."""
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_A_NETWORK}
    text = json.dumps(settings, sort_keys=True, default=str) if settings else ""
    digest = hashlib.blake2b((preprocessing + text).encode(), digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


_NOT_OF_A_NETWORK = ("_name_or_path", "transformers_version", "dtype", "architectures")


Maker = Callable[[str, torch.device, str | None], Measure]
"""(key, device, weights: a file, folder or hub id, or None for the standard ones) -> the measure."""

_SHIPPED = {
    "inception": "inception_measure:inception",
    "inception-pytorch-fid": "inception_measure:inception",
    "inception-clean": "inception_measure:inception",
    "dinov2": "transformers_networks:dinov2",
    "videomae": "transformers_networks:videomae",
    "clip": "transformers_networks:clip",
    "clip-score": "transformers_networks:clip_score",
    "lite0": "lite0:lite0",
    "digits": "classifiers:digits",
    "mnist": "classifiers:mnist",
    "lpips": "lpips:lpips",
    "attributes": "attributes:attributes",
    "motion": "attributes:motion",
    "pixels": "pixels:pixels",
}
"""Key -> module beside this one and function in it, imported when it is used."""

_REGISTERED: dict[str, Maker] = {}


def register(key: str, maker: Maker) -> None:
    """Make a measure known to protocols; UserError if the key is taken."""
    if key in measure_keys():
        raise UserError(f"measure: {key!r} exists already; register it under another key")
    _REGISTERED[key] = maker


def measure_keys() -> list[str]:
    """The keys of all measures."""
    return sorted({*_SHIPPED, *_REGISTERED})


def measure(key: str, device: Device = "cpu", weights: dict[str, str] | None = None) -> Measure:
    """The measure of that key. `weights`: key -> file, folder or hub id to take instead of the standard one.

    Raises UserError if the key is not known, or weights are missing (it says what to fetch) or of another network.
    """
    for name in (key, *(weights or ())):
        if name not in measure_keys():
            raise UserError(f"measure: {name!r} is not known; {nearest(name, measure_keys())}")
    if key in _REGISTERED:
        maker = _REGISTERED[key]
    else:
        module, _, function = _SHIPPED[key].partition(":")
        maker = getattr(importlib.import_module(f"diffdistill.eval.features.{module}"), function)
    return maker(key, torch.device(device), (weights or {}).get(key))
