"""Each kind of source opens and reads as a user would expect, and the order of samples is what it says."""

import dataclasses
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffdistill.data.batches import batch_indices
from diffdistill.data.images import Data, Samples, open_data
from diffdistill.errors import UserError


def every(data: Data) -> Samples:
    return data.get(torch.arange(len(data)))


def labels_of(samples: Samples) -> list[int]:
    assert samples.labels is not None and samples.labels.dtype == torch.int64
    return samples.labels.tolist()


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, colour: object = "red", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def refused(spec: object, **how: int) -> str:
    with pytest.raises(UserError) as caught:
        every(open_data(str(spec), **how))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- order


def row(n: int, batch: int, steps: int, **how: int) -> list[int]:
    return torch.cat([batch_indices(n, batch, step, **{"seed": 0, **how}) for step in range(steps)]).tolist()


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 10), (7, 1), (12, 4)])
def test_each_epoch_visits_every_sample_once(n: int, batch: int) -> None:
    seen = row(n, batch, 3 * n)
    epochs = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
    assert len(epochs) == 3 * batch and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_seed_and_step() -> None:
    forward = [batch_indices(50, 8, step, seed=3).tolist() for step in range(30)]
    assert forward == [batch_indices(50, 8, step, seed=3).tolist() for step in reversed(range(30))][::-1]
    assert forward[0] != batch_indices(50, 8, 0, seed=4).tolist()
    torch.manual_seed(99)  # a caller's use of the global generator changes nothing
    assert forward[29] == batch_indices(50, 8, 29, seed=3).tolist()


def test_ranks_share_what_one_rank_would_see() -> None:
    for step in range(20):
        ranks = [batch_indices(17, 4, step, seed=1, rank=rank, world_size=2) for rank in range(2)]
        assert torch.cat(ranks).equal(batch_indices(17, 8, step, seed=1))


def test_a_batch_is_the_callers_own() -> None:
    first = batch_indices(10, 4, 0, seed=0)
    kept = first.clone()
    first.zero_()
    assert first.dtype == torch.int64 and batch_indices(10, 4, 0, seed=0).equal(kept)


def test_batch_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"4096 is larger than the data \(1797 samples\); use at most 1797"):
        batch_indices(1797, 4096, 0, seed=0)
    with pytest.raises(UserError, match="use at most 449"):
        batch_indices(1797, 512, 0, seed=0, world_size=4)
    with pytest.raises(UserError, match="0"):
        batch_indices(1797, 0, 0, seed=0)


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
        {"file_name": "a.png", "label": "disc"},
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
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "a.png"}', "one for each image"),
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
    for wanted in (None, 1, 3):
        images = every(open_data(str(tmp_path), channels=wanted)).images
        assert images.shape[1] == (wanted or channels)
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


# ---- Hugging Face: a stand-in with the few calls that are used, as datasets 3 to 5 have them


class FakeImage:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


@dataclasses.dataclass
class FakeValue:
    dtype: str


@dataclasses.dataclass
class FakeClassLabel:
    names: list[str]
    dtype: str = "int64"


@dataclasses.dataclass
class FakeTable:
    columns: dict[str, list]
    features: dict[str, object]
    split: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: list[int] | slice) -> dict[str, list]:
        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows
        return {name: [column[i] for i in wanted] for name, column in self.columns.items()}

    def with_format(self, kind: None) -> "FakeTable":
        return self

    def select_columns(self, names: list[str]) -> "FakeTable":
        return FakeTable({n: self.columns[n] for n in names}, {n: self.features[n] for n in names})

    def cast_column(self, name: str, feature: FakeImage) -> "FakeTable":
        assert not feature.decode
        return self


def fake_table(tmp_path: Path, count: int = 3) -> FakeTable:
    files = [save_image(tmp_path / "pictures" / f"{i}.png", (i * 100, 0, 0)) for i in range(count)]
    encoded = [{"path": "gone.png", "bytes": file.read_bytes()} for file in files[1:]]
    return FakeTable(
        {
            "img": [{"path": str(files[0]), "bytes": None}, *encoded],
            "label": [1, 0, 1][:count],
            "text": ["zero", None, "two"][:count],
        },
        {"img": FakeImage(), "label": FakeClassLabel(["cat", "dog", "emu"]), "text": FakeValue("string")},
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A fake `datasets` whose `tables` are what its two loaders find."""
    module = types.ModuleType("datasets")
    tables: dict[object, object] = {}

    def load_dataset(name: str, split: str, data_files: str | None = None) -> object:
        if (name, split) not in tables:
            raise ValueError(f'Unknown split "{split}".\nShould be another.')
        return tables[name, split]

    module.__dict__.update(
        tables=tables,
        load_dataset=load_dataset,
        load_from_disk=lambda path: tables["saved"],
        Image=FakeImage,
        Value=FakeValue,
        ClassLabel=FakeClassLabel,
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_dataset(tmp_path: Path, hub: types.ModuleType) -> None:
    hub.tables["user/name", "train"] = fake_table(tmp_path)
    data = open_data("user/name")
    samples = every(data)
    images, captions = samples.images, samples.captions
    assert (data.name, data.shape, data.num_classes, len(data)) == ("user/name", (3, 8, 8), 3, 3)
    assert torch.allclose(images[:, 0, 0, 0], torch.tensor([0, 100, 200]) / 127.5 - 1)
    assert labels_of(every(data)) == [1, 0, 1] and captions == ["zero", "", "two"]
    assert data.get(torch.tensor([2, 0])).captions == ["two", "zero"]
    assert open_data("user/name#train").fingerprint == data.fingerprint
    message = refused("user/name#test")
    assert "does not exist" in message and "Unknown split" in message


def test_a_reader_of_the_library_is_no_dataset(tmp_path: Path, hub: types.ModuleType) -> None:
    hub.tables["pandas", "train"] = fake_table(tmp_path)  # the real one unpickles what lies in this folder
    assert "does not exist" in refused("pandas")


def test_hub_rows_that_cannot_be_used(tmp_path: Path, hub: types.ModuleType) -> None:
    table = fake_table(tmp_path)
    hub.tables["user/name", "train"] = table
    for value in ({"path": None, "bytes": None}, None, {"path": None, "bytes": b"junk"}, [[0.5]]):
        table.columns["img"][1] = value
        assert "row 1" in refused("user/name")
    table.columns["img"][1] = np.full((3, 8, 8), 255).tolist()
    assert every(open_data("user/name")).images[1].eq(1).all()
    table.features = {"picture": FakeValue("string")}
    assert "'picture'" in refused("user/name")


def test_hub_images_inside_an_archive(tmp_path: Path, hub: types.ModuleType) -> None:
    table = hub.tables["user/name", "train"] = fake_table(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "pictures" / "2.png", "deep/2.png")
    plain = open_data("user/name")
    table.columns["img"][2] = {"path": f"zip://deep/2.png::{tmp_path}/a.zip", "bytes": None}
    zipped = open_data("user/name")
    assert every(zipped).images.equal(every(plain).images) and zipped.fingerprint == plain.fingerprint
    table.columns["img"][2] = {"path": f"zip://deep/3.png::{tmp_path}/a.zip", "bytes": None}
    assert "row 2" in refused("user/name")


def test_saved_dataset_and_its_splits(tmp_path: Path, hub: types.ModuleType) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    hub.tables["saved"] = {"train": fake_table(tmp_path), "test": fake_table(tmp_path, 2)}
    assert len(open_data(f"{tmp_path}/saved")) == 3 and len(open_data(f"{tmp_path}/saved#test")) == 2
    assert "['test', 'train']" in refused(f"{tmp_path}/saved#valid")
    hub.tables["saved"] = dataclasses.replace(fake_table(tmp_path), split="test")
    assert len(open_data(f"{tmp_path}/saved")) == len(open_data(f"{tmp_path}/saved#test")) == 3
    assert "['test']" in refused(f"{tmp_path}/saved#train")


def test_parquet(tmp_path: Path, hub: types.ModuleType) -> None:
    (tmp_path / "a.parquet").touch()
    hub.tables["parquet", "train"] = hub.tables[str(tmp_path), "test"] = fake_table(tmp_path.parent / "p")
    assert len(open_data(f"{tmp_path}/a.parquet")) == len(open_data(f"{tmp_path}#test")) == 3


def test_resample_is_pillows_filter_without_short_cuts(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = Image.fromarray(pixels[8:56]).resize((8, 8), Image.Resampling.LANCZOS)
    found = open_data(str(tmp_path), resolution=8, resample="lanczos").get(torch.arange(1)).images[0]
    assert torch.equal(((found + 1) * 127.5).round().byte(), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert not torch.equal(open_data(str(tmp_path), resolution=8).get(torch.arange(1)).images[0], found)
