"""Arrays and folders of images open and read as a user would expect."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffdistill.data.images import open_data
from tests.data.reading import every, labels_of, random_images, refused, save_image

# ---- arrays


def test_digits() -> None:
    data = open_data("digits")
    samples = every(data)
    images, labels, captions = samples.images, samples.labels, samples.captions
    assert (data.name, data.shape, data.num_classes, len(data)) == ("digits", (1, 8, 8), 10, 1797)
    assert images.dtype == torch.float32 and images.aminmax() == (-1, 1) and captions is None
    assert ((images + 1) * 8).frac().eq(0).all()
    assert labels is not None and labels.dtype == torch.int64 and labels[:10].tolist() == list(range(10))
    bigger = open_data("digits", resolution=16, channels=3)
    assert bigger.shape == (3, 16, 16) and bigger.get(torch.tensor([5])).images.shape == (1, 3, 16, 16)
    assert bigger.fingerprint == data.fingerprint


def test_the_parts_of_the_digits_are_disjoint_and_alike() -> None:
    whole, train, test = (open_data(spec) for spec in ("digits", "digits#train", "digits#test"))
    assert len(train) + len(test) == len(whole) and len({d.fingerprint for d in (whole, train, test)}) == 3
    parts = [every(part) for part in (train, test)]
    seen = [{tuple(image.flatten().tolist()) for image in part.images} for part in parts]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == len(torch.unique(every(whole).images, dim=0))
    for part in parts:
        labels = labels_of(part)
        assert all(0.08 < labels.count(c) / len(labels) < 0.12 for c in range(10))


def test_get_keeps_the_order_asked_for() -> None:
    data = open_data("digits")
    whole, some = every(data), data.get(torch.tensor([7, 3, 3]))
    assert some.images.equal(whole.images[[7, 3, 3]])
    assert labels_of(some) == [labels_of(whole)[i] for i in (7, 3, 3)]
    with pytest.raises(IndexError):
        data.get(torch.tensor([1797]))


def test_mnist_like_npz(tmp_path: Path) -> None:
    train, test = random_images(6, 28, 28), random_images(4, 28, 28)
    labels = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)
    np.savez(tmp_path / "m.npz", train_images=train, train_labels=labels, test_images=test, test_labels=labels[:4])
    data = open_data(f"{tmp_path}/m.npz")
    assert (data.name, data.shape, data.num_classes) == ("m.npz", (1, 28, 28), 10)
    assert torch.allclose(every(data).images[:, 0], torch.from_numpy(train) / 127.5 - 1)
    assert labels_of(every(data)) == labels.tolist()
    assert len(open_data(f"{tmp_path}/m.npz#test")) == 4
    assert "train_images" in refused(f"{tmp_path}/m.npz#valid")


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (random_images(3, 6, 5), (1, 6, 5)),
        (random_images(3, 6, 5, 3), (3, 6, 5)),
        (random_images(3, 3, 6, 5), (3, 6, 5)),
        (random_images(3, 3, 4, 4), (3, 4, 4)),
        (random_images(3, 4, 4, 3), (3, 4, 4)),
        (random_images(3, 6, 6, 4), (3, 6, 6)),
        (random_images(3, 6, 6).astype(">i8"), (1, 6, 6)),
        (random_images(3, 6, 6).astype("uint16"), (1, 6, 6)),
        (random_images(3, 6, 6) > 128, (1, 6, 6)),
        (random_images(3, 6, 6).astype("float16") / 255, (1, 6, 6)),
    ],
)
def test_layouts_and_types_of_arrays(tmp_path: Path, array: np.ndarray, shape: tuple[int, int, int]) -> None:
    np.savez(tmp_path / "a.npz", array)
    data = open_data(f"{tmp_path}/a.npz")
    samples = every(data)
    images, labels = samples.images, samples.labels
    assert data.shape == shape == images.shape[1:] and (labels, data.num_classes) == (None, None)
    assert images.dtype == torch.float32 and images.min() < -0.8 and 0.8 < images.max() <= 1


def test_the_range_of_floats_is_decided_by_their_sign(tmp_path: Path) -> None:
    grey = torch.linspace(0, 1, 16).view(1, 4, 4)
    save_file({"images": grey}, tmp_path / "unit.safetensors")
    save_file({"images": (2 * grey - 1).bfloat16()}, tmp_path / "signed.safetensors")
    unit, signed = (every(open_data(f"{tmp_path}/{name}.safetensors")).images for name in ("unit", "signed"))
    assert torch.allclose(unit[:, 0], 2 * grey - 1) and torch.allclose(unit, signed, atol=0.01)
    for wrong in (grey * 255, grey - 3, grey.log()):
        save_file({"images": wrong}, tmp_path / "wrong.safetensors")
        assert "floats in [0, 1] or [-1, 1]" in refused(f"{tmp_path}/wrong.safetensors")


def test_transparent_arrays_lie_on_white(tmp_path: Path) -> None:
    clear = np.zeros((1, 4, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=clear)
    assert every(open_data(f"{tmp_path}/a.npz", channels=1)).images.eq(1).all()


def test_wide_arrays_are_cropped_and_resized_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((1, 8, 24), dtype=np.uint8)
    wide[:, :, 8:16] = 255
    np.savez(tmp_path / "a.npz", images=wide)
    assert open_data(f"{tmp_path}/a.npz").shape == (1, 8, 24)
    assert torch.allclose(every(open_data(f"{tmp_path}/a.npz", resolution=4)).images, torch.ones(1, 1, 4, 4))


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    path, good = tmp_path / "a.npz", random_images(3, 4, 4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pictures": good}, "pictures"),
        ({"images": good[:0]}, "(0, 4, 4)"),
        ({"images": random_images(3, 4)}, "(3, 4)"),
        ({"images": good, "labels": [0, 1]}, "one for each image"),
        ({"images": good, "labels": [0, 1, -1]}, "whole number from 0"),
        ({"images": good, "labels": [0.0, 1.0, 2.0]}, "whole number from 0"),
        ({"images": good.astype("int64") * 300}, "0..255"),
    ]
    for arrays, why in cases:
        np.savez(path, **arrays)
        assert why in refused(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "object.npz", images=objects)
    np.savez(tmp_path / "label.npz", images=random_images(1, 4, 4), labels=objects)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("object", "label", "bare"):
        assert "pickle" in refused(tmp_path / f"{name}.npz")
    (tmp_path / "bare.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "bare.safetensors" in refused(tmp_path / "bare.safetensors")
    assert not (tmp_path / "exploded").exists()


# ---- folders


def test_flat_folder(tmp_path: Path) -> None:
    for name, colour in [("b.PNG", "white"), ("a.bmp", "black"), ("c.webp", "white")]:
        save_image(tmp_path / name, colour)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.jpg").write_text("what macOS leaves behind")
    data = open_data(str(tmp_path))
    samples = every(data)
    images, labels, captions = samples.images, samples.labels, samples.captions
    assert (data.shape, data.num_classes, labels, captions) == ((3, 8, 8), None, None, None)
    assert images.mean((1, 2, 3)).tolist() == [-1, 1, 1] and images.dtype == torch.float32


def test_sub_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/deep/3.png", "emu/4.png"):
        save_image(tmp_path / name)
    data = open_data(str(tmp_path))
    assert data.num_classes == 3 and labels_of(every(data)) == [0, 0, 1, 2]
    save_image(tmp_path / "stray.png")
    assert "stray.png" in refused(tmp_path)


def test_one_sub_folder_is_no_class(tmp_path: Path) -> None:
    save_image(tmp_path / "all" / "1.png")
    assert open_data(str(tmp_path)).num_classes is None


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png"):
        save_image(tmp_path / name)
    assert len(open_data(str(tmp_path))) == 2 and open_data(str(tmp_path)).num_classes == 2
    assert len(open_data(f"{tmp_path}#test")) == 1
    assert "valid" in refused(f"{tmp_path}#valid")


def test_a_linked_folder_is_entered_and_a_hash_in_its_name_is_no_split(tmp_path: Path) -> None:
    save_image(tmp_path / "all" / "1.png")
    (tmp_path / "run#2").mkdir()
    (tmp_path / "run#2" / "linked").symlink_to(tmp_path / "all")
    assert len(open_data(f"{tmp_path}/run#2")) == 1


def test_metadata_gives_captions_and_labels(tmp_path: Path) -> None:
    lines = [
        {"file_name": "x/b.png", "text": "a red\u2028square", "label": "square"},
        {"file_name": "a.png", "text": "", "label": "disc"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    save_image(tmp_path / "a.png", "white")
    assert "line 1: the file 'x/b.png' does not exist" in refused(tmp_path)
    save_image(tmp_path / "x/b.png", "black")
    save_image(tmp_path / "unlisted.png")
    data = open_data(str(tmp_path))
    samples = every(data)
    images, captions = samples.images, samples.captions
    assert captions == ["a red\u2028square", ""] and labels_of(every(data)) == [1, 0] and data.num_classes == 2
    assert images.mean((1, 2, 3)).tolist() == [-1, 1]
    assert data.get(torch.tensor([1, 0])).captions == ["", "a red\u2028square"]


def test_metadata_that_cannot_be_used(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    for text, why in [
        ('{"file_name": "a.png"}\n{', "line 2 is not JSON"),
        ('{"name": "a.png"}', "file_name"),
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "a.png"}', "line 2 has no label"),
        ("", "no image"),
    ]:
        (tmp_path / "metadata.jsonl").write_text(text)
        assert why in refused(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "caf\xe9"}'.encode("latin-1"))
    assert f"data: {tmp_path}/metadata.jsonl is not UTF-8 (byte 35)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("mode", "colour", "value", "channels"),
    [
        ("L", 255, 1, 1),
        ("1", 0, -1, 1),
        ("LA", (0, 0), 1, 1),
        ("I;16", 65535, 1, 1),
        ("I;16", 32896, 1 / 255, 1),
        ("RGBA", (0, 0, 0, 0), 1, 3),
        ("RGBA", (0, 0, 0, 255), -1, 3),
        ("RGBA", (0, 0, 0, 51), 0.6, 3),
        ("P", 0, -1, 3),
    ],
)
def test_every_mode_of_image(tmp_path: Path, mode: str, colour: object, value: float, channels: int) -> None:
    save_image(tmp_path / "a.png", colour, mode=mode)
    for channels_option in (None, 1, 3):
        images = every(open_data(str(tmp_path), channels=channels_option)).images
        assert images.shape[1] == (channels_option or channels)
        assert torch.allclose(images, torch.tensor(float(value)), atol=1e-6)


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 255, mode="L")
    save_image(tmp_path / "b.png", "red")
    images = every(open_data(str(tmp_path), resolution=8)).images
    assert images[:, :, 0, 0].tolist() == [[1, 1, 1], [1, -1, -1]]


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the white top becomes the right
    for name in ("a.jpg", "b.png", "c.webp"):
        image.save(tmp_path / name, exif=exif)
    data = open_data(str(tmp_path))
    assert data.shape == (3, 8, 16)
    images = every(data).images
    assert (images[:, :, :, 10:] > 0.9).all() and (images[:, :, :, :6] < -0.9).all()


def test_the_middle_is_kept_and_resized_smoothly(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    image.save(tmp_path / "a.jpg", quality=95)
    assert every(open_data(str(tmp_path), resolution=10)).images.mean() > 0.95
    (tmp_path / "a.jpg").unlink()
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")  # without antialiasing all black or all white
    assert every(open_data(str(tmp_path), resolution=16)).images.abs().max() < 0.1


@pytest.mark.parametrize("size", [(8, 16), (16, 8)])
def test_the_middle_has_the_ratio_of_the_size(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", (80, 80), "black")
    image.paste("white", (0, 20, 80, 60) if size == (8, 16) else (20, 0, 60, 80))
    image.save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", images=np.asarray(image)[None])
    for name in ("", "a.npz"):
        images = every(open_data(str(tmp_path / name), resolution=size)).images
        assert images.shape == (1, 3, *size) and images.mean() > 0.9


def test_mixed_sizes_need_a_resolution(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", size=(8, 8))
    save_image(tmp_path / "b.png", size=(8, 9))
    message = refused(tmp_path)
    assert "b.png" in message and "8x9" in message and "--resolution" in message
    assert open_data(str(tmp_path), resolution=4).shape == (3, 4, 4)


@pytest.mark.parametrize("resolution", [{}, {"resolution": 8}])
def test_a_corrupt_image_is_named(tmp_path: Path, resolution: dict[str, int]) -> None:
    Image.fromarray(random_images(64, 64, 3)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        (tmp_path / "b.png").write_bytes(broken)
        assert "b.png" in refused(tmp_path, **resolution)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    save_image(tmp_path / "one" / "a.png")
    np.savez(tmp_path / "a.npz", images=random_images(2, 4, 4))
    before = [open_data(str(tmp_path / name)).fingerprint for name in ("one", "a.npz")]
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    assert before == [open_data(str(tmp_path / name)).fingerprint for name in ("two", "b.npz")]
    (tmp_path / "two" / "a.png").rename(tmp_path / "two" / "b.png")
    np.savez(tmp_path / "b.npz", images=random_images(2, 4, 4) // 2)
    after = [open_data(str(tmp_path / name)).fingerprint for name in ("two", "b.npz")]
    assert not set(before) & set(after)
    pixels = Image.new("L", (8, 8), 100)
    for value in (7, 9):  # in the middle of a file whose size stays
        pixels.putpixel((4, 4), value)
        pixels.save(tmp_path / "two" / "b.png", compress_level=0)
        after.append(open_data(str(tmp_path / "two")).fingerprint)
    assert after[-1] != after[-2]


# ---- what is not there


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("nowhere.npz")
    assert "holds no image" in refused(tmp_path)
    (tmp_path / "a.txt").touch()
    for unknown in (tmp_path / "a.txt", "", "#train", "what is this?", "digts"):
        assert "'digits'" in refused(unknown) and "Hugging Face" in refused(unknown)
    assert "resolution: 0" in refused("digits", resolution=0)
    assert "channels: 2" in refused("digits", channels=2)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused("someone/something")
    assert "does not exist" in message and "pip install 'diffdistill[datasets]'" in message


def test_resample_is_pillows_filter_without_short_cuts(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = Image.fromarray(pixels[8:56]).resize((8, 8), Image.Resampling.LANCZOS)
    resized = open_data(str(tmp_path), resolution=8, resample="lanczos").get(torch.arange(1)).images[0]
    assert torch.equal(((resized + 1) * 127.5).round().byte(), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert not torch.equal(open_data(str(tmp_path), resolution=8).get(torch.arange(1)).images[0], resized)
