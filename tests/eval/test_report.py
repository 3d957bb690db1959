"""Pictures pixel by pixel, tables character by character, files whole or not at all."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.eval.report import markdown_table, text_table, write_json, write_text
from diffdistill.files import atomic_write
from diffdistill.pictures import GAP, MARGIN, image_grid, save_png, side_by_side

GAP = GAP


def test_grid_places_every_pixel() -> None:
    """Three 1x2 images in two columns: where each pixel of each lands, and white elsewhere."""
    images = torch.tensor([[-1.0, 1.0], [0.0, -1.0], [-0.5, 0.5]]).reshape(3, 1, 1, 2)
    grid = np.asarray(image_grid(images, columns=2, scale=3))
    expected = np.full((3 + GAP + 3, 6 + GAP + 6, 3), 255)
    expected[:3, :3], expected[:3, 3:6] = 0, 255
    expected[:3, 6 + GAP : 9 + GAP], expected[:3, 9 + GAP :] = 128, 0
    expected[3 + GAP :, :3], expected[3 + GAP :, 3:6] = 64, 191
    assert np.array_equal(grid, expected)


def test_grid_keeps_colours_and_clips() -> None:
    image = torch.tensor([2.0, -1.0, -2.0]).reshape(1, 3, 1, 1)
    assert image_grid(image, columns=9).getpixel((0, 0)) == (255, 0, 0)
    assert image_grid(image, columns=9).size == (1, 1)


def test_grid_takes_any_dtype_with_gradients() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert image_grid(images, columns=2).size == (8 + GAP, 4)


def test_side_by_side_aligns_rows_beside_their_labels() -> None:
    black, grey = torch.full((3, 1, 8, 8), -1.0), torch.zeros(2, 1, 8, 8)
    picture = np.asarray(side_by_side([("teacher, 16 steps", black), ("student", grey)], scale=4))
    strip = 3 * 32 + 2 * GAP
    left = picture.shape[1] - MARGIN - strip
    first = picture[MARGIN : MARGIN + 32]
    second = picture[-MARGIN - 32 : -MARGIN]
    assert (first[:, left : left + 32] == 0).all()
    assert (second[:, left : left + 32] == 128).all()
    assert (second[:, left + 2 * (32 + GAP) :] == 255).all()  # the shorter row ends in paper
    for row in (first, second):
        label = (row[:, : left - MARGIN] < 128).any(-1)
        assert label.any()
        assert not label[0].any() and not label[-1].any()  # the text fits its row
    assert (picture[:, : MARGIN - 1] == 255).all()  # and the picture
    assert (picture[:MARGIN] == 255).all() and (picture[-MARGIN:] == 255).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: image_grid(x[0], columns=1),
        lambda x: image_grid(x[:0], columns=1),
        lambda x: image_grid(x.repeat(1, 2, 1, 1), columns=1),
        lambda x: image_grid(x / 0, columns=1),
        lambda x: image_grid(x, columns=0),
        lambda x: image_grid(x, columns=1, scale=0),
        lambda x: side_by_side([]),
        lambda x: side_by_side([("a", x), ("b", x[..., :2])]),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw) -> None:
    with pytest.raises(ValueError):
        draw(torch.zeros(2, 1, 4, 4))


ROWS = [
    {"model": "teacher|50", "steps": 50, "frechet": 2.5, "note": None},
    {"model": "student", "steps": 1, "frechet": 12345.6, "more": "left out"},
]


def test_markdown_table() -> None:
    assert markdown_table(ROWS, ["model", "steps", "frechet", "note"]) == (
        "| model | steps | frechet | note |\n"
        "| --- | ---: | ---: | --- |\n"
        "| teacher\\|50 | 50 | 2.500 | – |\n"
        "| student | 1 | 12346 | – |\n"
    )


def test_text_table() -> None:
    assert text_table(ROWS, ["model", "steps", "frechet"]) == (
        "model       steps  frechet\n"
        "----------  -----  -------\n"
        "teacher|50     50    2.500\n"
        "student         1    12346\n"
    )
    assert text_table([], ["model"]) == "model\n-----\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.995, "0.9950"),
        (999.94, "999.9"),
        (999.96, "1000"),
        (1e-5, "1.000e-05"),
        (-0.5, "-0.5000"),
        (True, "True"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert text_table([{"x": value}], ["x"]).split()[-1] == text


def test_files_read_back(tmp_path) -> None:
    picture = image_grid(torch.zeros(1, 3, 4, 4), columns=1)
    assert save_png(picture, tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"
    with Image.open(tmp_path / "new" / "a.png") as saved:
        assert saved.format == "PNG" and saved.tobytes() == picture.tobytes()
    assert json.loads(write_json({"x": [1, 2.5]}, tmp_path / "a.json").read_text()) == {"x": [1, 2.5]}
    assert write_text("é\n", tmp_path / "a.txt").read_bytes() == "é\n".encode()


def test_json_without_numbers_is_refused_and_nothing_written(tmp_path) -> None:
    with pytest.raises(ValueError):
        write_json({"x": float("nan")}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_write_replaces_whole(tmp_path) -> None:
    """A reader that holds the old file keeps it whole; the new one is as readable as any other file."""
    path = atomic_write(tmp_path / "a", "old")
    with open(path) as reader:
        atomic_write(path, b"new")
        assert reader.read() == "old"
    assert path.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken: str) -> None:
    path = atomic_write(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
