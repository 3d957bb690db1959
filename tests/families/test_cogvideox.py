"""CogVideoX: what is its own beside other videos' families, frames that go together and a scheduler of another call."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from diffdistill import UserError
from diffdistill.eval.sample import decoded, traced
from diffdistill.families import FAMILIES, load_pipeline, load_teacher
from tests.tiny_c import cogvideox


@pytest.mark.parametrize(
    ("together", "frames", "message"),
    [
        (None, 4, "frames: 4 is not one more than a multiple of 4, which cogvideox needs; use 5"),
        (2, 4, "frames: 4 is not one more than a multiple of 4, which cogvideox needs; use 5"),
        (2, 9, "frames: 9 are 3 of latents, and this network takes 2 of them together; use 5 or 13"),
    ],
)
def test_frames_that_do_not_fit_name_those_that_do(
    together: int | None, frames: int, message: str, tmp_path: Path
) -> None:
    cogvideox(patch_size_t=together, patch_bias=together is None).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_teacher(tmp_path, frames=frames)
    assert str(error.value) == message
    for near in message.rpartition("use ")[2].split(" or "):
        assert load_teacher(tmp_path, frames=int(near)).size["num_frames"] == int(near)


def test_the_trace_of_the_released_5bs_scheduler_ends_with_the_video(tmp_path: Path) -> None:
    """Whose step takes more before the timestep; it is the teacher's too, and its chain the same."""
    pipeline = cogvideox()
    expected = load_teacher(_saved(pipeline, tmp_path / "ddim")).denoiser.schedule
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    folder = _saved(pipeline, tmp_path / "dpm")
    t = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    assert torch.equal(load_teacher(folder).denoiser.schedule.native(t).time, expected.native(t).time)
    pipeline, family = load_pipeline(folder), FAMILIES["cogvideox"]
    call = family.arguments(3) | {"height": 32, "width": 32, "num_frames": 5}
    with traced(pipeline) as clean:
        video = pipeline("a cat", **call, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    columns = [decoded(pipeline, family, x0[:1], call) for x0 in clean]
    assert len(columns) == 3
    assert (columns[-1] - (2 * video[:, 0] - 1)).abs().max() < 2e-3
    assert (columns[0] - columns[-1]).abs().max() > 0.01


def _saved(pipeline: object, folder: Path) -> Path:
    pipeline.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
