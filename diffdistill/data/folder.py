"""Folders of images, and encoded images in general: what shape they have, and how they are decoded.

Use `data.images.open_data`, which turns the `Pictures` of this module and of `data.hub` into `Data`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffdistill.data.beside import captions_beside, conditions_beside, conditions_in, metadata_of, read_metadata
from diffdistill.data.files import (
    IMAGE_SUFFIXES,
    ends_of,
    is_cut_short,
    looks_whole,
    note_passed,
    walk,
    without_large_texts,
)
from diffdistill.data.texts import note, printable
from diffdistill.errors import UserError

T = TypeVar("T")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}
_MOST_CLASSES = 100_000  # larger numbers are names of another kind
_ORIENTATION = 0x0112  # the EXIF tag; with values 5 to 8 width and height change places

# An image: where its file lies (a path, or zip://NAME::ARCHIVE), the bytes of one, or pixel values 0..255.
Source = str | bytes | list[Any] | None


class Pictures(NamedTuple):
    """Images that are decoded when they are read, at least one."""

    size: int
    fetch: Callable[[list[int]], list[Source]]
    title: Callable[[int], str]  #: names one image to the user
    classes: Tensor | None  #: int64 (size,)
    num_classes: int | None
    texts: Callable[[list[int]], list[str]] | None
    fingerprint: str  #: 16 hex digits
    #: The condition images of the samples, one after the other, and names of them; None: they were not asked for.
    conditions: Callable[[list[int]], list[Source]] | None = None
    condition_title: Callable[[int], str] = str  #: of those of all samples, one after the other
    each: int = 1  #: how many condition images a sample has


def open_folder(path: Path, split: str | None, conditioned: bool = False) -> Pictures:
    """A folder of image files, at any depth; hidden files and folders are passed over.

    With a metadata.jsonl, .csv or .parquet, its rows are the samples. Else a caption is the .txt beside an
    image, if all have one; and where all images lie in several sub-folders, the sub-folders are the classes: numbers
    as they are, names in sorted order. `conditioned`: each sample has a condition image too, which a field of the
    metadata names, or which is NAME.condition.png beside NAME.png. Raises UserError for what cannot be read, an image
    that is cut short for one.
    """
    root = path / split if split else path
    metadata = next(iter(metadata_of(root)), None)
    listing, labels = b"", None
    if metadata is not None:
        files, captions, labels = read_metadata(metadata)
        conditions = conditions_in(metadata) if conditioned else []
        listing = metadata.read_bytes()
    else:
        passed: Counter[str] = Counter()
        files = sorted(walk(root, passed)) if root.is_dir() else []
        files, conditions = conditions_beside(root, files) if conditioned else (files, [])
        tops = {file.partition("/")[0] for file in files if "/" in file}
        if not root.is_dir():
            raise UserError(f"data: {path} has no split {split!r}; {root} is not a folder")
        training = [top for top in sorted(tops) if top.lower() in ("train", "training")]
        if not split and training and {top.lower() for top in tops} <= _SPLITS:
            return open_folder(path, training[0], conditioned)
        inner = _inner_with_metadata(root, files)
        if inner is not None:
            return open_folder(inner, None, conditioned)
        loose = next((file for file in files if "/" not in file), None)
        if loose and len(tops) > 1:
            raise UserError(
                f"data: {root} has classes in {sorted(tops)[:3]} but {loose} is in none of them; move it into one"
            )
        note_passed(root, passed)
        if len(tops) > 1:
            labels = [file.partition("/")[0] for file in files]
            empty = [p.name for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] != "." and p.name not in tops]
            if empty:
                names = ", ".join(map(printable, empty[:5]))
                note(f"data: {printable(str(root))}: folders without images are no classes ({names})")
        captions = captions_beside(root, files)
        listing = b"" if captions is None else "\0".join(captions).encode()
    if not files:
        raise UserError(f"data: {root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    digest = hashlib.blake2b(listing, digest_size=8)
    named = [*files, *chain.from_iterable(conditions)]
    for file, (size, tail) in zip(named, _ends(root, named), strict=True):
        digest.update(os.fsencode(f"{file}\0{size}\n") + tail)  # where PNG has a checksum of the pixels

    def title(i: int) -> str:
        return str(root / files[i])

    def fetch(indices: list[int]) -> list[Source]:
        return [title(i) for i in indices]

    classes, num_classes = class_numbers(labels, len(files), str(metadata or root))
    texts = None if captions is None else lambda indices: [captions[i] for i in indices]
    pictures = Pictures(len(files), fetch, title, classes, num_classes, texts, digest.hexdigest())
    return _with_conditions(pictures, root, conditions) if conditioned else pictures


def _with_conditions(pictures: Pictures, root: Path, conditions: list[list[str]]) -> Pictures:
    """The same with the condition images of each, files in `root`."""
    places, each = [str(root / name) for name in chain.from_iterable(conditions)], len(conditions[0])
    return pictures._replace(
        conditions=lambda rows: [places[j] for j in of_each(rows, each)],
        condition_title=places.__getitem__,
        each=each,
    )


def of_each(rows: Iterable[int], each: int) -> list[int]:
    """The places of the condition images of these samples, where each has so many, one after the other."""
    return [each * i + k for i in rows for k in range(each)]


def _inner_with_metadata(root: Path, files: list[str]) -> Path | None:
    """The folder that all images lie in, if it has metadata; of metadata in one of several a note says that it is not
    read."""
    parents = {file.rpartition("/")[0] for file in files}
    inner = root / os.path.commonpath(parents) if parents else root
    if inner != root and metadata_of(inner):
        return inner
    lone = next((found[0] for parent in sorted(parents) if (found := metadata_of(root / parent))), None)
    if lone is not None:
        note(f"data: {printable(str(lone))} is not read, since images lie elsewhere too; put one into {root}")
    return None


def holds_images(root: Path) -> bool:
    """Whether `open_folder` finds samples there."""
    return bool(metadata_of(root)) or (root.is_dir() and any(walk(root)))


def _ends(root: Path, files: list[str]) -> list[tuple[int, bytes]]:
    """Size and last bytes of the files; UserError for one that is none, or an image that is not whole."""
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda file: ends_of(root / file), files))
    for file, (_, _, whole) in zip(files, states, strict=True):
        if not whole:
            check_whole(str(root / file), str(root / file))
    return [(size, tail) for size, tail, _ in states]


def check_ends(sources: list[Source], titles: list[str]) -> None:
    """UserError for an image that is missing or cut short, by its last bytes where these tell."""

    def check(source: Source, title: str) -> None:
        if isinstance(source, str) and not source.startswith("zip://"):
            whole = ends_of(Path(source))[2]
        else:
            with naming_image(title):
                held = content(source)
            whole = not isinstance(held, bytes) or looks_whole(held[:16], held[-64:], len(held))
        if not whole:
            check_whole(source, title)

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, sources, titles))


def check_whole(source: Source, title: str) -> None:
    """UserError unless the image can be decoded to its end, and has one."""
    with naming_image(title):
        using(source, lambda image: image.load())
        held = content(source)
        if isinstance(held, bytes) and is_cut_short(held):
            raise ValueError("it is cut short")


def class_numbers(labels: Tensor | list[Any] | None, size: int, where: str) -> tuple[Tensor, int] | tuple[None, None]:
    """Labels as int64 (size,), and how many classes: whole numbers from 0 stay, names take their sorted place."""
    if labels is None:
        return None, None
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        number = _numbers_of_names(sorted(set(labels)), where)
        labels = [number[label] for label in labels]
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        values = torch.empty(0)
    numbers = values.long().flatten()
    if values.is_floating_point() or len(numbers) != size or int(numbers.min()) < 0:
        form = "one for each image, a whole number from 0 or a name"
        raise UserError(f"data: labels of {where} cannot be used; give {form}")
    return numbers, int(numbers.max()) + 1


def _numbers_of_names(names: list[str], where: str) -> dict[str, int]:
    """The class of each name: the number that it is, if all are numbers, or its place among the names."""
    if not all(re.fullmatch(r"[0-9]{1,18}", name) for name in names):
        return {name: i for i, name in enumerate(names)}
    numbers = {name: int(name) for name in sorted(names, key=int)}
    values, where = list(numbers.values()), printable(where)
    if len(set(values)) < len(names) or values[-1] >= _MOST_CLASSES:
        note(f"data: the classes of {where} are numbered anew from 0, in the order of the numbers that they are called")
        return {name: i for i, name in enumerate(numbers)}
    if values != list(range(len(names))):
        numbered = f"{len(names)} of the numbers {values[0]} to {values[-1]}, which are kept as labels"
        note(f"data: the classes of {where} are called by {numbered}")
    return numbers


def channels_first(images: Tensor, where: object) -> Tensor:
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
    layouts = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
    raise UserError(f"data: images of {where} have the shape {shape}; give {layouts}")


def find_shape(pictures: Pictures, size: tuple[int, int] | None, channels: int | None) -> tuple[int, int, int]:
    """(C, H, W) of all images, from as few headers as settle it; nothing is decoded.

    Raises UserError at the first image that cannot be opened or, without a size (height, width) to bring it to, is of
    another size than image 0.
    """
    first, all_grey = (0, 0), True
    chunks = (list(range(i, min(i + 64, pictures.size))) for i in range(0, pictures.size, 64))
    for i, source in enumerate(chain.from_iterable(map(pictures.fetch, chunks))):
        with naming_image(pictures.title(i)):
            width, height, mode = using(source, _size_and_mode)
        all_grey = all_grey and mode in _GREY_MODES
        first = first if i else (width, height)
        if size is None and (width, height) != first:
            raise _odd_size(pictures.title(i), (width, height), first)
        if size is not None and (channels is not None or not all_grey):
            break  # nothing that later images could change
    height, width = size or first[::-1]
    return channels or (1 if all_grey else 3), height, width


def sizes_of(pictures: Pictures) -> list[tuple[int, int]]:
    """Height and width of all images, by their headers. Raises UserError for one that cannot be opened."""
    sizes = []
    for first in range(0, pictures.size, 64):
        rows = list(range(first, min(first + 64, pictures.size)))
        for i, source in zip(rows, pictures.fetch(rows), strict=True):
            with naming_image(pictures.title(i)):
                width, height, _ = using(source, _size_and_mode)
            sizes.append((height, width))
    return sizes


def _size_and_mode(image: Image.Image) -> tuple[int, int, str]:
    # Asked only where the header has EXIF: to look for it, Pillow decodes the whole of a PNG.
    turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= 5
    return (*(image.size[::-1] if turned else image.size), image.mode)


def decode(
    pictures: Pictures, indices: list[int], shape: tuple[int, int, int], resize: bool, resample: str | None = None
) -> Tensor:
    """The images (B, *shape), float32 in [-1, 1]; the middle of each is brought to `shape` by `resize`.

    `resample`: one of Pillow's filters, on the middle alone. None is bicubic, skips what is finer than a third of our
    pixels, and looks beyond the middle's edges.
    """
    sources, titles = pictures.fetch(indices), map(pictures.title, indices)
    # Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda source, title: _decode_one(source, title, shape, resize, resample), sources, titles)
        return torch.stack(list(decoded)).float() / 127.5 - 1


def _decode_one(source: Source, title: str, shape: tuple[int, int, int], resize: bool, resample: str | None) -> Tensor:
    """One image as uint8 (C, H, W). Raises UserError naming it if it is broken or does not fit `shape`."""
    channels, height, width = shape
    with naming_image(title):
        image = using(source, lambda opened: pixels_of(opened, shape, resize, resample))
    if image.size != (width, height):  # the header scan misses an orientation that follows a PNG's pixels
        raise _odd_size(title, image.size, (width, height))
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def decode_conditions(pictures: Pictures, indices: list[int], shape: tuple[int, int, int]) -> Tensor:
    """The condition images (B, *shape), as `decode` gives the images themselves; of several each (B, k, *shape).

    UserError for one of another ratio than its image, which would be cut to another part of what both show.
    """
    assert pictures.conditions is not None
    sources, places = pictures.conditions(indices), of_each(indices, pictures.each)
    images = [image for image in pictures.fetch(indices) for _ in range(pictures.each)]
    for j, image, condition in zip(places, images, sources, strict=True):
        sizes = []
        for source, title in ((image, pictures.title(j // pictures.each)), (condition, pictures.condition_title(j))):
            with naming_image(title):
                width, height, _ = using(source, _size_and_mode)
                sizes.append((height, width))
        check_ratio(pictures.condition_title(j), sizes[1], sizes[0], "its image")
    twin = pictures._replace(fetch=lambda rows: sources, title=pictures.condition_title)
    return in_lists(decode(twin, places, shape, resize=True), pictures.each)


def in_lists(images: Tensor, each: int) -> Tensor:
    """Condition images (B k, ...) as (B, k, ...); as they are where each sample has one."""
    return images if each == 1 else images.unflatten(0, (-1, each))


def condition_picture(path: str | os.PathLike[str], size: tuple[int, int]) -> Image.Image:
    """The image of a file in that height and width; UserError for one that cannot be read, or of another ratio."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise UserError(f"image: the file {name!r} does not exist")
    with naming_image(name):
        width, height, _ = using(name, _size_and_mode)
        picture = using(name, lambda opened: pixels_of(opened, (3, *size), True, None))
    check_ratio(name, (height, width), size, "the model makes", "image")
    return picture


def check_ratio(title: str, size: tuple[int, int], other: tuple[int, int], what: str, field: str = "data") -> None:
    """UserError for a condition image whose height and width have not the ratio of the other's, to a pixel."""
    if abs(size[0] * other[1] - size[1] * other[0]) > max(*size, *other):
        one, two = (f"{height}x{width}" for height, width in (size, other))
        raise UserError(
            f"{field}: the condition image {title} is {one}, and {what} {two} (height by width); bring it to that ratio"
        )


def middle_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest middle of an image that has the ratio of `size`, height and width."""
    if width * size[0] > height * size[1]:
        kept = max(1, round(height * size[1] / size[0])), height
    else:
        kept = width, max(1, round(width * size[0] / size[1]))
    left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
    return left, top, left + kept[0], top + kept[1]


def pixels_of(opened: Image.Image, shape: tuple[int, int, int], resize: bool, resample: str | None) -> Image.Image:
    """An opened image as `decode` gives it, of (C, H, W) `shape` if `resize`."""
    channels, height, width = shape
    if resize and resample is None:  # a JPEG can be decoded at a fraction of its size; three times ours loses nothing
        opened.draft(None, (3 * width, 3 * height))
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    if resize and image.size != (width, height):
        box = middle_box(image.width, image.height, (height, width))
        if resample is None:
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        else:
            image = image.crop(box).resize((width, height), Image.Resampling[resample.upper()])
    return image


def using(source: Source, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of the opened image; of a PNG whose texts are larger than Pillow takes, without these."""
    try:
        with _opened(source) as image:
            return use(image)
    except (ValueError, OSError, SyntaxError):  # those of Pillow's PNG reader
        held = content(source)
        slim = without_large_texts(held) if isinstance(held, bytes) else None
        if slim is None:
            raise
    with Image.open(io.BytesIO(slim)) as image:
        return use(image)


def _opened(source: Source) -> Image.Image:
    if isinstance(source, str) and not source.startswith("zip://"):
        return Image.open(source)  # not by way of `content`: where a header is enough, no more is read
    held = content(source)
    if isinstance(held, bytes):
        return Image.open(io.BytesIO(held))
    pixels = channels_first(torch.as_tensor(held)[None], "this row")[0]
    if pixels.is_floating_point() or int(pixels.min()) < 0 or int(pixels.max()) > 255:
        raise ValueError("its values are not whole numbers in 0..255")
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).to(torch.uint8).numpy())


def content(source: Source) -> bytes | list[Any]:
    """What the file of an image holds, or the image itself where it lies in none."""
    if source is None:
        raise ValueError("it is missing")
    if not isinstance(source, str):
        return source
    if source.startswith("zip://"):
        inside, _, archive = source.removeprefix("zip://").partition("::")
        return _archive(archive).read(inside)
    return Path(source).read_bytes()


@lru_cache(maxsize=16)  # data sets on the Hub are often a few archives; each has a long table to read
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextmanager
def naming_image(title: str) -> Iterator[None]:
    """Turns whatever goes wrong with an image into a UserError that names it."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise many unrelated types
        # Pillow's own words for the first name a file object by its address.
        why = "its content is no image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"data: cannot read the image {title}: {why}") from error


def _odd_size(title: str, size: tuple[int, int], first: tuple[int, int]) -> UserError:
    sizes = f"{size[0]}x{size[1]} where the first image is {first[0]}x{first[1]}"
    return UserError(f"data: {title} is {sizes}; give --resolution to bring all images to one size")
