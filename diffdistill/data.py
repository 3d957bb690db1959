"""Images to train on, with their labels or captions: arrays, folders, Hugging Face datasets.

`open_data` opens what the user names and `Data.get` reads a batch of it. `batch_indices` says which samples
a step sees: the order is a function of (seed, step), so a resumed run needs no iterator state. Nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor

from .errors import UserError
from .rng import generator

ACCEPTED = (
    "'digits', a folder of images (png, jpg, jpeg, webp, bmp; classes in sub-folders, or metadata.jsonl), "
    "a .npz, .safetensors or .parquet file, a save_to_disk folder, or a Hugging Face dataset (user/name)"
)
_DIGITS = Path(__file__).parent / "assets" / "digits.safetensors"
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves
_SPLITS = {"train", "test", "val", "valid", "validation"}
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}
_ORIENTATION = 0x0112  # the EXIF tag; with values 5 to 8 width and height change places

# An image: where its file lies (a path, or zip://NAME::ARCHIVE), the bytes of one, or pixel values 0..255.
Source = str | bytes | list[Any] | None


class _Form(NamedTuple):
    resolution: int | None
    channels: int | None


class Samples(NamedTuple):
    images: Tensor  #: float32 (B, C, H, W) in [-1, 1]
    labels: Tensor | None  #: int64 (B,) in 0..num_classes-1
    captions: list[str] | None  #: B texts, "" where the data has an empty one


@dataclass(frozen=True, eq=False)
class Data:
    """Images of one shape, read by index. The fingerprint tells the content of two sources apart and does
    not depend on where they lie, nor on the resolution and channels they are read with."""

    name: str
    shape: tuple[int, int, int]  #: (C, H, W)
    num_classes: int | None  #: None where there are no labels
    fingerprint: str  #: 16 hex digits
    size: int
    read: Callable[[list[int]], Samples]

    def __len__(self) -> int:
        return self.size

    def get(self, indices: Tensor) -> Samples:
        """The samples at int64 indices (B,), in that order.

        Raises UserError for an image that cannot be read, IndexError for an index outside 0..len-1.
        """
        wanted: list[int] = indices.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.size:
            raise IndexError(f"indices {min(wanted)}..{max(wanted)} lie outside 0..{self.size - 1}")
        return self.read(wanted)


def open_data(spec: str, *, resolution: int | None = None, channels: int | None = None) -> Data:
    """Open what `spec` names (see ACCEPTED); 'SPEC#split' picks a split, by default 'train'.

    resolution: the middle square of each image is resized to this side (bicubic, antialiased); None keeps
    images as they are. channels: 1 (grey) or 3 (RGB); None keeps what the data has, RGB if any image is.
    Transparency is put on white, EXIF orientation is applied. Arrays are held in memory, the rest is decoded
    batch by batch. Raises UserError if `spec` is of no known kind, or is missing, empty or unusable.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"resolution: {resolution} is not an image side in pixels; give 1 or more")
    if channels not in (None, 1, 3):
        raise UserError(f"channels: {channels} is not a kind of image; give 1 (grey) or 3 (RGB)")
    form = _Form(resolution, channels)
    if spec == "digits":
        return _open_arrays(_DIGITS, None, spec, form, full_scale=16)
    base, split = spec, None
    if "#" in spec and not Path(spec).expanduser().exists():  # a path may itself hold a '#'
        base, _, split = spec.rpartition("#")
    path = Path(base).expanduser()
    name = path.resolve().name + (f"#{split}" if split else "")
    saved = any((path / marker).is_file() for marker in _SAVED)
    if base and path.is_dir() and not saved:  # an empty path would be the current folder
        return _open_folder(path, split, name, form)
    if path.is_file() and path.suffix in (".npz", ".safetensors"):
        return _open_arrays(path, split, name, form)
    if saved or (path.is_file() and path.suffix == ".parquet"):
        return _open_hub(str(path), split, name, form)
    if path.exists() or not base:
        raise UserError(f"data: {spec!r} is of no known kind; give {ACCEPTED}")
    # Only with an owner: `datasets` 3 takes the name pandas for a reader, and unpickles files lying about.
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)
    if not is_id or path.suffix in _IMAGE_SUFFIXES | {".npz", ".safetensors", ".parquet"}:
        raise UserError(f"data: {base!r} does not exist; give {ACCEPTED}")
    return _open_hub(base, split, spec, form)


def batch_indices(
    n: int, batch_size: int, step: int, *, seed: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Which of n samples this rank sees at this step: int64 (batch_size,), a function of the arguments alone.

    Steps and ranks take turns along one endless row of shuffled epochs, so every epoch visits each sample
    once, a batch may straddle two epochs, and R ranks see what one rank sees with R times the batch.
    Raises UserError if batch_size is below 1 or all ranks together need more than n samples.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not a number of samples; use 1 or more")
    if batch_size * world_size > n:
        ranks = f" on each of {world_size} processes" if world_size > 1 else ""
        most = f"use at most {n // world_size}" if n >= world_size else "use fewer processes"
        raise UserError(f"batch_size {batch_size}{ranks} is larger than the data ({n} samples); {most}")
    epoch, first = divmod((step * world_size + rank) * batch_size, n)
    row = _epoch_order(n, seed, epoch)[first : first + batch_size]
    if len(row) == batch_size:
        return row.clone()  # a view would let the caller write into the cached epoch
    return torch.cat([row, _epoch_order(n, seed, epoch + 1)[: batch_size - len(row)]])


@lru_cache(maxsize=2)  # a batch straddles at most two epochs
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator("cpu", seed, epoch, "data order"))


def _open_arrays(path: Path, split: str | None, name: str, form: _Form, full_scale: int = 255) -> Data:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) of 1, 3 or 4 (RGBA) channels, held as they are stored.

    Whole numbers are 0..full_scale. Floats are [0, 1] if none is negative, else [-1, 1]; others are refused.
    """
    images, labels = _load_arrays(path, split)
    images = _channels_first(images, path)
    whole = not images.is_floating_point() and images.dtype != torch.bool
    if images.dtype != torch.uint8:
        images = images.long() if whole else images.float()
    low, high = float(images.min()), float(images.max())
    least, most = (0, full_scale) if whole else (-1.001, 1.001)  # what rounding put outside is clamped
    if not (least <= low and high <= most):  # so written, NaN is refused
        want = f"whole numbers in 0..{full_scale}, or floats in [0, 1] or [-1, 1]"
        raise UserError(f"data: images of {path} lie in [{low:g}, {high:g}]; give {want}")
    images = images.to(torch.uint8) if whole else images
    divisor, offset = (full_scale / 2, 1.0) if whole else (1.0, 0.0) if low < 0 else (0.5, 1.0)
    classes = _class_numbers(labels, len(images), str(path))
    digest = hashlib.blake2b(f"{tuple(images.shape)} {images.dtype} {divisor}".encode(), digest_size=8)
    for tensor in (images, classes):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().data)
    channels = form.channels or (1 if images.shape[1] == 1 else 3)
    height, width = (form.resolution, form.resolution) if form.resolution else images.shape[2:]

    def read(indices: list[int]) -> Samples:
        batch = _recolour(images[indices].float() / divisor - offset, channels)
        if batch.shape[2:] != (height, width):
            side = min(batch.shape[2:])
            top, left = (batch.shape[2] - side) // 2, (batch.shape[3] - side) // 2
            middle = batch[:, :, top : top + side, left : left + side]
            batch = F.interpolate(middle, (height, width), mode="bicubic", antialias=True)
        return Samples(batch.clamp(-1, 1), None if classes is None else classes[indices], None)

    return Data(name, (channels, height, width), _count(classes), digest.hexdigest(), len(images), read)


def _load_arrays(path: Path, split: str | None) -> tuple[Tensor, Tensor | None]:
    """The images and, if there are any, the labels of a .npz or .safetensors file, found by name."""
    is_safetensors, part, whole = path.suffix == ".safetensors", split or "train", not split
    names = [f"{part}_images", f"x_{part}"] + ["images", "image", "x", "data", "arr_0"] * whole
    label_names = [f"{part}_labels", f"y_{part}"] + ["labels", "label", "y", "arr_1"] * whole

    def load(key: str) -> Tensor:
        if is_safetensors:
            return file.get_tensor(key)
        array = file[key]
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    try:
        opened: Any = safe_open(path, "pt") if is_safetensors else np.load(path, allow_pickle=False)
        with opened as file:
            held = sorted(file.keys())
            images, labels = (
                next((load(k) for k in keys if k in held), None) for keys in (names, label_names)
            )
    except Exception as error:  # zipfile, numpy and safetensors raise many unrelated types
        pickled = "it holds pickled objects, which are never loaded; save plain arrays"
        why = pickled if "pickle" in str(error) else error
        raise UserError(f"data: cannot read {path}: {why}") from error
    if images is None:
        raise UserError(f"data: {path} holds {held}; the images are looked for as {names}")
    return images, labels


def _channels_first(images: Tensor, where: object) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W), with C one of 1, 3, 4 and N at least 1."""
    shape = tuple(images.shape)
    if images.numel() and images.ndim == 3:
        return images[:, None]
    if images.numel() and images.ndim == 4:
        first, last = shape[1] in (1, 3, 4), shape[3] in (1, 3, 4)
        if first and (not last or shape[2] == shape[3]):  # if both could be channels, pictures are square
            return images
        if last:
            return images.permute(0, 3, 1, 2)
    wanted = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
    raise UserError(f"data: images of {where} have the shape {shape}; give {wanted}")


def _recolour(images: Tensor, channels: int) -> Tensor:
    """Grey, RGB or RGBA images (B, 1|3|4, H, W) in [-1, 1], put on white, as (B, channels, H, W)."""
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        images = images[:, :3] * alpha + (1 - alpha)
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # Pillow's
        return (images * weights).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)


def _class_numbers(labels: Tensor | list[Any] | None, size: int, where: str) -> Tensor | None:
    """Labels as int64 (size,): whole numbers from 0 as they are, names by their place in sorted order."""
    if labels is None:
        return None
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        number = {label: i for i, label in enumerate(sorted(set(labels)))}
        labels = [number[label] for label in labels]
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    numbers = found.long().flatten()
    if found.is_floating_point() or len(numbers) != size or int(numbers.min()) < 0:
        wanted = "one for each image, a whole number from 0 or a name"
        raise UserError(f"data: labels of {where} cannot be used; give {wanted}")
    return numbers


def _count(classes: Tensor | None) -> int | None:
    return None if classes is None else int(classes.max()) + 1


def _open_folder(path: Path, split: str | None, name: str, form: _Form) -> Data:
    """A folder of image files, at any depth; hidden files and folders are passed over.

    With a metadata.jsonl, its rows are the samples. Else, where all images lie in several sub-folders, the
    sub-folders are the classes, in sorted order.
    """
    root = path / split if split else path
    metadata = root / "metadata.jsonl"
    listing, captions, labels = b"", None, None
    if metadata.is_file():
        files, captions, labels = _read_metadata(metadata)
        listing = metadata.read_bytes()
    else:
        files = sorted(_walk(root))
        tops = {file.partition("/")[0] for file in files if "/" in file}
        if not files and any(path.glob("**/*.parquet")):
            return _open_hub(str(path), split, name, form)
        if not root.is_dir():
            raise UserError(f"data: {path} has no split {split!r}; {root} is not a folder")
        if not split and "train" in tops and tops <= _SPLITS:
            return _open_folder(path, "train", name, form)
        loose = next((file for file in files if "/" not in file), None)
        if loose and len(tops) > 1:
            raise UserError(f"data: {root} has classes in {sorted(tops)[:3]} but {loose} is in none of them")
        if len(tops) > 1:
            labels = [file.partition("/")[0] for file in files]
    if not files:
        raise UserError(f"data: {root} holds no image ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    digest = hashlib.blake2b(listing, digest_size=8)
    for file in files:
        digest.update(f"{file}\0{(root / file).stat().st_size}\n".encode())

    def fetch(indices: list[int]) -> list[Source]:
        return [str(root / files[i]) for i in indices]

    classes = _class_numbers(labels, len(files), str(metadata))
    texts = None if captions is None else lambda indices: [captions[i] for i in indices]
    shape, read = _pictures(len(files), fetch, lambda i: str(root / files[i]), classes, texts, form)
    return Data(name, shape, _count(classes), digest.hexdigest(), len(files), read)


def _walk(root: Path) -> Iterator[str]:
    # Not rglob: before Python 3.13 it does not enter linked folders, of which subsets are often made.
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in _IMAGE_SUFFIXES:
                yield (Path(folder) / name).relative_to(root).as_posix()


def _read_metadata(path: Path) -> tuple[list[str], list[str] | None, list[Any] | None]:
    """Files, captions and labels of an imagefolder's metadata.jsonl (file_name, text or caption, label)."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"data: {path}, line {number} is not JSON ({error})") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"data: {path}, line {number} has no 'file_name'; give one JSON object a line")
        if not (path.parent / row["file_name"]).is_file():
            raise UserError(f"data: {path}, line {number}: the file {row['file_name']!r} does not exist")
        rows.append(row)
    captions = [row.get("text", row.get("caption")) for row in rows]
    labels = [row.get("label") for row in rows]
    given = any(caption is not None for caption in captions)
    return (
        [row["file_name"] for row in rows],
        ["" if caption is None else str(caption) for caption in captions] if given else None,
        labels if any(label is not None for label in labels) else None,
    )


def _open_hub(source: str, split: str | None, name: str, form: _Form) -> Data:
    """A data set read by the `datasets` library: an id, a .parquet file or a folder on this machine.

    The images are the column image, img or pixel_values, else the first of type Image; the labels label or
    labels; the captions text or caption.
    """
    missing = "" if Path(source).exists() else f"does not exist here (give {ACCEPTED}) and "
    failed = f"data: {source!r} {missing}cannot be read as a Hugging Face dataset"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{failed}: that needs pip install 'diffdistill[datasets]'") from error
    part = split or "train"
    try:
        if any((Path(source) / marker).is_file() for marker in _SAVED):
            table = datasets.load_from_disk(source)
            splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
            if part not in splits and (split or len(splits) > 1):
                raise ValueError(f"it has no split {part!r}, but {sorted(splits)}")
            table = splits.get(part) or next(iter(splits.values()))
        elif source.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=source, split=part)
        else:
            table = datasets.load_dataset(source, split=part)
    except Exception as error:  # the library passes on what its network and file layers raise
        why = " ".join(str(error).split())
        raise UserError(f"{failed}: {why}") from error
    table, features = table.with_format(None), table.features  # a saved format would turn images into tensors
    pictures = [c for c in ("image", "img", "pixel_values") if c in features]
    pictures += [c for c in features if isinstance(features[c], datasets.Image)]
    if not pictures or not len(table):
        rows = f"{len(table)} rows with the columns {list(features)}"
        raise UserError(f"data: {source!r} has {rows}; give at least one row, with an 'image'")
    scalar = [c for c in features if isinstance(features[c], (datasets.Value, datasets.ClassLabel))]
    label = next((c for c in ("label", "labels") if c in scalar), None)
    caption = next((c for c in ("text", "caption") if c in scalar and "string" in features[c].dtype), None)
    encoded = table.select_columns(pictures[:1])
    if isinstance(features[pictures[0]], datasets.Image):  # decoded here, so that a bad image can be named
        encoded = encoded.cast_column(pictures[0], datasets.Image(decode=False))

    def fetch(indices: list[int]) -> list[Source]:
        values = encoded[indices][pictures[0]]
        return [v["bytes"] or v["path"] if isinstance(v, dict) else v for v in values]

    def title(i: int) -> str:
        return f"{source}, row {i}"

    def texts(indices: list[int]) -> list[str]:
        return [text or "" for text in table.select_columns([caption])[indices][caption]]

    labels = table.select_columns([label])[:][label] if label else None
    classes = _class_numbers(labels, len(table), f"{source!r}")
    # The library's own fingerprint depends on where the data lies.
    digest = hashlib.blake2b(f"{len(table)} {list(features)} {labels}".encode(), digest_size=8)
    some = sorted({i * len(table) // 64 for i in range(64)})
    for i, value in zip(some, fetch(some), strict=True):
        with _naming(title(i)):
            content = _content(value)
        digest.update(content if isinstance(content, bytes) else str(content).encode())
    digest.update(str(texts(some) if caption else None).encode())
    names = features[label].names if label and isinstance(features[label], datasets.ClassLabel) else None
    shape, read = _pictures(len(table), fetch, title, classes, texts if caption else None, form)
    return Data(name, shape, len(names) if names else _count(classes), digest.hexdigest(), len(table), read)


def _pictures(
    size: int,
    fetch: Callable[[list[int]], list[Source]],
    title: Callable[[int], str],
    classes: Tensor | None,
    texts: Callable[[list[int]], list[str]] | None,
    form: _Form,
) -> tuple[tuple[int, int, int], Callable[[list[int]], Samples]]:
    """The shape (C, H, W) that encoded images take in `form`, and the function that reads a batch of them.

    Looks at as few headers as settle the shape. Raises UserError at the first image that cannot be opened or,
    without a resolution, is of another size than image 0.
    """
    first, all_grey = (0, 0), True
    for i, found, grey in _headers(size, fetch, title):
        first, all_grey = first if i else found, all_grey and grey
        if form.resolution is None and found != first:
            raise _odd_size(title(i), found, first)
        if form.resolution is not None and (form.channels is not None or not all_grey):
            break  # nothing that later images could change
    width, height = (form.resolution, form.resolution) if form.resolution else first
    shape = (form.channels or (1 if all_grey else 3), height, width)

    def read(indices: list[int]) -> Samples:
        # Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resizes.
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(_decode, fetch(indices), map(title, indices), repeat(shape), repeat(form))
            images = torch.stack(list(decoded)).float() / 127.5 - 1
        labels = None if classes is None else classes[indices]
        return Samples(images, labels, None if texts is None else texts(indices))

    return shape, read


def _headers(
    size: int, fetch: Callable[[list[int]], list[Source]], title: Callable[[int], str]
) -> Iterator[tuple[int, tuple[int, int], bool]]:
    """For each image its index, (width, height) as it is seen, and whether it is grey; nothing is decoded."""
    for start in range(0, size, 64):
        rows = list(range(start, min(start + 64, size)))
        for i, source in zip(rows, fetch(rows), strict=True):
            with _naming(title(i)), _opened(source) as image:
                # Asked only where the header has EXIF: to look for it, Pillow decodes the whole of a PNG.
                turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= 5
                width, height = image.size[::-1] if turned else image.size
                grey = image.mode in _GREY_MODES
            yield i, (width, height), grey


def _decode(source: Source, title: str, shape: tuple[int, int, int], form: _Form) -> Tensor:
    """One image as uint8 (C, H, W). Raises UserError naming it if it is broken or does not fit `shape`."""
    channels, height, width = shape
    with _naming(title), _opened(source) as opened:
        if form.resolution:  # a JPEG can be decoded at a fraction of its size; three times ours loses nothing
            opened.draft(None, (3 * form.resolution, 3 * form.resolution))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip at 255
            image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
        if form.resolution and image.size != (width, height):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = torch.from_numpy(np.array(image))
    if image.size != (width, height):  # the header scan misses an orientation that follows a PNG's pixels
        raise _odd_size(title, image.size, (width, height))
    return pixels.reshape(height, width, channels).permute(2, 0, 1)


def _opened(source: Source) -> Image.Image:
    if isinstance(source, str) and not source.startswith("zip://"):
        return Image.open(source)  # not by way of `_content`: where a header is enough, no more is read
    content = _content(source)
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content))
    pixels = _channels_first(torch.as_tensor(content)[None], "this row")[0]
    if pixels.is_floating_point() or int(pixels.min()) < 0 or int(pixels.max()) > 255:
        raise ValueError("its values are not whole numbers in 0..255")
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).to(torch.uint8).numpy())


def _content(source: Source) -> bytes | list[Any]:
    if source is None:
        raise ValueError("it is missing")
    if isinstance(source, str):
        inside, _, archive = source.partition("::")
        if source.startswith("zip://"):
            return _archive(archive).read(inside.removeprefix("zip://"))
        return Path(source).read_bytes()
    return source


@lru_cache(maxsize=16)  # data sets on the Hub are often a few archives; each has a long table to read
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextmanager
def _naming(title: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's decoders raise many unrelated types
        # Pillow's own words for the first name a file object by its address.
        why = "its content is no image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"data: cannot read the image {title}: {why}") from error


def _odd_size(title: str, found: tuple[int, int], first: tuple[int, int]) -> UserError:
    sizes = f"{found[0]}x{found[1]} where the first image is {first[0]}x{first[1]}"
    return UserError(f"data: {title} is {sizes}; give --resolution to bring all images to one size")
