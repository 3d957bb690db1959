"""What lies beside images is found, or it is said that it is not read; archives lose no member without a word."""

import gzip
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from diffdistill.data.images import open_data
from tests.data.encoding import png
from tests.data.reading import every, random_images, refused, save_image

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("image", "beside", "content"),
    [
        ("a.png", "a.txt", "cap"),
        ("a.PNG", "a.TXT", "cap\r\n"),
        ("a.png", "A.Caption", "cap"),
        ("a.png", "a.png.txt", "cap"),
        ("v1.5-0.png", "v1.5-0.prompt", "cap"),
        ("deep/a.png", "deep/a.text", "cap"),
        ("a.png", "a.json", '{"id": 3, "caption": ["cap", "other"]}'),
    ],
)
def test_captions_beside_images(image: str, beside: str, content: str, tmp_path: Path) -> None:
    save_image(tmp_path / image)
    (tmp_path / beside).write_text(content)
    assert every(open_data(str(tmp_path))).captions == ["cap"]


def test_json_without_captions_is_no_caption(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"width": 8}')
    assert every(open_data(str(tmp_path))).captions is None


@pytest.mark.parametrize("codec", ["utf-16", "latin-1"])
def test_captions_beside_that_are_no_utf8(codec: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("café".encode(codec))
    assert "a.txt is not UTF-8" in refused(tmp_path)


def test_metadata_one_folder_deeper(tmp_path: Path, capsys: Capture) -> None:
    for folder in ("one/images", "two/a", "two/b"):
        save_image(tmp_path / folder / "0.png")
    text = '{"file_name": "0.png", "text": "zero"}'
    (tmp_path / "one" / "images" / "metadata.jsonl").write_text(text)
    assert every(open_data(str(tmp_path / "one"))).captions == ["zero"]
    (tmp_path / "two" / "a" / "metadata.jsonl").write_text(text)
    assert every(open_data(str(tmp_path / "two"))).captions is None
    assert "metadata.jsonl is not read, since images lie elsewhere too" in capsys.readouterr().err


def test_images_that_metadata_leave_out_are_noted(tmp_path: Path, capsys: Capture) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./0.png", "text": "zero"}')
    assert len(open_data(str(tmp_path))) == 1
    assert "2 images beside it are not in it and passed over, 1.png the first" in capsys.readouterr().err


def test_splits_in_capitals_are_no_classes(tmp_path: Path) -> None:
    for split in ("Train", "Validation"):
        save_image(tmp_path / split / "0.png")
    data = open_data(str(tmp_path))
    assert len(data) == 1 and data.num_classes is None


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_download_that_ends_in_zeros_is_no_image(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_images(64, 64, 3)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert f"cannot read the image {path}: it is cut short" in refused(path.parent)
    path.write_bytes(content)
    assert len(open_data(str(tmp_path))) == 1


def archive(path: Path, *links: tuple[str, str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in (("d/0.png", png(0)), ("d/0.txt", b"zero")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, BytesIO(data))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.linkname, info.type = target, kind
            file.addfile(info)
    return path


@pytest.mark.parametrize(("kind", "up"), [(tarfile.LNKTYPE, ""), (tarfile.SYMTYPE, "../")])
def test_links_in_an_archive_are_what_they_name(kind: bytes, up: str, tmp_path: Path) -> None:
    links = [("e/1.png", f"{up}d/0.png", kind), ("e/1.txt", f"{up}d/0.txt", kind)]
    samples = every(open_data(str(archive(tmp_path / "a.tar", *links))))
    assert samples.captions == ["zero", "zero"] and samples.images[0].equal(samples.images[1])
    lost = archive(tmp_path / "b.tar", ("e/1.png", "/nowhere/0.png", kind))
    assert "holds 'e/1.png' as a link to" in refused(lost) and "--dereference" in refused(lost)


def test_archives_that_were_joined_or_packed_are_refused(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole + whole)
    assert "b.tar goes on after its end" in refused(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(gzip.compress(whole))
    assert "c.tar is no whole, uncompressed .tar archive" in refused(tmp_path / "c.tar")
