"""Videos as files: MP4 by diffusers' own writer, GIF by Pillow; their sounds as WAV beside them."""

from __future__ import annotations

import io
import os
import wave
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.utils import export_to_video
from PIL import Image
from torch import Tensor

from diffdistill.errors import UserError, first_line, shown
from diffdistill.files import atomic_write
from diffdistill.pictures import image_grid

_WRITTEN = (".mp4", ".gif")
_OTHERS = (".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg")


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a video is written under this name; UserError where what writes it is missing."""
    suffix = Path(path).suffix.lower()
    if suffix in _OTHERS:
        raise UserError(f"out: {shown(os.fspath(path))}: videos are written as .mp4 or .gif; give one of them")
    if suffix == ".mp4" and any(find_spec(name) is None for name in ("imageio", "imageio_ffmpeg")):
        raise UserError(
            f"out: {shown(os.fspath(path))}: an .mp4 is written by imageio with ffmpeg, which is not installed; pip "
            "install 'diffdistill[video]', or give a .gif"
        )
    return suffix in _WRITTEN


def save_videos(videos: Tensor, path: str | os.PathLike[str], columns: int, fps: int) -> Path:
    """Videos (N, F, 1 or 3, H, W) in [-1, 1] side by side as one .mp4 or .gif, whole or not at all; returns the path.

    A row has `columns` of them. A GIF's frames last whole hundredths of a second, and its colours are 256 a frame.
    """
    frames = [_even(image_grid(videos[:, i], columns)) for i in range(videos.shape[1])]
    if Path(path).suffix.lower() == ".gif":
        data = io.BytesIO()
        first, *rest = frames
        first.save(data, "GIF", save_all=True, append_images=rest, duration=max(20, round(100 / fps) * 10), loop=0)
        return atomic_write(path, data.getvalue())
    with TemporaryDirectory() as folder:
        made = Path(folder) / "video.mp4"
        try:
            export_to_video(frames, str(made), fps=fps, quality=8.0, macro_block_size=2)
        except Exception as error:  # whatever the writer's program says
            raise UserError(f"out: {shown(os.fspath(path))} cannot be written ({first_line(error)})") from error
        return atomic_write(path, made.read_bytes())


def save_sounds(sounds: Tensor, path: str | os.PathLike[str], rate: int) -> list[Path]:
    """Sounds (N, channels, samples) in [-1, 1] as 16-bit WAV files beside a video's; of several each has a number."""
    written = []
    for i, sound in enumerate(sounds.float().cpu().clamp(-1, 1)):
        data, name = io.BytesIO(), f"-{i}" if len(sounds) > 1 else ""
        with wave.open(data, "wb") as file:
            file.setnchannels(len(sound))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((sound.T * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes())
        written.append(atomic_write(Path(path).with_name(f"{Path(path).stem}{name}.wav"), data.getvalue()))
    return written


def _even(image: Image.Image) -> Image.Image:
    """With a line more on the right and below where a side is odd, which H.264 does not take."""
    width, height = image.width + image.width % 2, image.height + image.height % 2
    if (width, height) == image.size:
        return image
    whole = Image.new("RGB", (width, height), "white")
    whole.paste(image)
    return whole
