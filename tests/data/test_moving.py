"""Drawn shapes that move: what is drawn, and how it is read back."""

import pytest
import torch

from diffdistill.data.moving import ATTRIBUTES, TRAVEL, WAYS, draw_moving, open_moving, read_moving
from diffdistill.data.shapes import NONE, SIDE, read
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError


def true(captions: list[str]) -> torch.Tensor:
    return torch.tensor([ATTRIBUTES[text] for text in captions])


@pytest.mark.parametrize("frames", [2, 5, 9])
def test_the_judge_reads_what_was_drawn(frames: int) -> None:
    videos, captions = draw_moving(1, 40, frames)
    reading = read_moving(videos)
    assert torch.equal(reading.attributes, true(captions)) and float(reading.strayed.max()) < 1e-3
    # All begin near the middle, wherever they go: the first frame does not say where to.
    assert len({text.split()[-1] for text in captions}) == len(WAYS)
    assert float((read(videos[:, :, 0]).middle - SIDE / 2).abs().max()) < 2.5


def test_the_judge_tells_what_is_wrong_with_a_video() -> None:
    videos, captions = draw_moving(1, 40, 5)
    right = true(captions)
    back = read_moving(videos.flip(2))
    opposite = torch.tensor([1, 0, 3, 2])
    assert torch.equal(back.attributes[:, 2], opposite[right[:, 2]])
    still = read_moving(videos[:, :, :1].expand(-1, -1, 5, -1, -1))
    assert bool((still.attributes[:, 2] == NONE).all()) and torch.equal(still.attributes[:, :2], right[:, :2])
    jump = videos.clone()
    jump[:, :, 1:-1] = videos[:, :, :1]  # where it was until the last frame
    strayed = (TRAVEL**2 * (0.25**2 + 0.5**2 + 0.75**2) / 5) ** 0.5
    assert torch.allclose(read_moving(jump).strayed, torch.full((40,), strayed), atol=1e-3)
    other = videos.clone()
    other[:, :, 2] = videos.roll(1, 0)[:, :, 2]
    differs = (right != right.roll(1, 0))[:, :2]
    assert torch.equal(read_moving(other).attributes[:, :2] == NONE, differs)


def test_moving_shapes_are_videos_to_train_on() -> None:
    data = open_videos("moving:6", frames=5, size=(32, 32), conditioned=True)
    assert (len(data), data.shape, len(open_moving("moving", 3, 2, (32, 32), False))) == (6, (3, 5, 32, 32), 3)
    videos, captions = draw_moving(0, 6, 5)
    rows = data.get(torch.tensor([5, 1]))
    assert torch.equal(rows.images, videos[[5, 1]]) and rows.captions == [captions[5], captions[1]]
    assert rows.conditions is not None and torch.equal(rows.conditions, videos[[5, 1], :, 0])
    longer = open_videos("moving:6", frames=9, size=(32, 32))
    assert longer.fingerprint != data.fingerprint and longer.get(torch.arange(1)).conditions is None
    with pytest.raises(UserError, match="'moving' is of 32x32 pixels, and this teacher's videos 64x32"):
        open_videos("moving", frames=5, size=(32, 64))
