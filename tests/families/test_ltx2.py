"""LTX-2: video and sound in one sample, what is encoded, what is drawn, and what is refused."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffdistill
from diffdistill.commands.cli import main
from diffdistill.core.schedule import sampling_grid
from diffdistill.data.encoded import encode
from diffdistill.errors import UserError
from diffdistill.eval.stock_call import stock_call
from diffdistill.exact.stock import stock, stock_case, stock_checks
from diffdistill.families import FAMILIES, load_pipeline, load_teacher, ltx2
from diffdistill.rng import image_generators
from tests import tiny_e

SIZE: dict[str, Any] = {"resolution": 32, "frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx2")
    tiny_e.ltx2().save_pretrained(path)
    return path


@pytest.mark.parametrize("frames", [1, 9, 17, 121, 241])
@pytest.mark.parametrize("sides", [(1, 1), (4, 4), (16, 24), (3, 5)])
def test_a_samples_frames_and_tokens_follow_from_its_size(frames: int, sides: tuple[int, int]) -> None:
    """As the pipeline counts them: 24 frames and 25 tokens a second, a frame of latents for 8 and one for the first."""
    tokens, length = round(frames / 24 * 25), (frames - 1) // 8 + 1
    rest = -(-tokens // (sides[0] * sides[1]))
    assert ltx2._laid_out(torch.empty(1, 2, length + rest, *sides), 8) == (length, tokens)


def test_sizes_that_no_video_with_sound_has() -> None:
    with pytest.raises(ValueError, match="is no video with its sound"):
        ltx2._laid_out(torch.empty(1, 2, 1, 4, 4), 8)


def test_it_is_the_stock_pipeline(folder: Path) -> None:
    """At another height than width too, whose latents have another number of places for the sound."""
    for size in ({}, {"resolution": "32x64"}):
        case = stock_case(folder, prompt="a red fox", **SIZE | size)
        rows = list(stock_checks(case, "a red fox"))
        assert len(rows) == 7 and all(row.ok for row in rows), rows
        assert torch.allclose(stock(case, 1.0)[2], sampling_grid(case.teacher.denoiser.schedule, case.steps), atol=1e-5)


def test_where_no_token_is_the_clean_sample_is_zero(folder: Path) -> None:
    """Whatever the noise, so that these places neither train anything nor show."""
    teacher = load_teacher(folder, **SIZE)
    assert teacher.shape == (16, 4, 4, 4)  # 3 frames, and 5 tokens of 16 places
    cond = {
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "audio_encoder_hidden_states": torch.randn(2, 8, 32),
        "encoder_attention_mask": torch.ones(2, 8, dtype=torch.int64),
    }
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    x = torch.randn(2, *teacher.shape)
    with torch.no_grad():
        x0 = teacher.denoiser(x, t, cond).x0[:, :, 3].flatten(2)
    assert x0[..., 5:].abs().max() < 1e-5 and x0[..., :5].abs().min() > 1e-5


def test_video_and_sound_hear_each_other(folder: Path) -> None:
    teacher = load_teacher(folder, **SIZE)
    cond = {
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "audio_encoder_hidden_states": torch.randn(1, 8, 32),
        "encoder_attention_mask": torch.ones(1, 8, dtype=torch.int64),
    }
    x, t = torch.randn(1, *teacher.shape), torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        y = teacher.denoiser(x, t, cond).y
        other = x.clone()
        other[:, :, 3, 0, 0] += 1  # a token of the sound
        changed = (teacher.denoiser(other, t, cond).y - y).abs()
    assert changed[:, :, :3].max() > 1e-4


def test_the_sound_is_written_beside_the_video(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    call = ["--prompt", "a dog barks", "--steps", "2", "--resolution", "32", "--frames", "5", "--device", "cpu"]
    assert main(["sample", str(folder), *call, "--count", "2", "--out", str(tmp_path / "x.gif")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.wav", "x-1.wav", "x.gif"]
    pipeline, call_ = load_pipeline(folder), FAMILIES["ltx2"].arguments(2)
    size = {"height": 32, "width": 32, "num_frames": 5}
    for i, generator in enumerate(image_generators(0, range(2))):
        with wave.open(str(tmp_path / f"x-{i}.wav")) as file:
            assert file.getframerate() == 16000 and file.getnchannels() == 2
            read = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2) / 32767
        audio = pipeline("a dog barks", **call_, **size, generator=generator, output_type="pt").audio[0].T
        assert np.abs(read - audio.clamp(-1, 1).numpy()).max() < 1e-3
    samples = diffdistill.sample(folder, prompt=["a dog barks"], steps=2, count=1, device="cpu", **SIZE)
    assert samples.sounds is not None and samples.sounds.shape == (1, 2, 68) and samples.sound_rate == 16000


def test_a_guidance_scale_is_of_the_sound_too(folder: Path) -> None:
    """Also as `sample` and `eval` give it, and on a part's weights nothing of a plan depends."""
    family, size = FAMILIES["ltx2"], {"height": 32, "width": 32, "num_frames": 5}
    pipeline = load_pipeline(folder)

    def sound(call: dict[str, Any]) -> torch.Tensor:
        made = pipeline("a dog", **{**call, **size}, generator=torch.Generator().manual_seed(0), output_type="latent")
        return made.audio

    guided = sound({**family.arguments(2), **family.guided(3.0)})
    assert torch.equal(sound(stock_call(folder, family, 2, 3.0)), guided)
    assert (guided - sound(stock_call(folder, family, 2, None))).abs().max() > 1e-3


def test_a_plan_needs_no_weights_of_other_parts(tmp_path: Path) -> None:
    tiny_e.ltx2().save_pretrained(tmp_path)
    for part in ("connectors", "vocoder", "audio_vae", "text_encoder"):
        for file in (tmp_path / part).glob("*.safetensors"):
            file.unlink()
    assert main(["plan", "--teacher", str(tmp_path), "--method", "dmd2", "--resolution", "32", "--frames", "5"]) == 0


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data: a sample of ltx2 has more than the images of data"):
        encode(teacher=str(folder), data="digits", out=str(tmp_path / "a"), **SIZE)
    with pytest.raises(UserError, match=r"^trace: a step of .* is seen in a part of its sample; leave it out"):
        diffdistill.sample(folder, prompt=["a"], trace=True, **SIZE)
    with pytest.raises(UserError, match="frames: 4 is not one more than a multiple of 2, which ltx2 needs; use 5"):
        load_teacher(folder, resolution=32, frames=4)
    with pytest.raises(UserError, match="resolution: 40 is not a multiple of 32, which ltx2 needs; use 32"):
        load_teacher(folder, resolution=40, frames=5)


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("transformer", "patch_size", 2, "takes other tokens than latent pixels"),
        ("audio_vae", "sample_rate", 24000, "gives no 25 tokens a second"),
    ],
)
def test_another_layout_is_refused(folder: Path, tmp_path: Path, part: str, name: str, value: int, says: str) -> None:
    tiny_e.ltx2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / part / "config.json").read_text()) | {name: value}
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        load_teacher(tmp_path, **SIZE)
