"""Videos with captions: files, GIFs, and folders of numbered images, of which the first frames are read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from diffdistill.data.beside import captions_beside, metadata_of, read_metadata
from diffdistill.data.files import IMAGE_SUFFIXES
from diffdistill.data.folder import pixels_of
from diffdistill.data.images import Data, Samples
from diffdistill.data.moving import open_moving
from diffdistill.errors import UserError, first_line, shown

_BY_FFMPEG = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"}
VIDEO_SUFFIXES = _BY_FFMPEG | {".gif"}
_KINDS = "a folder of videos (.mp4, .gif, .webm, .mov, .mkv, .avi), or of folders of numbered images, or moving"


def open_videos(spec: str, *, frames: int, size: tuple[int, int], conditioned: bool = False) -> Data:
    """The first `frames` frames of each video in a folder, at any depth, resized and cropped to `size`: height, width.

    'moving' or 'moving:COUNT' are drawn ones (see moving.py), whose whole way takes that number of frames.

    A video is a file, or a folder that holds images, whose order is that of the numbers in their names. Frames are
    taken as they are, whatever their rate. Captions are those of images: of a metadata.jsonl, .csv or .parquet, whose
    rows are then the samples, or a .txt beside each video or folder. The samples are (B, 3, frames, H, W) in [-1, 1].
    `conditioned`: their first frames are the condition images, which the videos begin with.
    Raises UserError for a folder without videos, a video with fewer frames, and what cannot be read.
    """
    if drawn := re.fullmatch(r"moving(?::([1-9]\d{0,5}))?", spec):
        return open_moving(spec, int(drawn[1] or 1000), frames, size, conditioned)
    root = Path(spec).expanduser()
    if not root.is_dir():
        raise UserError(f"data: {shown(spec)} is no folder, and this teacher makes videos; give {_KINDS}")
    metadata = next(iter(metadata_of(root)), None)
    if metadata is not None:
        names, captions, _ = read_metadata(metadata, os.path.exists, _names, "videos")
    else:
        names = list(_names(root))
        captions = captions_beside(root, names)
    if not names:
        loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir())
        held = "images, and no videos" if loose else "no videos"
        raise UserError(f"data: {root} holds {held}; this teacher makes videos: give {_KINDS}")
    files = [_files(root / name) for name in names]
    for name, inside in zip(names, files, strict=True):
        _check_frames(root / name, inside, frames)
    digest = hashlib.blake2b("\0".join(captions or ()).encode(), digest_size=8)
    for file in (file for inside in files for file in inside):
        digest.update(os.fsencode(f"{file.relative_to(root)}\0{file.stat().st_size}\n"))

    def read(indices: list[int]) -> Samples:
        with ThreadPoolExecutor() as pool:
            videos = list(pool.map(lambda i: _read(root / names[i], files[i], frames, size), indices))
        samples = torch.stack(videos).float() / 127.5 - 1
        return Samples(
            samples,
            captions=None if captions is None else [captions[i] for i in indices],
            conditions=samples[:, :, 0] if conditioned else None,
        )

    return Data(spec, (3, frames, *size), None, digest.hexdigest(), len(names), read)


def _names(root: Path) -> Iterator[str]:
    """Videos below a folder, relative to it: files, and folders that hold images; hidden ones are passed over."""
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        here = Path(folder)
        if here != root and any(_is_image(here / name) for name in files):
            yield here.relative_to(root).as_posix()
        for name in sorted(files):
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield (here / name).relative_to(root).as_posix()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _files(video: Path) -> list[Path]:
    """The file of a video, or the images of a folder in the order of their numbers."""
    if not video.is_dir():
        return [video]
    images = [path for path in video.iterdir() if _is_image(path)]
    odd = next((path for path in sorted(images) if not re.search(r"\d", path.stem)), None)
    if odd is not None:
        raise UserError(f"data: {odd} has no number in its name, by which the frames of a folder are put in order")
    return sorted(images, key=lambda path: (int(re.findall(r"\d+", path.stem)[-1]), path.name))


def _check_frames(video: Path, files: Sequence[Path], frames: int) -> None:
    """UserError for a video that is known to have too few frames before it is decoded, or that nothing here reads."""
    if video.is_dir():
        _check_enough(video, len(files), frames)
    elif video.suffix.lower() == ".gif":
        with naming_video(video), Image.open(video) as image:
            _check_enough(video, getattr(image, "n_frames", 1), frames)
    elif video.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"data: {video} is no video; give {_KINDS}")
    elif find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        raise UserError(
            f"data: {video} is read by imageio with ffmpeg, which is not installed; pip install "
            "'diffdistill[video]', or give GIFs or folders of frames"
        )


def _check_enough(video: Path, there: int, frames: int) -> None:
    if there < frames:
        raise UserError(
            f"data: {video} has {there} frames, and a sample has {frames}; leave it out, or give fewer --frames"
        )


def _read(video: Path, files: Sequence[Path], frames: int, size: tuple[int, int]) -> Tensor:
    """The first frames as uint8 (3, frames, H, W)."""
    shape = (3, *size)
    with naming_video(video):
        images = [np.array(pixels_of(image, shape, True, None)) for image in islice(_frames(video, files), frames)]
    _check_enough(video, len(images), frames)
    return torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)


def _frames(video: Path, files: Sequence[Path]) -> Iterator[Image.Image]:
    if video.is_dir():
        for file in files:
            with Image.open(file) as image:
                yield image
    elif video.suffix.lower() == ".gif":
        with Image.open(video) as image:
            for frame in ImageSequence.Iterator(image):
                yield frame.convert("RGBA")  # a copy: the next one is drawn into it
    else:
        import imageio

        reader: Any  # whose types say nothing of its frames
        with imageio.get_reader(video, "ffmpeg") as reader:
            yield from map(Image.fromarray, reader)


@contextmanager
def naming_video(video: Path) -> Iterator[None]:
    """Turns whatever goes wrong with a video into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise many unrelated types
        raise UserError(f"data: cannot read the video {video}: {first_line(error)}") from error
