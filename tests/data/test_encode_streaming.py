"""Encoding what is streamed, by a stand-in for what `datasets` 4 and 5 give with streaming=True."""

import glob
import json
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch

from diffdistill.data import encoded as encoding
from diffdistill.data import shards
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.hub import Ended
from diffdistill.data.images import stream_data
from diffdistill.errors import UserError
from tests.data.encoding import PROMPTS, contents, options, png


@dataclass
class FakeImage:
    decode: bool = True


@dataclass
class FakeValue:
    dtype: str


@dataclass
class FakeClassLabel:
    names: list[str]
    dtype: str = "int64"


@dataclass
class FakeStream:
    """Rows to go through once; `log` says where each reading began and `read` which rows were given."""

    table: list[dict[str, Any]]
    features: Any
    length: int | None = None
    first: int = 0
    log: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    breaks_at: list[int] = field(default_factory=list)

    def with_(self, **changes: Any) -> "FakeStream":
        return FakeStream(**{**self.__dict__, **changes})  # the lists are shared

    @property
    def info(self) -> Any:
        splits = None if self.length is None else {"train": types.SimpleNamespace(num_examples=self.length)}
        return types.SimpleNamespace(splits=splits)

    def select_columns(self, names: list[str]) -> "FakeStream":
        features = self.features and {name: self.features[name] for name in names}
        return self.with_(table=[{name: row[name] for name in names} for row in self.table], features=features)

    def cast_column(self, name: str, feature: FakeImage) -> "FakeStream":
        assert self.features[name] == FakeImage() and not feature.decode
        return self.with_(features={**self.features, name: feature})

    def skip(self, n: int) -> "FakeStream":
        self.log.append(n)
        return self.with_(first=n)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.first, len(self.table)):
            if i in self.breaks_at:
                raise ConnectionError("the line\nis down")
            self.read.append(i)
            yield self.table[i]


@dataclass
class Hub:
    stream: FakeStream
    commit: str = "first"
    calls: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return stand_in(monkeypatch)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Seven prompts with images, as the set user/name."""
    features = {"image": FakeImage(), "caption": FakeValue("string"), "label": FakeClassLabel(["a", "b", "c"])}
    held = [
        {"image": {"bytes": png(i), "path": None}, "caption": prompt, "label": i % 2}
        for i, prompt in enumerate(PROMPTS)
    ]
    hub = Hub(FakeStream(held, features))

    def load_dataset(name: str, **how: Any) -> FakeStream:
        hub.calls.append({"name": name, **how})
        assert how["streaming"], "nothing may be downloaded"
        return hub.stream

    module = types.ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, Image=FakeImage, Value=FakeValue, ClassLabel=FakeClassLabel)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: types.SimpleNamespace(sha=hub.commit))
    return hub


def streamed(teacher: Path, out: Path, **more: Any) -> dict[str, Any]:
    stream = {"streaming": True, "prompts": "user/name", "count": 7} | more
    return options(teacher, Path("none"), out) | stream


def test_streamed_prompts_are_read_once_in_order_and_give_the_same_bytes(
    teacher: Path, prompts: Path, tmp_path: Path, hub: Hub
) -> None:
    whole = encode(**options(teacher, prompts, tmp_path / "whole"))
    out = encode(**streamed(teacher, tmp_path / "out"))
    assert contents(out) == contents(whole) and len(open_encoded(out)) == 7
    assert hub.calls == [{"name": "user/name", "split": "train", "streaming": True, "revision": "first"}]
    assert hub.stream.log == [0] and hub.stream.read == 2 * list(range(7))  # the first rows for the fingerprint
    first = encode(**options(teacher, prompts, tmp_path / "first", count=5))
    assert contents(encode(**streamed(teacher, tmp_path / "five", count=5))) == contents(first)
    assert len(open_encoded(first)) == 5


def test_a_stopped_stream_goes_on_where_it_was_and_skips_what_is_there(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    whole = encode(**streamed(teacher, tmp_path / "whole"))
    hub.stream = hub.stream.with_(table=hub.stream.table, log=[], read=[], breaks_at=[])
    out = tmp_path / "out"

    def breaking(*arguments: Any) -> None:
        hub.stream.breaks_at.append(5)
        shards.make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "make", breaking)
        message = (
            r"prompts: the rows of 'user/name' from 5 on cannot be read \(the line is down\); the same command goes on"
        )
        with pytest.raises(UserError, match=message):
            encode(**streamed(teacher, out))
    assert sorted(contents(out)) == ["00000.safetensors", "null.safetensors"]
    hub.stream.breaks_at.clear()
    hub.stream.log.clear()
    hub.stream.read.clear()
    assert contents(encode(**streamed(teacher, out))) == contents(whole)
    assert hub.stream.log == [3] and hub.stream.read == [*range(7), *range(3, 7)]


@pytest.mark.parametrize("rows", [7, 6])  # in the middle of a shard, and between two
def test_a_stream_may_end_before_its_count(
    rows: int, teacher: Path, prompts: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.stream.table = hub.stream.table[:rows]
    prompts.write_text("\n".join(PROMPTS[:rows]))
    whole = encode(**options(teacher, prompts, tmp_path / "whole"))
    for message in (f"user/name has {rows} rows", "is done"):
        out = encode(**streamed(teacher, tmp_path / "out", count=100))
        assert message in capsys.readouterr().out
        assert contents(out) == contents(whole) and len(open_encoded(out)) == rows
    with pytest.raises(UserError, match=rf"out: .* made with count {rows}, and 3 is asked for"):
        encode(**streamed(teacher, tmp_path / "out", count=3))


def test_the_length_of_a_stream(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match="count: 'user/name' does not tell its length; give --count N"):
        encode(**streamed(teacher, tmp_path / "out", count=None))
    hub.stream.length = 7
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "out", count=None)))) == 7


def test_a_set_that_has_changed_is_not_gone_on_with(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    encode(**streamed(teacher, tmp_path / "out"))
    hub.commit = "second"
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with source"):
        encode(**streamed(teacher, tmp_path / "out"))


def test_a_file_that_has_changed_is_not_gone_on_with(
    teacher: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = types.SimpleNamespace(ParquetFile=lambda file: types.SimpleNamespace(metadata=fake))
    fake = types.SimpleNamespace(num_rows=7)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=counted))
    file = tmp_path / "set[1].parquet"
    file.write_bytes(b"one")
    config = streamed(teacher, tmp_path / "out", prompts=str(file), count=None)
    assert len(open_encoded(encode(**config))) == 7
    assert [Path(glob.glob(name)[0]) for name in hub.calls[0]["data_files"]] == [file]  # `datasets` takes patterns
    file.touch()
    encode(**config)
    file.write_bytes(b"two")  # of the same size, and the first rows are the same
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with source"):
        encode(**config)


def test_a_stream_whose_count_exceeds_the_disk_is_read(
    teacher: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "out", count=10**6)))) == 7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"out: .* has 0 MiB free and the next file needs"):
        encode(**streamed(teacher, tmp_path / "other"))


def test_streamed_images_give_the_same_bytes_as_a_folder_of_them(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [json.dumps({"file_name": f"{i}.png", "text": prompt}) for i, prompt in enumerate(PROMPTS)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    data = {"prompts": None, "data": str(folder)}
    whole = encode(**options(teacher, Path("none"), tmp_path / "whole") | data)
    # One lies elsewhere, as those of sets that are no parquet files do.
    with fsspec.open("memory://somewhere/4.png", "wb") as file:
        file.write(png(4))
    hub.stream.table[4]["image"] = {"bytes": None, "path": "memory://somewhere/4.png"}
    out = encode(**streamed(teacher, tmp_path / "out", prompts=None, data="user/name"))
    assert contents(out) == contents(whole) and open_encoded(out).has_images
    hub.stream.table[4]["image"] = {"bytes": None, "path": "memory://somewhere/5.png"}
    with pytest.raises(UserError, match=r"the image memory://somewhere/5.png cannot be read"):
        encode(**streamed(teacher, tmp_path / "other", prompts=None, data="user/name"))


def test_a_stream_is_read_anew_for_rows_that_do_not_follow(hub: Hub) -> None:
    data = stream_data("user/name", count=9, resolution=8, channels=3)
    assert (data.shape, data.num_classes, len(data)) == ((3, 8, 8), 3, 9)
    for rows in ([2, 3], [4, 5], [0, 1], [6]):
        got = data.get(torch.tensor(rows))
        assert got.captions == [PROMPTS[i] for i in rows]
        assert got.labels is not None and got.labels.tolist() == [i % 2 for i in rows]
        corner = (got.images[:, 0, 0, 0] + 1) * 127.5
        assert torch.allclose(corner, torch.tensor([40.0 * i for i in rows]), atol=2)
    assert hub.stream.log == [2, 0, 6]
    with pytest.raises(Ended) as end:
        data.get(torch.tensor([5, 6, 7]))
    assert end.value.rows == 7


def test_streams_that_cannot_be_used(teacher: Path, prompts: Path, tmp_path: Path, hub: Hub) -> None:
    def refused(message: str, **more: Any) -> None:
        with pytest.raises(UserError, match=message) as error:
            encode(**streamed(teacher, tmp_path / "out", **more))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    for other in (str(prompts), str(tmp_path), str(tmp_path / "none.parquet"), "nothing"):
        refused("streaming: .* is no Hugging Face dataset .* leave --streaming out", prompts=other)
    images = {"prompts": None, "data": "user/name"}
    table, features = hub.stream.table, hub.stream.features
    hub.stream.table = []
    refused("prompts: 'user/name' has no row; give at least one")
    hub.stream.table = [{**row, "label": -1} for row in table]
    refused("data: user/name, row 0 has the label -1; a stream's labels are whole numbers", **images)
    hub.stream.table = [{**row, "image": {"bytes": b"junk", "path": None}} for row in table]
    refused("data: cannot read the image user/name, row 0", **images)
    hub.stream.table, hub.stream.features = [{"other": "x"}], None
    refused(r"prompts: 'user/name' has the columns \['other'\]; give rows with a 'prompt'")
    refused(r"data: 'user/name' has the columns \['other'\]; give rows with an 'image'", **images)
    hub.stream.table, hub.stream.features = table, {k: v for k, v in features.items() if k != "caption"}
    refused("data: 'user/name' has no captions, which stable_diffusion is conditioned on", **images)
    hub.stream.breaks_at.append(0)
    hub.stream.features = features
    refused(r"prompts: the rows of 'user/name' from 0 on cannot be read \(the line is down\)")


def test_parquet_files_are_streamed_to_the_same_bytes_as_read(teacher: Path, tmp_path: Path) -> None:
    """With the library itself, where it is installed."""
    pytest.importorskip("datasets")
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = tmp_path / "files"
    files.mkdir()
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for part, indices in enumerate((range(4), range(4, 7))):
        held = [{"image": {"bytes": png(i), "path": None}, "caption": PROMPTS[i]} for i in indices]
        parquet.write_table(pyarrow.Table.from_pylist(held, schema=kinds.arrow_schema), files / f"{part}.parquet")
    for what in ("prompts", "data"):
        rest = {"prompts": None, what: f"{files}/0.parquet"}
        whole = encode(**options(teacher, Path("none"), tmp_path / f"whole-{what}") | rest)
        again = encode(**streamed(teacher, tmp_path / f"streamed-{what}", count=None, **rest))
        assert contents(again) == contents(whole) and len(open_encoded(again)) == 4
    both = {"prompts": f"{files}/*.parquet", "count": None}
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "both", **both)))) == 7
    folder = {"prompts": str(files), "count": 100}
    assert contents(encode(**streamed(teacher, tmp_path / "folder", **folder))) == contents(tmp_path / "both")
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(UserError, match=r"prompts: .*Bad split"):
        encode(**streamed(teacher, tmp_path / "folder", prompts=f"{files}/0.parquet#test"))
