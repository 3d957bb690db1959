"""Images to train on, with their labels or captions: arrays, folders, Hugging Face datasets.

`open_data` opens what the user names and `Data.get` reads a batch of it. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.data.arrays import ARRAY_SUFFIXES, load_arrays
from diffdistill.data.examples import Example
from diffdistill.data.files import IMAGE_SUFFIXES
from diffdistill.data.folder import (
    Pictures,
    channels_first,
    class_numbers,
    decode,
    decode_conditions,
    find_shape,
    holds_images,
    middle_box,
    open_folder,
    sizes_of,
)
from diffdistill.data.hub import is_saved, open_hub, open_stream
from diffdistill.data.shapes import draw_edits, draw_many
from diffdistill.data.texts import printable
from diffdistill.data.webdataset import named_shards, open_shards, shards_of
from diffdistill.errors import UserError
from diffdistill.options import Sides

ACCEPTED = (
    "'digits', 'shapes' or 'shapes:COUNT' (drawn, with captions), 'edits' (drawn, from one to another), "
    "'reduced:TIMES:DATA' (other data, each image beside itself reduced so many times), "
    "a folder of images (png, jpg, jpeg, webp, bmp; classes in sub-folders, or metadata.jsonl, .csv, .parquet), "
    "WebDataset shards (.tar, a folder or pattern of them), a .npz, .npy, .safetensors or .parquet file, "
    "a save_to_disk folder, or a Hugging Face dataset (user/name)"
)
_DIGITS = Path(__file__).parent / "assets" / "digits.safetensors"


@dataclass(frozen=True)
class Samples(Example):
    """B images with what the data say of them."""

    x0: Tensor
    captions: list[str] | None = None  #: B texts
    #: float32 (B, C, H, W) in [-1, 1], the images that these are made from; of k each (B, k, C, H, W).
    conditions: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1]."""
        return self.x0

    @property
    def labels(self) -> Tensor | None:
        """int64 (B,) in 0..num_classes-1."""
        return self.cond.get("class_labels")


@dataclass(frozen=True, eq=False)
class Data:
    """Images or videos of one shape, read by index. The fingerprint tells the content of two sources apart and does
    not depend on where they lie, nor on the resolution and channels they are read with."""

    name: str
    shape: tuple[int, ...]  #: (C, H, W), of videos (C, F, H, W)
    num_classes: int | None  #: None where there are no labels
    fingerprint: str  #: 16 hex digits
    size: int
    read: Callable[[list[int]], Samples]
    #: Height and width of each image as it is stored, where they can be known.
    stored: Callable[[], list[Sides]] | None = None

    def __len__(self) -> int:
        return self.size

    def get(self, indices: Tensor) -> Samples:
        """The samples at int64 indices (B,), in that order.

        Raises UserError for an image that cannot be read, IndexError for an index outside 0..len-1.
        """
        rows: list[int] = indices.tolist()
        if rows and not 0 <= min(rows) <= max(rows) < self.size:
            raise IndexError(f"indices {min(rows)}..{max(rows)} lie outside 0..{self.size - 1}")
        return self.read(rows)


def _samples(images: Tensor, labels: Tensor | None, captions: list[str] | None) -> Samples:
    return Samples(images, {} if labels is None else {"class_labels": labels}, captions=captions)


def open_pairs(spec: str, *, resolution: int | Sides | None = None, channels: int | None = None) -> Data:
    """`open_data` of images that each come with a condition image; UserError for a kind of data that has none.

    They are folders of images, WebDataset shards, the drawn `edits`, and `reduced:TIMES:DATA`.
    """
    data = open_data(spec, resolution=resolution, channels=channels, conditioned=True)
    if data.get(torch.arange(1)).conditions is None:
        raise UserError(
            f"data: {spec!r} has no condition images, which this teacher reads; give a folder of images with them, "
            "WebDataset shards, 'edits', or 'reduced:4:DATA' for super-resolution"
        )
    return data


def open_data(
    spec: str,
    *,
    resolution: int | Sides | None = None,
    channels: int | None = None,
    resample: str | None = None,
    conditioned: bool = False,
) -> Data:
    """Open what `spec` names (see ACCEPTED); 'SPEC#split' picks a split, by default 'train', of digits all of them.

    resolution: a side, or height and width, in pixels: the middle of each image, as large as can be of that ratio, is
    resized to it, bicubic and antialiased; None keeps images as they are. resample: encoded images are resized by this
    filter of Pillow's, and without the short cuts that are otherwise taken. channels: 1 (grey) or 3 (RGB); None keeps
    what the data has, RGB if any image is. conditioned: each sample has a condition image besides. Transparency is put
    on white, EXIF orientation is applied. Arrays are held
    in memory, the rest is decoded batch by batch. Raises UserError if `spec` is of no known kind, or is missing, empty
    or unusable.
    """
    size = None if resolution is None else _pair(resolution)
    if size is not None and min(size) < 1:
        raise UserError(f"resolution: {resolution} is not an image side in pixels; give 1 or more")
    if channels not in (None, 1, 3):
        raise UserError(f"channels: {channels} is not a kind of image; give 1 (grey) or 3 (RGB)")
    if spec in ("digits", "digits#train", "digits#test"):
        digits = _open_arrays(_DIGITS, None, spec, size, channels, full_scale=16)
        return digits if spec == "digits" else _digits_part(digits, test=spec.endswith("test"))
    if drawn := re.fullmatch(r"shapes(?::([1-9]\d{0,6}))?", spec):
        return _open_shapes(spec, int(drawn[1] or 4000), size, channels)
    if reduced := re.fullmatch(r"reduced:([1-9]\d{0,3}):(.+)", spec):
        return _reduced(open_data(reduced[2], resolution=size, channels=channels, resample=resample), int(reduced[1]))
    if drawn := re.fullmatch(r"edits(?::([1-9]\d{0,6}))?", spec):
        return open_edits(spec, int(drawn[1] or 4000), size, channels)
    base, split = spec, None
    if "#" in spec and not Path(spec).expanduser().exists():  # a path may itself hold a '#'
        base, _, split = spec.rpartition("#")
    path = Path(base).expanduser()
    name = printable(path.resolve().name) + (f"#{split}" if split else "")
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        return _open_arrays(path, split, name, size, channels)
    if path.suffix.lower() == ".tar" and path.is_file():
        shards = [path]
    else:
        shards = [] if path.exists() else named_shards(str(path))
    if shards:
        return _open_pictures(open_shards(shards, base, conditioned), name, size, channels, resample)
    is_folder = bool(base) and path.is_dir() and not is_saved(path)  # an empty path would be the current folder
    if is_folder and not holds_images(path) and (shards := shards_of(path)):
        return _open_pictures(open_shards(shards, base, conditioned), name, size, channels, resample)
    if is_folder and (holds_images(path / (split or "")) or not any(path.glob("**/*.parquet"))):
        return _open_pictures(open_folder(path, split, conditioned), name, size, channels, resample)
    if is_folder or is_saved(path) or (path.is_file() and path.suffix.lower() == ".parquet"):
        return _open_pictures(open_hub(str(path), split), name, size, channels, resample)
    if path.exists() or not base:
        raise UserError(f"data: {spec!r} is of no known kind; give {ACCEPTED}")
    # Only with an owner: `datasets` 3 takes the name pandas for a reader, and unpickles files lying about.
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)
    if not is_id or path.suffix in IMAGE_SUFFIXES | ARRAY_SUFFIXES | {".parquet"}:
        raise UserError(f"data: {base!r} does not exist; give {ACCEPTED}")
    pictures = open_hub(base, split, doubt=f"does not exist here (give {ACCEPTED}) and ")
    return _open_pictures(pictures, spec, size, channels, resample)


def _pair(resolution: int | Sides) -> Sides:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def stream_data(spec: str, *, count: int | None, resolution: int | Sides, channels: int) -> Data:
    """The first `count` images (None: all) of a Hugging Face dataset or parquet files, read in order and never kept.

    A batch that follows the last one costs nothing else; any other opens the data anew. Where they end before `count`,
    `Data.get` raises `data.hub.Ended`. Raises UserError like `open_data`, and for a length that nobody tells.
    """
    stream = open_stream(spec, "data")
    total, shape = stream.length(count), (channels, *_pair(resolution))

    def read(indices: list[int]) -> Samples:
        rows = stream.rows(indices)
        pictures = Pictures(total, lambda _: stream.images(rows), stream.title, None, None, None, stream.fingerprint)
        batch = decode(pictures, indices, shape, resize=True)
        return _samples(batch, stream.labels(rows, indices), stream.texts(rows, indices))

    return Data(spec, shape, stream.num_classes, stream.fingerprint, total, read)


def _digits_part(digits: Data, test: bool) -> Data:
    """The last ten of every fifty digits (357 in all) to be tested on, or the 1440 others to be trained on.

    Tens, since the source has them in runs of 0 to 9: every fifth would be of two classes.
    """
    return part(digits, [i for i in range(len(digits)) if (i // 10 % 5 == 4) == test])


def part(data: Data, kept: list[int]) -> Data:
    """Those of the samples, in that order."""
    digest = hashlib.blake2b(f"{data.fingerprint} {kept}".encode(), digest_size=8).hexdigest()
    stored = data.stored
    return replace(
        data,
        fingerprint=digest,
        size=len(kept),
        read=lambda indices: data.read([kept[i] for i in indices]),
        stored=None if stored is None else lambda: [sizes[i] for sizes in [stored()] for i in kept],
    )


def _open_shapes(name: str, count: int, size: Sides | None, channels: int | None) -> Data:
    """The first pictures of seed 0 (see shapes.py)."""
    images, captions, _ = draw_many(0, count)
    digest = hashlib.blake2b(images.mul(127).round().to(torch.int8).numpy().data, digest_size=8).hexdigest()
    (height, width), channels = size or images.shape[2:], channels or 3

    def read(indices: list[int]) -> Samples:
        batch = _resized(_recolour(images[indices], channels), height, width)
        return _samples(batch, None, [captions[i] for i in indices])

    return Data(name, (channels, height, width), None, digest, count, read, lambda: [_pair(images.shape[2])] * count)


def open_edits(name: str, count: int, size: Sides | None, channels: int | None, seed: int = 0) -> Data:
    """The first drawn edits of the seed (see shapes.py): images, what they are made from, and what is to be changed."""
    edits = draw_edits(seed, count)
    digest = hashlib.blake2b(edits.images.mul(127).round().to(torch.int8).numpy().data, digest_size=8).hexdigest()
    (height, width), channels = size or edits.images.shape[2:], channels or 3

    def read(indices: list[int]) -> Samples:
        image, condition = (
            _resized(_recolour(all_of[indices], channels), height, width) for all_of in (edits.images, edits.conditions)
        )
        return Samples(image, captions=[edits.captions[i] for i in indices], conditions=condition)

    sizes = [_pair(edits.images.shape[2])] * count
    return Data(name, (channels, height, width), None, f"{digest}", count, read, lambda: sizes)


def reduced(images: Tensor, times: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] made so many times smaller, of 8 bits, and brought back to their size.

    Both ways bicubic, the first antialiased.
    """
    height, width = images.shape[2:]
    small = F.interpolate(images, (height // times, width // times), mode="bicubic", antialias=True).clamp(-1, 1)
    small = (127.5 * small + 127.5).round() / 127.5 - 1
    return F.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)


def _reduced(data: Data, times: int) -> Data:
    """Each image beside itself `reduced`, its condition image, and without a caption, which would say what it shows."""
    if times < 2 or any(side % times for side in data.shape[-2:]):
        sides = f"images of {data.shape[-1]}x{data.shape[-2]} pixels"
        raise UserError(f"data: {times} is no number of times that {sides} can be reduced; give one that divides both")

    def read(indices: list[int]) -> Samples:
        samples = data.read(indices)
        return replace(samples, conditions=reduced(samples.images, times), captions=[""] * len(indices))

    digest = hashlib.blake2b(f"{data.fingerprint} reduced {times}".encode(), digest_size=8).hexdigest()
    return replace(data, name=f"reduced:{times}:{data.name}", fingerprint=digest, read=read)


def _open_pictures(
    pictures: Pictures, name: str, size: Sides | None, channels: int | None, resample: str | None
) -> Data:
    total, _, _, classes, num_classes, texts, fingerprint, conditions, *_ = pictures
    shape = find_shape(pictures, size, channels)

    def read(indices: list[int]) -> Samples:
        images = decode(pictures, indices, shape, resize=size is not None, resample=resample)
        labels = None if classes is None else classes[indices]
        samples = _samples(images, labels, None if texts is None else texts(indices))
        return (
            samples if conditions is None else replace(samples, conditions=decode_conditions(pictures, indices, shape))
        )

    return Data(name, shape, num_classes, fingerprint, total, read, lambda: sizes_of(pictures))


def _open_arrays(
    path: Path, split: str | None, name: str, size: Sides | None, channels: int | None, full_scale: int = 255
) -> Data:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) of 1, 3 or 4 (RGBA) channels, held as they are stored.

    Whole numbers are 0..full_scale. Floats are [0, 1] if none is negative, else [-1, 1]; others are refused.
    """
    images, labels = load_arrays(path, split)
    images = channels_first(images, path)
    if images.is_complex():
        raise UserError(f"data: images of {path} are complex numbers; give real ones")
    whole = not images.is_floating_point() and images.dtype != torch.bool
    if images.dtype != torch.uint8:
        images = images.long() if whole else images.float()
    low, high = float(images.min()), float(images.max())
    least, most = (0, full_scale) if whole else (-1.001, 1.001)  # what rounding put outside is clamped
    if not (least <= low and high <= most):  # so written, NaN is refused
        ranges = f"whole numbers in 0..{full_scale}, or floats in [0, 1] or [-1, 1]"
        raise UserError(f"data: images of {path} lie in [{low:g}, {high:g}]; give {ranges}")
    images = images.to(torch.uint8) if whole else images
    divisor, offset = (full_scale / 2, 1.0) if whole else (1.0, 0.0) if low < 0 else (0.5, 1.0)
    classes, num_classes = class_numbers(labels, len(images), str(path))
    digest = hashlib.blake2b(f"{tuple(images.shape)} {images.dtype} {divisor}".encode(), digest_size=8)
    for tensor in (images, classes):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().data)
    channels = channels or (1 if images.shape[1] == 1 else 3)
    height, width = size or images.shape[2:]

    def read(indices: list[int]) -> Samples:
        batch = _resized(_recolour(images[indices].float() / divisor - offset, channels), height, width)
        return _samples(batch, None if classes is None else classes[indices], None)

    stored = [(images.shape[2], images.shape[3])] * len(images)
    return Data(name, (channels, height, width), num_classes, digest.hexdigest(), len(images), read, lambda: stored)


def _resized(batch: Tensor, height: int, width: int) -> Tensor:
    """The middles of images (B, C, H, W) in that size, or the images themselves if they have it; in [-1, 1]."""
    if batch.shape[2:] != (height, width):
        left, top, right, bottom = middle_box(batch.shape[3], batch.shape[2], (height, width))
        middle = batch[:, :, top:bottom, left:right]
        batch = F.interpolate(middle, (height, width), mode="bicubic", antialias=True)
    return batch.clamp(-1, 1)


def _recolour(images: Tensor, channels: int) -> Tensor:
    """Grey, RGB or RGBA images (B, 1|3|4, H, W) in [-1, 1], put on white, as (B, channels, H, W)."""
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        images = images[:, :3] * alpha + (1 - alpha)
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # Pillow's
        return (images * weights).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)
