"""Condition images, which a teacher that changes images reads: where they come from, and what is said of bad ones."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diffdistill
from diffdistill.commands.cli import main
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.images import open_data
from diffdistill.data.shapes import draw_edits, read
from diffdistill.errors import UserError
from tests import tiny

TEXTS = ["a red square", "a cat"]


def picture(i: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    image = Image.new("RGB", size, (40 * i, 200, 90))
    image.paste((0, 0, 255), (0, 0, size[0] // 2, 2 + i))
    return image


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny.PIPELINES["instruct_pix2pix"]().save_pretrained(folder)
    return folder


def listed(folder: Path, **fields: Any) -> Path:
    """Images 0 and 1, with 2 and 3 as what they were made from, named by a metadata.jsonl."""
    (folder / "from").mkdir(parents=True)
    rows = []
    for i, text in enumerate(TEXTS):
        picture(i).save(folder / f"{i}.png")
        picture(i + 2).save(folder / "from" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": text, "condition_image": f"from/{i}.png"} | fields)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def beside(folder: Path) -> Path:
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        picture(i).save(folder / f"{i}.png")
        picture(i + 2).save(folder / f"{i}.condition.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


def shard(folder: Path, conditions: bool = True) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for i, text in enumerate(TEXTS):
            held = {f"{i}.png": png(picture(i)), f"{i}.txt": text.encode()}
            held |= {f"{i}.condition.png": png(picture(i + 2))} if conditions else {}
            for name, data in held.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder / "0.tar"


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("make", [listed, beside, shard])
def test_each_image_comes_with_its_own(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = open_data(str(make(tmp_path / "data")), resolution=8, conditioned=True)
    samples = data.get(torch.tensor([1, 0]))
    assert samples.captions == TEXTS[::-1] and len(data) == 2
    for k, i in enumerate((1, 0)):
        for found, number in ((samples.images, i), (samples.conditions, i + 2)):
            assert found is not None
            expected = torch.tensor([40 * number, 200, 90]) / 127.5 - 1
            assert torch.allclose(found[k, :, -1, -1], expected, atol=0.02)


def test_prompts_name_their_images_and_encode_the_same_as_data(teacher: Path, tmp_path: Path) -> None:
    data = listed(tmp_path / "data")
    rows = [{"prompt": text, "condition_image": f"data/from/{i}.png"} for i, text in enumerate(TEXTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"teacher": str(teacher), "resolution": 16}
    whole = open_encoded(encode(**shared, data=str(data), out=str(tmp_path / "whole")))
    alone = open_encoded(encode(**shared, prompts=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "alone")))
    index = torch.arange(2)
    assert whole.has_images and not alone.has_images
    assert set(whole.get(index).cond) == {"encoder_hidden_states", "image_latents"}
    for name, value in whole.get(index).cond.items():
        assert torch.equal(value, alone.get(index).cond[name])
    latents = whole.get(index).cond["image_latents"]
    assert not torch.equal(latents[0], latents[1])
    # Other images under the same names are other data.
    picture(7, (32, 32)).save(data / "from" / "0.png")
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with source"):
        encode(**shared, data=str(data), out=str(tmp_path / "whole"))


def odd(folder: Path) -> Path:
    listed(folder)
    picture(3, (32, 16)).save(folder / "from" / "1.png")
    return folder


def none(folder: Path) -> Path:
    (beside(folder) / "1.condition.png").unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (odd, r"the condition image .*1.png is 16x32, and its image 16x16 \(height by width\); bring it to that ratio"),
        (none, r"1.png has no condition image, which this teacher reads; put 1.condition.png beside it"),
        (lambda folder: listed(folder, condition_image="gone.png"), "line 1: the condition image 'gone.png' does not"),
        (lambda folder: listed(folder, condition_image=None), "line 1 names no condition image, which this teacher"),
        (lambda folder: shard(folder, conditions=False), r"0.tar:0 has no condition image, .* add a .condition.png"),
        (lambda folder: "shapes", "'shapes' has no condition images, which this teacher reads; give a folder"),
    ],
)
def test_one_that_is_missing_or_of_another_size_is_one_line(
    make: Callable[[Path], Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    shared = {"teacher": str(teacher), "resolution": 16, "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(UserError, match=message) as error:
        encode(**shared, data=str(make(tmp_path / "data")))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_prompts_without_images_are_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n')
    for name, message in (
        ("a.txt", "give a .jsonl or .csv whose rows"),
        ("a.jsonl", "line 1 names no condition image"),
    ):
        with pytest.raises(UserError, match=message):
            encode(teacher=str(teacher), prompts=str(tmp_path / name), out=str(tmp_path / "out"))


def test_sample_takes_the_image(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        picture(3 * i).save(tmp_path / f"{i}.png")
    picture(0, (64, 16)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    one, other = (diffdistill.sample(teacher, prompt="a", image=path, count=1, steps=2).images for path in paths)
    both = diffdistill.sample(teacher, prompt="a", image=paths, count=2, steps=2).images
    assert one.shape == (1, 3, 16, 16) and torch.equal(both[:1], one)
    noise = diffdistill.sample(teacher, prompt="a", image=paths[:1], count=2, steps=2).images[1:]
    assert not torch.equal(both[1:], noise)  # of the same noise, the other image
    assert not torch.equal(one, other)
    capsys.readouterr()
    usual = ["sample", str(teacher), "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "out.png")]
    for arguments, message in (
        ([], "changes an image; give --image FILE"),
        (["--image", str(tmp_path / "gone.png")], "the file '"),
        (["--image", str(tmp_path / "text.png")], "cannot read the image"),
        (["--image", str(tmp_path / "wide.png")], "is 16x64, and the model makes 16x16 (height by width)"),
    ):
        assert main([*usual, *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
    assert main(["sample", "digits", "--image", paths[0]]) == 2
    assert "reads no image; leave it out" in capsys.readouterr().err


def test_drawn_edits_are_of_the_same_shape_in_another_colour() -> None:
    edits = draw_edits(0, 40)
    before, after = read(edits.conditions).attributes, read(edits.images).attributes
    assert torch.equal(after, edits.attributes) and torch.equal(before[:, 1:], after[:, 1:])
    assert not (before[:, 0] == after[:, 0]).any()
    data = open_data("edits:40")
    assert len(data) == 40
    assert torch.allclose(data.get(torch.arange(40)).images, edits.images.clamp(-1, 1))


def test_reduced_images_lie_beside_those_they_were_made_of() -> None:
    """For super-resolution: so many times smaller, as a file of 8 bits has it, and enlarged again; without captions."""
    plain, data = open_data("shapes:4", resolution=32), open_data("reduced:4:shapes:4", resolution=32)
    rows = torch.tensor([2, 0])
    samples = data.get(rows)
    assert torch.equal(samples.images, plain.get(rows).images) and samples.captions == ["", ""]
    small = F.interpolate(samples.images, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    small = ((small + 1) * 127.5).round() / 127.5 - 1
    expected = F.interpolate(small, (32, 32), mode="bicubic").clamp(-1, 1)
    assert samples.conditions is not None and torch.equal(samples.conditions, expected)
    twice = open_data("reduced:2:shapes:4", resolution=32)
    assert len({plain.fingerprint, data.fingerprint, twice.fingerprint}) == 3
    assert (data.name, data.shape, len(data)) == ("reduced:4:shapes:4", (3, 32, 32), 4)
    for wrong in ("reduced:3:shapes:4", "reduced:1:shapes:4"):
        with pytest.raises(UserError, match="is no number of times that images of 32x32 pixels can be reduced"):
            open_data(wrong)
    with pytest.raises(UserError, match=r"'reduced:4:' does not exist"):
        open_data("reduced:4:")
