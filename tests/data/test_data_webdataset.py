"""WebDataset shards as data."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffdistill.data.images import open_data
from diffdistill.errors import UserError


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "png")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for s in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            members[f"a/{i}.png"] = png(40 * (3 * s + i))
            members[f"a/{i}.txt" if s == 0 else f"a/{i}.json"] = (
                f"number {i}".encode() if s == 0 else b'{"caption": "other %d"}' % i
            )
            members[f"a/{i}.cls"] = str(i % 2).encode()
        members["readme.txt"] = b"no sample"
        write(root / f"{s:05d}.tar", members)
    return root


def test_images_captions_and_classes(folder: Path) -> None:
    data = open_data(str(folder))
    assert (len(data), data.shape, data.num_classes) == (6, (3, 4, 4), 2)
    got = data.get(torch.tensor([5, 0, 3]))
    assert got.captions == ["other 2", "number 0", "other 0"]
    assert got.labels is not None and got.labels.tolist() == [0, 0, 0]
    shades = (got.images[:, 0, 0, 0] + 1) * 127.5
    assert torch.allclose(shades, torch.tensor([200.0, 0.0, 120.0]), atol=0.01)


def test_one_shard_and_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    assert len(open_data(str(folder / "00001.tar"))) == 3
    moved = folder.rename(tmp_path / "moved")
    first = open_data(str(moved)).fingerprint
    assert first == open_data(str(moved)).fingerprint
    write(moved / "00001.tar", {"a/0.png": png(7), "a/0.txt": b"changed", "a/0.cls": b"0"})
    assert open_data(str(moved)).fingerprint != first


def test_the_fingerprint_is_of_the_pixels_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copied"))
    first = open_data(str(folder)).fingerprint
    assert open_data(str(copied)).fingerprint == first
    content = (copied / "00001.tar").read_bytes()
    old, new = png(120), png(121)  # of one size
    assert len(old) == len(new) and content.count(old) == 1
    (copied / "00001.tar").write_bytes(content.replace(old, new))
    assert open_data(str(copied)).fingerprint != first


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*.tar", 6), ("0000[1-9].tar", 3), ("{00000..00001}.tar", 6), ("0000{1..1}.tar", 3)],
)
def test_patterns_of_shards(pattern: str, count: int, folder: Path) -> None:
    data, whole = open_data(str(folder / pattern)), open_data(str(folder))
    assert len(data) == count and (data.fingerprint == whole.fingerprint) == (count == 6)
    last = data.get(torch.tensor([count - 1]))
    assert last.images.equal(whole.get(torch.tensor([5])).images) and last.captions == ["other 2"]


def test_a_row_of_shards_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for s in range(12):
        write(tmp_path / f"part-{s}.tar", {"x.png": png(20 * s)})  # one name everywhere: still twelve samples
    shades = [20 * s for s in range(12)]
    data = open_data(str(tmp_path / "part-{0..11}.tar"))
    pixels = (data.get(torch.arange(12)).images[:, 0, 0, 0] + 1) * 127.5
    assert pixels.round().tolist() == shades
    assert len(open_data(str(tmp_path / "part-{2..3}.tar"))) == 2
    with pytest.raises(UserError, match=r"data: .*part-12.tar, which .* names, does not exist"):
        open_data(str(tmp_path / "part-{0..12}.tar"))
    with pytest.raises(UserError, match=r"data: .*part-05.tar, which .* names, does not exist"):
        open_data(str(tmp_path / "part-{05..11}.tar"))
    for nothing in ("other-*.tar", "part-{3..1}.tar"):
        with pytest.raises(UserError, match="no file is called"):
            open_data(str(tmp_path / nothing))


def test_shards_of_one_name_in_several_folders_do_not_run_together(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "0.tar", {"x.png": png(9), "x.txt": part.encode()})
    assert open_data(str(tmp_path / "*" / "0.tar")).get(torch.arange(2)).captions == ["a", "b"]


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(3)})
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # of the last member; zeros follow
    assert len(content) >= end + 1024
    cuts = sorted({*range(0, end + 512, 256), end - 1, end + 511})
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"data: .*x\.tar is (no whole|cut short)") as error:
            open_data(str(path))
        assert "\n" not in str(error.value)
    path.write_bytes(content[: end + 512])
    assert len(open_data(str(path))) == 3
    path.write_bytes(content[:1024] + b"junk" + content[1028:])  # the header of the second
    with pytest.raises(UserError, match="is cut short or damaged at byte 1024"):
        open_data(str(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"alone"}, "holds no image"),
        ({"a.png": png(1), "a.txt": b"\xff\xfe"}, r"the caption of .*a cannot be read"),
        ({"a.png": png(1), "a.json": b"["}, r"the caption of .*a cannot be read"),
        ({"a.png": b"nothing"}, "cannot read the image x.tar:a"),
        ({"a.png": png(1), "a.cls": b"cat"}, r"the class of x.tar:a.cls is b'cat'; write a whole number from 0"),
        ({"a.png": png(1), "a.cls": b"-1"}, r"the class of x.tar:a.cls is b'-1'"),
        ({"a.png": png(1), "a.cls": b"9" * 30}, r"the class of x.tar:a.cls"),
        ({"a.png": png(1), "a.cls": b"\xff"}, r"the class of x.tar:a.cls"),
        ({"a.png": png(1), "a.cls": b"0", "d/b.png": png(2)}, r"x.tar:d/b has no class \(.cls\), which others have"),
        ({"a.png": png(1), "b.png": png(2), "b.txt": b"b"}, r"x.tar:a has no caption \(.txt or .json\)"),
        ({"a.png": png(1), "a.txt": b"", "b.png": png(2), "b.json": b"{}"}, r"x.tar:b has no caption"),
    ],
)
def test_what_cannot_be_used_is_one_line(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_data(str(write(tmp_path / "x.tar", members))).get(torch.arange(1))
    assert "\n" not in str(error.value)


def test_archives_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"this is no archive")
    with pytest.raises(UserError, match=r"is no whole, uncompressed .tar archive"):
        open_data(str(tmp_path / "x.tar"))
    write(tmp_path / "y.tar", {"a.png": png(1)}, "w:gz")
    with pytest.raises(UserError, match=r"is no whole, uncompressed .tar archive"):
        open_data(str(tmp_path / "y.tar"))
