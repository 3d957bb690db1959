"""Images measured into checksummed shards, by one process or several, whatever interrupts them.

What is kept of an image is what the measures say of it. Batches are cut by the protocol and not by the number of
processes, so that several processes (`torchrun --nproc_per_node 2 -m diffdistill eval ..`) give the bits of one, as do
any number of interruptions, where each has the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.folder import middle_box
from diffdistill.data.processes import Processes
from diffdistill.data.shards import Kind, open_shards
from diffdistill.errors import UserError
from diffdistill.eval.features.measure import Measure
from diffdistill.eval.metrics.moments import Moments, Statistics
from diffdistill.eval.protocol import Protocol

KIND = Kind("samples", "measured images", "image", "eval")
_FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("lanczos", "bicubic", "bilinear")}


@dataclass(frozen=True)
class Measurements:
    """What the measures said of all images, in order; memory-mapped."""

    shards: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return sum(len(next(iter(shard.values()))) for shard in self.shards)

    def column(self, name: str) -> ShardedColumn:
        """One column; KeyError if no measure has it."""
        if name not in self.shards[0]:
            raise KeyError(name)
        return ShardedColumn(self.shards, name)


@dataclass(frozen=True)
class ShardedColumn:
    """One column of measurements: a `Column` as metrics read it."""

    shards: list[dict[str, Tensor]]
    name: str

    def parts(self) -> Iterator[Tensor]:
        """Blocks of rows."""
        return (shard[self.name] for shard in self.shards)

    def all(self) -> Tensor:
        """All rows."""
        return torch.cat(list(self.parts()))

    def statistics(self) -> Statistics:
        """Mean and covariance, in memory that does not grow with the number of images."""
        moments = Moments(self.shards[0][self.name].shape[1])
        for part in self.parts():
            moments.update(part)
        return moments.statistics()


def measured(
    images: Tensor, measures: Sequence[Measure], captions: Sequence[str] | None, labels: Tensor | None
) -> dict[str, Tensor]:
    """Columns (B, ...) by "measure.column" of images (B, C, H, W), 8-bit or in [-1, 1]."""
    return {f"{m.key}.{name}": column for m in measures for name, column in m(images, captions, labels).items()}


def make_measurements(
    folder: Path, settings: dict[str, Any], notes: dict[str, Any], batch: int,
    produce: Callable[[range], dict[str, Tensor]], processes: Processes, quiet: bool = False,
) -> Measurements:  # fmt: skip
    """Make what is missing of the shards in a folder, together with the other processes, and open all of them.

    UserError if the folder holds measurements made with other settings.
    """
    index = processes.start(KIND, folder, settings, notes)
    with torch.inference_mode():
        processes.make(KIND, folder, index, batch, produce, quiet=quiet)
    return Measurements(open_shards(KIND, folder)[1])


def rounded(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, to nearest."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def prepared(images: Tensor, protocol: Protocol, whose: str, crop: bool = False) -> Tensor:
    """Images as the protocol measures them: of its channels and size, and of 8 bits if it says so.

    Takes uint8, or floats in [-1, 1] where the protocol does not round. UserError where images are of another size and
    may not be resized. crop: of images of another ratio, the middle.
    """
    channels, (height, width) = protocol.channels, protocol.pixels
    if images.ndim == 5 or protocol.frames:
        return _prepared_videos(images, protocol, whose)
    if images.shape[1] != channels:
        kinds = {1: "grey", 3: "RGB"}
        kind = kinds.get(images.shape[1], f"of {images.shape[1]} channels")
        raise UserError(f"eval: the images of {whose} are {kind} and the protocol's {kinds[channels]}")
    if images.dtype == torch.uint8 and not protocol.eight_bit:
        images = images.float() / 127.5 - 1
    if tuple(images.shape[2:]) == (height, width):
        return images
    size = f"{images.shape[3]}x{images.shape[2]}"
    if protocol.resize is None:
        raise UserError(f"eval: the images of {whose} are {size} and the protocol's {width}x{height}, without resizing")
    if not protocol.eight_bit:
        raise UserError(f"eval: {protocol.name} resizes images, which takes eight_bit: true")
    if crop:
        left, top, right, bottom = middle_box(images.shape[3], images.shape[2], (height, width))
        images = images[:, :, top:bottom, left:right]
    elif images.shape[2] * width != images.shape[3] * height:
        kind = "square ones" if height == width else "those of its ratio"
        raise UserError(f"eval: the images of {whose} are {size}; the protocol resizes {kind} to {width}x{height}")
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
    small = [np.asarray(p.resize((width, height), _FILTERS[protocol.resize])) for p in pictures]
    whole = torch.from_numpy(np.stack(small)).reshape(len(small), height, width, channels)
    return whole.permute(0, 3, 1, 2).contiguous()


def _prepared_videos(videos: Tensor, protocol: Protocol, whose: str) -> Tensor:
    """Those of a protocol of videos, (B, C, F, H, W); UserError for others, since none are resized."""
    if videos.ndim != 5 or not protocol.frames:
        made, judged = ("videos", "images") if videos.ndim == 5 else ("images", "videos")
        raise UserError(f"eval: {whose} makes {made}, and the protocol {protocol.name} is of {judged}")
    if tuple(videos.shape[1:]) != protocol.shape:
        there, right = ("x".join(map(str, shape)) for shape in (videos.shape[1:], protocol.shape))
        raise UserError(f"eval: the videos of {whose} are {there} and the protocol's {right} (channels, frames, sides)")
    return videos.float() / 127.5 - 1 if videos.dtype == torch.uint8 and not protocol.eight_bit else videos
