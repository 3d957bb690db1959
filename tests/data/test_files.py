"""Folders and files as people have them: captions of all kinds, numbered classes, links, pipes, broken images."""

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffdistill.data.examples import check_classes
from diffdistill.data.images import open_data
from diffdistill.errors import UserError
from diffdistill.eval.image_folder import open_image_file, open_image_folder
from tests.data.encoding import png
from tests.data.reading import every, labels_of, random_images, refused, save_image


def captioned(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for i in range(len(rows)):
        save_image(folder / f"{i}.png")
    lines = (json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ({"text": ["a", "b"]}, "a"),
        ({"text": [None, " ", "b"]}, "b"),
        ({"prompt": "a"}, "a"),
        ({"TEXT": "a"}, "a"),
        ({"text": None, "caption": "a"}, "a"),
        ({"text": "", "caption": "a"}, "a"),
        ({"text": ""}, ""),
    ],
)
def test_captions_of_all_kinds_are_found(row: dict[str, Any], caption: str, tmp_path: Path) -> None:
    assert every(open_data(str(captioned(tmp_path, [row])))).captions == [caption]


@pytest.mark.parametrize("value", [{"en": "a"}, 7, True, [1], [["a"]], "half \ud800"])
def test_what_is_no_caption_is_never_made_one(value: object, tmp_path: Path) -> None:
    assert "line 1: 'text' " in refused(captioned(tmp_path, [{"text": value}]))


def test_an_image_without_a_caption_among_others_is_refused(tmp_path: Path) -> None:
    assert "line 2 has no caption" in refused(captioned(tmp_path, [{"text": "a"}, {}]))


def test_captions_of_a_csv_and_beside_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        save_image(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"\ufeffbeside {i}\r\n")
    assert every(open_data(str(tmp_path))).captions == ["beside 0", "beside 1"]
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\n0.png,"one, two"\n1.png,three\n')
    assert every(open_data(str(tmp_path))).captions == ["one, two", "three"]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "1.txt").unlink()
    assert every(open_data(str(tmp_path))).captions is None
    assert "only 1 of 2 images have a caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["0", "1", "10", "2"], [0, 1, 10, 2], 11),
        (["2", "5", "11"], [11, 2, 5], 12),
        (["000", "001", "002"], [0, 1, 2], 3),
        (["300000", "4000000"], [0, 1], 2),
        (["7", "b"], [0, 1], 2),
    ],
)
def test_class_folders_that_are_numbers(names: list[str], labels: list[int], classes: int, tmp_path: Path) -> None:
    for name in names:
        save_image(tmp_path / name / "a.png")
    data = open_data(str(tmp_path))
    assert (labels_of(every(data)), data.num_classes) == (labels, classes)


def test_labels_that_are_numbers_in_quotes(tmp_path: Path) -> None:
    assert labels_of(every(open_data(str(captioned(tmp_path, [{"label": "10"}, {"label": "2"}]))))) == [10, 2]


def test_more_classes_than_the_teacher_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="data: x has 12 classes; the teacher knows 10"):
        check_classes("x", 12, 10)
    check_classes("x", 3, 10)
    assert "label i is the teacher's class i" in capsys.readouterr().err


def test_members_of_an_archive_belong_together_by_name(tmp_path: Path) -> None:
    a, b = ("v1.5-0.png", png(0)), ("1.png", png(1))
    for members in ([a, b, ("v1.5-0.txt", b"a"), ("1.caption", b"b")], [("v1.5-0.text", b"a"), b, ("1.txt", b"b"), a]):
        data = open_data(str(tar(tmp_path / "x.tar", *members)))
        assert every(data).captions == ["a", "b"]
    marked = tar(tmp_path / "y.tar", ("0.png", png(0)), ("0.txt", "\ufeffa\r\n".encode()))
    assert every(open_data(str(marked))).captions == ["a"]
    several = tar(tmp_path / "z.tar", ("0.png", png(0)), ("0.seg.png", b"?"), ("0.json", b'{"caption": ["a", "b"]}'))
    assert every(open_data(str(several))).captions == ["a"] and len(open_data(str(several))) == 1


def test_headers_of_absurd_sizes(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("0.png", png(0)), ("1.png", png(1)))
    content = bytearray(path.read_bytes())
    for size in (b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 11 + b"\x00"):
        header = content[:512]
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header) + bytes(content[512:]))
        assert "x.tar" in refused(path)


def test_links_and_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        save_image(tmp_path / "d" / f"{i}.png")
    before = open_data(str(tmp_path / "d")).fingerprint
    (tmp_path / "d" / "self").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "again").symlink_to(".")
    (tmp_path / "d" / "root").symlink_to("/")
    data = open_data(str(tmp_path / "d"))
    assert len(data) == 2 and data.fingerprint == before
    assert "root is a link to a folder that holds it" in capsys.readouterr().err
    (tmp_path / "d" / "x.png").symlink_to("/nonexistent/x.png")
    assert "x.png is a link that leads nowhere" in refused(tmp_path / "d")
    (tmp_path / "d" / "x.png").unlink()
    os.mkfifo(tmp_path / "d" / "x.png")
    assert "x.png is no file" in refused(tmp_path / "d")


def test_one_broken_image_among_many_is_found_before_a_training(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(random_images(32, 32, 3)).save(tmp_path / f"{i}.jpg")
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole + bytes(100))
    assert len(open_data(str(tmp_path), resolution=8, channels=3)) == 5
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"3\.jpg"):
        open_data(str(tmp_path), resolution=8, channels=3)


def test_a_png_with_a_large_text_or_profile_is_read(tmp_path: Path) -> None:
    info, picture = PngInfo(), Image.fromarray(random_images(8, 8, 3))
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("note", "y" * 3_000_000, zip=True)
    picture.save(tmp_path / "a.png", pnginfo=info)
    picture.save(tmp_path / "b.png", icc_profile=bytes(3_000_000))
    picture.save(tmp_path / "c.png")
    a, b, c = every(open_data(str(tmp_path))).images
    assert a.equal(c) and b.equal(c)


def test_other_suffixes_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "a.png")
    for name in ("b.tiff", "c.GIF", "d", "e.txt"):
        (tmp_path / name).touch()
    assert len(open_data(str(tmp_path))) == 1
    assert "(1 without a suffix, 1 .gif, 1 .tiff)" in capsys.readouterr().err


def test_an_archive_that_would_fill_the_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1100, 256, 256), dtype=np.uint8))
    assert "expand to 68 MiB" in refused(tmp_path / "a.npz")


def test_a_lone_array_is_images(tmp_path: Path) -> None:
    images, path = random_images(5, 8, 8, 3), tmp_path / "a.npy"
    np.save(path, images)
    assert torch.equal(every(open_data(str(path))).images, torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
    assert open_image_file(path).count == 5
    whole = path.read_bytes()
    for content in (whole[:200], b"", b"\x93NUMPY\x01\x00", whole.replace(b"(5, 8", b"(9, 8")):
        path.write_bytes(content)
        assert "cannot read" in refused(path)
    np.save(path, np.array([None, 1], dtype=object))
    assert "cannot read" in refused(path)
    np.save(path, images.astype(np.complex64))
    assert "are complex numbers" in refused(path)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    save_image(folder / os.fsdecode(b"\xe9.png"))
    data = open_data(str(folder))
    assert data.name == "caf\\xe9" and len(data) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["sample_0", "sample_2", "sample_10"],
        ["img2", "img10", "img100"],
        ["2", "10", "101"],
        ["000002", "000010", "000101"],
        ["a1_2", "a1_10", "a2_1"],
        ["part2/9", "part10/1", "part10/3"],
        ["img10", "img-2", "img-10"],
        ["9", "99999999999999999999999999", "100000000000000000000000000"],
        ["01", "1", "2"],
        ["2", "10", "a"],
    ],
)
def test_images_to_judge_are_in_the_order_of_their_numbers(names: list[str], tmp_path: Path) -> None:
    for i, name in reversed([*enumerate(names)]):
        save_image(tmp_path / "all" / f"{name}.png", (i, i, i))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "part").symlink_to(tmp_path / "all")
    for name in ("all", "linked"):
        drawn = open_image_folder(tmp_path / name).draw([0, 1, 2], 0, None, None)
        assert drawn[:, 0, 0, 0].tolist() == [0, 1, 2] and drawn.dtype == torch.uint8
