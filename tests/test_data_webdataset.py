"""WebDataset shards as data."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffdistill.data import open_data
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
    write(moved / "00001.tar", {"a/0.png": png(7), "a/0.txt": b"changed"})
    assert open_data(str(moved)).fingerprint != first


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.txt": b"alone"}, "holds no image"),
        ({"a.png": png(1), "a.txt": b"\xff\xfe"}, r"the caption of .*a cannot be read"),
        ({"a.png": png(1), "a.json": b"["}, r"the caption of .*a cannot be read"),
        ({"a.png": b"nothing"}, "a"),
    ],
)
def test_what_cannot_be_used_is_one_line(members: dict[str, bytes], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as error:
        open_data(str(write(tmp_path / "x.tar", members))).get(torch.arange(1))
    assert "\n" not in str(error.value)


def test_archives_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"this is no archive")
    with pytest.raises(UserError, match=r"is no uncompressed .tar archive"):
        open_data(str(tmp_path / "x.tar"))
    write(tmp_path / "y.tar", {"a.png": png(1)}, "w:gz")
    with pytest.raises(UserError, match=r"is no uncompressed .tar archive"):
        open_data(str(tmp_path / "y.tar"))
