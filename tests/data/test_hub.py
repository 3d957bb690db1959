"""Data sets of Hugging Face's library, by a stand-in with the few calls that are used, as datasets 3 to 5 have them."""

import dataclasses
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdistill.data.images import open_data
from diffdistill.errors import UserError
from tests.data.reading import every, labels_of, refused, save_image


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
        indices = range(len(self))[rows] if isinstance(rows, slice) else rows
        return {name: [column[i] for i in indices] for name, column in self.columns.items()}

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
            "text": ["zero", "", "two"][:count],
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


def test_an_image_of_a_hub_dataset_that_is_cut_short(tmp_path: Path, hub: types.ModuleType) -> None:
    table = hub.tables["user/name", "train"] = fake_table(tmp_path)
    table.columns = {name: [column[i % 3] for i in range(200)] for name, column in fake_table(tmp_path).columns.items()}
    whole = save_image(tmp_path / "whole.jpg", size=(64, 64)).read_bytes()
    table.columns["img"][133] = {"path": None, "bytes": whole + bytes(100)}
    assert len(open_data("user/name", resolution=8, channels=3)) == 200
    for cut in (whole[: len(whole) // 2], whole[:-20] + bytes(20), b""):
        table.columns["img"][133] = {"path": None, "bytes": cut}
        with pytest.raises(UserError, match="cannot read the image user/name, row 133"):
            open_data("user/name", resolution=8, channels=3)
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])
    table.columns["img"][133] = {"path": str(tmp_path / "cut.jpg"), "bytes": None}
    with pytest.raises(UserError, match="cannot read the image user/name, row 133"):
        open_data("user/name", resolution=8, channels=3)


def test_captions_of_a_hub_dataset(tmp_path: Path, hub: types.ModuleType) -> None:
    table = hub.tables["user/name", "train"] = fake_table(tmp_path)
    table.columns["text"][1] = None
    assert "row 1 has no caption ('text')" in refused("user/name")
    table.columns["prompt"], table.features["prompt"] = ["a", "b", "c"], FakeValue("string")
    assert every(open_data("user/name")).captions == ["zero", "b", "two"]
    table.columns["text"] = [["first", "second"], [None, "third"], ["fourth"]]
    table.features["text"] = [FakeValue("string")]
    assert every(open_data("user/name")).captions == ["first", "third", "fourth"]
    table.columns["text"], table.features["text"] = [{"en": "x"}] * 3, {"en": FakeValue("string")}
    assert every(open_data("user/name")).captions == ["a", "b", "c"]


def test_classes_of_a_hub_dataset_that_are_called_by_numbers(tmp_path: Path, hub: types.ModuleType) -> None:
    table = hub.tables["user/name", "train"] = fake_table(tmp_path)
    table.columns["label"], table.features["label"] = [0, 1, 2], FakeClassLabel(["1", "10", "2"])
    data = open_data("user/name")
    assert labels_of(every(data)) == [1, 10, 2] and data.num_classes == 11


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


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, object]]]:
    """A fake `pyarrow.parquet`: the rows of each file, by its name."""
    held: dict[str, list[dict[str, object]]] = {}
    package, module = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")

    def schema(path: Path) -> types.SimpleNamespace:
        return types.SimpleNamespace(names=[*held[path.name][0]])

    def table(path: Path) -> types.SimpleNamespace:
        return types.SimpleNamespace(to_pylist=lambda: held[path.name])

    module.__dict__.update(read_schema=schema, read_table=table)
    package.__dict__["parquet"] = module
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return held


def test_a_metadata_parquet_beside_images(tmp_path: Path, tables: dict[str, list[dict[str, object]]]) -> None:
    for i in range(2):
        save_image(tmp_path / "d" / "deep" / f"{i}.png", (100 * i, 0, 0))
    (tmp_path / "d" / "metadata.parquet").write_bytes(b"PAR1")
    rows = tables["metadata.parquet"] = [
        {"file_name": "deep/1.png", "text": ["one", "uno"], "label": 3},
        {"file_name": "deep/0.png", "text": ["zero"], "label": 0},
    ]
    samples = every(open_data(str(tmp_path / "d")))
    assert samples.captions == ["one", "zero"] and labels_of(samples) == [3, 0]
    assert torch.allclose(samples.images[:, 0, 0, 0], torch.tensor([100, 0]) / 127.5 - 1)
    rows[1]["file_name"] = "deep/2.png"
    assert "row 1: the file 'deep/2.png' does not exist" in refused(tmp_path / "d")
    rows[1] = {"file_name": "deep/0.png", "text": None}
    assert "row 1 has no caption" in refused(tmp_path / "d")


def test_a_metadata_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "0.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pip install 'diffdistill[datasets]'" in refused(tmp_path)


def test_a_metadata_parquet_of_a_dataset_is_no_list_of_files(
    tmp_path: Path, hub: types.ModuleType, tables: dict[str, list[dict[str, object]]]
) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    tables["metadata.parquet"] = [{"image": {}, "text": "x"}]
    hub.tables[str(tmp_path), "train"] = fake_table(tmp_path.parent / "p")
    assert len(open_data(str(tmp_path))) == 3
