"""Videos as data: files, GIFs and folders of numbered images, with captions, and what cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdistill import UserError, distill, encode
from diffdistill.data import videos
from diffdistill.data.encoded import open_encoded
from diffdistill.data.videos import open_videos
from diffdistill.families import student_record
from tests import tiny_b

LEVELS = [0, 60, 120, 180, 240]  # grey, a frame each


def frame(level: int, size: tuple[int, int] = (48, 16)) -> Image.Image:
    """A grey middle square between red sides."""
    image = Image.new("RGB", size, "red")
    image.paste((level, level, level), (16, 0, 32, 16))
    return image


def write(path: Path, levels: list[int] = LEVELS) -> None:
    frames = [frame(level) for level in levels]
    if path.suffix == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=60)
    elif path.suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
        import imageio

        with imageio.get_writer(path, fps=16, quality=10, macro_block_size=2) as writer:
            for image in frames:
                writer.append_data(np.asarray(image))
    else:
        path.mkdir()
        for i, image in enumerate(frames):
            image.save(path / f"shot3_{8 + i}.png")  # 8, 9, 10, ..: not the order of the names


@pytest.mark.parametrize("name", ["a.gif", "a", "a.mp4"])
def test_the_first_frames_are_read_in_order_and_cropped(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    (tmp_path / "a.txt").write_text("a grey square\n")
    data = open_videos(str(tmp_path), frames=4, size=(8, 8))
    assert len(data) == 1 and data.shape == (3, 4, 8, 8)
    samples = data.get(torch.tensor([0]))
    assert samples.captions == ["a grey square"] and samples.images.shape == (1, 3, 4, 8, 8)
    expected = torch.tensor(LEVELS[:4]) / 127.5 - 1
    middle = samples.images[0, :, :, 3:5, 3:5]  # the crop has no red; a video's own colours are smeared at its edge
    assert (middle - expected.view(1, 4, 1, 1)).abs().max() < 0.06
    assert samples.images.dtype == torch.float32


def test_metadata_names_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.gif", "b", "c.gif"):
        write(tmp_path / name)
    rows = [{"file_name": "b", "text": "second"}, {"file_name": "a.gif", "text": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_videos(str(tmp_path), frames=5, size=(8, 8))
    assert data.get(torch.tensor([0, 1])).captions == ["second", "first"]
    assert "1 videos beside it are not in it and passed over, c.gif the first" in capsys.readouterr().err
    fewer = [{"file_name": "b", "text": "other"}, rows[1]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, fewer)))
    assert open_videos(str(tmp_path), frames=5, size=(8, 8)).fingerprint != data.fingerprint


@pytest.mark.parametrize("name", ["short.gif", "short", "short.mp4"])
def test_a_video_of_too_few_frames_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / "long")
    write(tmp_path / name, LEVELS[:3])
    with pytest.raises(UserError, match=rf"^data: .*{name} has 3 frames, and a sample has 5; .*--frames$"):
        open_videos(str(tmp_path), frames=5, size=(8, 8)).get(torch.tensor([0, 1]))


def test_what_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(says: str, folder: Path = tmp_path) -> None:
        with pytest.raises(UserError, match=f"^data: .*{says}") as error:
            open_videos(str(folder), frames=2, size=(8, 8)).get(torch.tensor([0]))
        assert "\n" not in str(error.value)

    refused("is no folder, and this teacher makes videos", tmp_path / "nowhere")
    refused("holds no videos")
    frame(0).save(tmp_path / "loose.png")
    refused("holds images, and no videos")
    (tmp_path / "a.gif").write_bytes(b"no video")
    refused("cannot read the video .*a.gif")
    (tmp_path / "a.gif").unlink()
    (tmp_path / "b").mkdir()
    frame(0).save(tmp_path / "b" / "first.png")
    refused("first.png has no number in its name")
    (tmp_path / "b" / "first.png").rename(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    refused("cannot read the video .*b")
    (tmp_path / "c.mp4").write_bytes(b"no video")
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    (tmp_path / "b" / "2.png").unlink()
    frame(0).save(tmp_path / "b" / "2.png")
    refused(r"c.mp4 is read by imageio with ffmpeg, which is not installed; pip install 'diffdistill\[video\]'")


def test_videos_are_encoded(tmp_path: Path) -> None:
    tiny_b.wan().save_pretrained(tmp_path / "wan")
    (tmp_path / "videos").mkdir()
    for name, levels in (("a.gif", LEVELS), ("b", LEVELS[::-1])):
        write(tmp_path / "videos" / name, levels)
    options: dict[str, Any] = {"teacher": tmp_path / "wan", "data": tmp_path / "videos", "resolution": 16, "frames": 5}
    with pytest.raises(UserError, match=r"has no captions, which wan is conditioned on; .*metadata.jsonl"):
        encode(**options, out=tmp_path / "none")
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.txt").write_text(f"video {name}")
    both = open_encoded(encode(**options, out=tmp_path / "both")).get(torch.tensor([0, 1])).x0
    assert both is not None and both.shape[0] == 2 and both.shape[2] == 2 and not torch.equal(both[0], both[1])
    with pytest.raises(UserError, match="streaming: videos are read from a folder"):
        encode(**options, streaming=True, out=tmp_path / "streamed")
    with pytest.raises(UserError, match=r"a.gif has 5 frames, and a sample has 9"):
        encode(**{**options, "frames": 9}, out=tmp_path / "long")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dmd2", {"gan_weight": 0.5, "update_ratio": 1}),
        ("consistency", {"mode": "distillation", "grid_points": 5, "grid": "native", "student_steps": 2}),
    ],
)
def test_the_gan_and_data_methods_learn_from_videos(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of two trainings that differ in nothing but the videos."""
    tiny_b.wan().save_pretrained(tmp_path / "wan")
    shared: dict[str, Any] = {"teacher": tmp_path / "wan", "device": "cpu"}
    weights = []
    for name, levels in (("one", LEVELS), ("other", LEVELS[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        for clip in ("a.gif", "b"):
            write(folder / clip, levels)
            (folder / f"{clip[0]}.txt").write_text("a square")
        prompts = encode(**shared, data=folder, resolution=16, frames=5, out=tmp_path / f"{name}-encoded")
        student = distill(
            method, **shared, **options, prompts=prompts, batch_size=2, steps=2, sample_every=0, student_lr=1e-3,
            warmup_steps=0, ema=0.0, out=tmp_path / f"{name}-run",
        ).student  # fmt: skip
        assert student_record(student).frames == 5
        weights.append(load_file(student / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
