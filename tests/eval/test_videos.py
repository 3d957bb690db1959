"""`sample` of a model of videos: an .mp4 or a .gif, several side by side, and first frames under other names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

import diffdistill
from diffdistill import UserError
from diffdistill.commands.cli import main
from diffdistill.eval import videos
from diffdistill.pictures import GAP
from tests import tiny_b


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "wan"
    tiny_b.wan().save_pretrained(folder)
    return folder


OPTIONS: dict[str, Any] = {"prompt": "a b", "steps": 1, "resolution": 16, "frames": 5}


def test_videos_are_written_side_by_side(teacher: Path, tmp_path: Path) -> None:
    made = diffdistill.sample(teacher, **OPTIONS, count=2, out=tmp_path / "x.gif", fps=10)
    assert made.videos is not None and made.videos.shape == (2, 5, 3, 16, 16)
    assert (made.videos[:, 0] == made.images).all()
    with Image.open(tmp_path / "x.gif") as gif:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == 100 and gif.info["loop"] == 0
    assert len(frames) == 5 and frames[0].shape == (16, 32 + GAP, 3)
    for j, frame in enumerate(frames):
        for i, left in enumerate((0, 16 + GAP)):
            want = ((made.videos[i, j].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
            # A GIF has 256 colours a frame: near on the whole, nearer than the next frame.
            assert np.abs(frame[:, left : left + 16] - want).mean() < 12


def test_an_mp4_is_written(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    import imageio

    argv = ["sample", str(teacher), "--prompt", "a", "--steps", "1", "--resolution", "16x32", "--frames", "5"]
    assert main([*argv, "--count", "1", "--fps", "8", "--out", str(tmp_path / "x.mp4")]) == 0
    with imageio.get_reader(tmp_path / "x.mp4", "ffmpeg") as reader:
        assert reader.get_meta_data()["fps"] == 8 and reader.get_meta_data()["size"] == (32, 16)
        assert sum(1 for _ in reader) == 5  # whose length is infinite before
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_what_is_no_video_says_so_before_anything_is_drawn(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"out: it is the name of a video, and .* makes images; give a .png"):
        diffdistill.sample("digits", count=1, out=tmp_path / "x.gif")
    with pytest.raises(UserError, match=r"out: .*x.webm'?: videos are written as .mp4 or .gif"):
        diffdistill.sample(teacher, **OPTIONS, count=1, out=tmp_path / "x.webm")
    with pytest.raises(UserError, match="trace: it is of first frames"):
        diffdistill.sample(teacher, **OPTIONS, count=1, trace=True, out=tmp_path / "x.gif")
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"out: .* is written by imageio with ffmpeg, which is not installed; pip "):
        diffdistill.sample(teacher, **OPTIONS, count=1, out=tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())
    diffdistill.sample(teacher, **OPTIONS, count=1, out=tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (16, 16)
