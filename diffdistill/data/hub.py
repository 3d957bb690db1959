"""Data sets that Hugging Face's `datasets` reads: by their id, from parquet files, or as save_to_disk left them.

What `open_hub` opens is downloaded and read in any order; what `open_stream` opens is read from its first row on, as it
comes, and never on disk.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.folder import Pictures, Source, check_ends, class_numbers, content, naming_image
from diffdistill.data.shards import hash_file
from diffdistill.data.texts import NAMES, caption_of, looked_for, note
from diffdistill.errors import UserError


def parquet_files(path: Path) -> list[Path]:
    """The .parquet file of that name, else those that it matches as a pattern, sorted; empty if there is none."""
    if path.suffix != ".parquet":
        return []
    return [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]


def _named(files: list[Path]) -> list[str]:
    """For `load_dataset`, which takes names for patterns."""
    return [glob.escape(str(file)) for file in files]


def is_saved(path: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def _library(failed: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{failed}: that needs pip install 'diffdistill[datasets]'") from error
    return datasets


def _load(source: str, split: str | None, failed: str) -> tuple[Any, Any]:
    """The library, and the table of that source; UserError, which begins with `failed`, where it cannot be read."""
    datasets, part = _library(failed), split or "train"
    try:
        if is_saved(Path(source)):
            table = datasets.load_from_disk(source)
            splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
            if part not in splits and (split or len(splits) > 1):
                raise ValueError(f"it has no split {part!r}, but {sorted(splits)}")
            table = splits.get(part) or next(iter(splits.values()))
        elif source.endswith(".parquet"):
            files = _named(parquet_files(Path(source)))
            table = datasets.load_dataset("parquet", data_files=files or source, split=part)
        else:
            table = datasets.load_dataset(source, split=part)
    except Exception as error:  # the library passes on what its network and file layers raise
        raise UserError(f"{failed}: {_one_line(error)}") from error
    return datasets, table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text_columns(features: Any) -> list[str]:
    """The columns that may hold captions: of texts, or of lists of them."""
    columns = [column for column in features if str(column).lower() in NAMES]
    texts = [column for column in columns if _holds_texts(features[column])]
    for column in columns:
        if column not in texts:
            note(f"data: the column {column!r} holds no texts and is passed over")
    return texts


def _holds_texts(feature: Any) -> bool:
    while isinstance(feature, (list, tuple)) and len(feature) == 1:
        feature = feature[0]
    inner = getattr(feature, "feature", None)  # of a list, as the library's versions write them
    if inner is not None:
        return _holds_texts(inner)
    return feature is None or "string" in str(getattr(feature, "dtype", ""))


def _image_columns(datasets: Any, features: Any) -> tuple[str | None, str | None, list[str]]:
    """The columns of the image, the label and the captions."""
    pictures = [c for c in ("image", "img", "pixel_values") if c in features]
    pictures += [c for c in features if isinstance(features[c], datasets.Image)]
    scalar = [c for c in features if isinstance(features[c], (datasets.Value, datasets.ClassLabel))]
    label = next((c for c in ("label", "labels", "cls") if c in scalar), None)
    picture = next(iter(pictures), None)
    return picture, label, [c for c in _text_columns(features) if c not in (picture, label)]


def _own_numbers(feature: Any, where: str) -> list[int] | None:
    """The numbers that the classes of a ClassLabel are called, where their order is another: 0, 1, 10, 2."""
    names = list(getattr(feature, "names", None) or ())
    if not names or not all(re.fullmatch(r"[0-9]{1,5}", name) for name in names):
        return None
    numbers = [int(name) for name in names]
    if numbers == list(range(len(numbers))) or len(set(numbers)) < len(numbers):
        return None
    note(f"data: the classes of {where} are called by numbers in another order; these numbers are the labels")
    return numbers


def _encoded_images(datasets: Any, table: Any, picture: str) -> Any:
    """The table with images as they are stored: decoded by us, a bad one can be named."""
    if not isinstance((table.features or {}).get(picture), datasets.Image):
        return table
    return table.cast_column(picture, datasets.Image(decode=False))


def open_texts(source: str, split: str | None) -> list[str]:
    """The captions of such a data set: its column prompt, caption or text."""
    _, table = _load(source, split, f"prompts: {source!r} cannot be read as a Hugging Face dataset")
    columns = _text_columns(table.features)
    if not columns or not len(table):
        held = f"{len(table)} rows with the columns {list(table.features)}"
        raise UserError(f"prompts: {source!r} has {held}; give at least one row, with a {looked_for()}")
    rows = table.with_format(None).select_columns(columns)[:]
    return _captions(rows, range(len(table)), f"prompts: {source!r}", "prompt")


def _captions(columns: dict[str, list[Any]], indices: Sequence[int], source: str, first: str = "text") -> list[str]:
    """A caption of each row; UserError for a row without one."""
    rows = ({name: values[k] for name, values in columns.items()} for k in range(len(indices)))
    return [_caption(row, i, source, first) for i, row in zip(indices, rows, strict=True)]


def _caption(row: dict[str, Any], i: int, source: str, first: str) -> str:
    text = caption_of(row, source, f"row {i}", first)
    if text is None:
        raise UserError(f"{source}, row {i} has no caption ({', '.join(map(repr, row))}); give all rows one")
    return text


def open_hub(source: str, split: str | None, doubt: str = "") -> Pictures:
    """An id, a .parquet file or a folder on this machine; `doubt` opens the message where it cannot be read.

    The images are the column image, img or pixel_values, else the first of type Image; the labels label, labels or
    cls; the captions those of `data.texts.NAMES`.
    """
    datasets, table = _load(source, split, f"data: {source!r} {doubt}cannot be read as a Hugging Face dataset")
    table, features = table.with_format(None), table.features  # a saved format would turn images into tensors
    picture, label, captions = _image_columns(datasets, features)
    if picture is None or not len(table):
        rows = f"{len(table)} rows with the columns {list(features)}"
        raise UserError(f"data: {source!r} has {rows}; give at least one row, with an 'image'")
    encoded = _encoded_images(datasets, table.select_columns([picture]), picture)

    def fetch(indices: list[int]) -> list[Source]:
        return [v["bytes"] or v["path"] if isinstance(v, dict) else v for v in encoded[indices][picture]]

    def title(i: int) -> str:
        return f"{source}, row {i}"

    def texts(indices: list[int]) -> list[str]:
        return _captions(table.select_columns(captions)[indices], indices, f"data: {source!r}")

    for first in range(0, len(table) if captions else 0, 10_000):
        texts(list(range(first, min(first + 10_000, len(table)))))  # refuses now, not in the middle of a training

    labels = table.select_columns([label])[:][label] if label else None
    if label and labels and (numbers := _own_numbers(features[label], f"{source!r}")) is not None:
        labels = [numbers[i] if isinstance(i, int) and 0 <= i < len(numbers) else i for i in labels]
    classes, num_classes = class_numbers(labels, len(table), f"{source!r}")
    if label and isinstance(features[label], datasets.ClassLabel):
        num_classes = max(len(features[label].names or []), num_classes or 0) or None
    # The library's own fingerprint depends on where the data lies.
    digest = hashlib.blake2b(f"{len(table)} {list(features)} {labels}".encode(), digest_size=8)
    some = sorted({i * len(table) // 64 for i in range(64)})
    for i, value in zip(some, fetch(some), strict=True):
        with naming_image(title(i)):
            data = content(value)
        digest.update(data if isinstance(data, bytes) else str(data).encode())
    digest.update(str(texts(some) if captions else None).encode())
    for first in range(0, len(table), 64):  # as for texts: refuses now what is cut short
        part = list(range(first, min(first + 64, len(table))))
        check_ends(fetch(part), [title(i) for i in part])
    return Pictures(len(table), fetch, title, classes, num_classes, texts if captions else None, digest.hexdigest())


class Ended(Exception):
    """A stream has fewer rows than were asked for."""

    def __init__(self, rows: int) -> None:
        super().__init__(f"the data end after {rows} rows")
        self.rows = rows


class Stream:
    """A data set that is read row by row, in its order, and never kept.

    `size` is its length where something tells it, `num_classes` that of its labels; the fingerprint is that of the
    commit on the hub, or of the files' names and bytes, and of the first rows.
    """

    def __init__(
        self,
        field: str,
        name: str,
        table: Any,
        columns: tuple[str | None, str | None, list[str]],
        size: int | None,
        origin: str,
    ) -> None:
        self.field, self.name, self.size = field, name, size
        self._table, (self._picture, self._label, self._captions) = table, columns
        self._next, self._rest = -1, iter(())  # the row that the iterator gives next
        kind = (table.features or {}).get(self._label)
        self._numbers = _own_numbers(kind, f"{name!r}")
        self.num_classes: int | None = len(getattr(kind, "names", None) or ()) or None
        if self._numbers is not None:
            self.num_classes = max(self._numbers) + 1
        named: tuple[str | None, ...] = (self._picture, self._label, *(self._captions or (None,)))
        digest = hashlib.blake2b(f"{origin} {named}".encode(), digest_size=8)
        rows = self._read(iter(table), 0, 16)
        if not rows:
            raise UserError(f"{field}: {name!r} has no row; give at least one")
        for i, (row, image) in enumerate(zip(rows, self.images(rows), strict=True)):
            if self._picture is not None:
                with naming_image(self.title(i)):
                    data = content(image)
                digest.update(data if isinstance(data, bytes) else str(data).encode())
            digest.update(f"{[row[column] for column in named[1:] if column]}\n".encode())
        self.fingerprint = digest.hexdigest()

    def length(self, count: int | None) -> int:
        """How many rows to read if `count` are wanted (None: all); UserError if nobody can say."""
        if count is None and self.size is None:
            raise UserError(f"count: {self.name!r} does not tell its length; give --count N, to read the first N rows")
        return min(n for n in (count, self.size) if n is not None)

    def title(self, i: int) -> str:
        """How an error names row i of the stream."""
        return f"{self.name}, row {i}"

    def rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """Consecutive rows; they are read on from the last ones, or anew. Raises Ended if there are not so many."""
        first, count = indices[0], len(indices)
        if first != self._next:
            self._rest = iter(self._table.skip(first))
        rows = self._read(self._rest, first, count)
        self._next = first + len(rows)
        if len(rows) < count:
            raise Ended(self._next)
        return rows

    def images(self, rows: list[dict[str, Any]]) -> list[Source]:
        """The rows' images as `data.folder` reads them, fetched in parallel; None in a row without one."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_fetched, [row[self._picture] if self._picture else None for row in rows]))

    def labels(self, rows: list[dict[str, Any]], indices: list[int]) -> Tensor | None:
        """int64 (B,), or None if there are none; UserError for one that is no whole number."""
        if self._label is None:
            return None
        labels = [row[self._label] for row in rows]
        for i, label in zip(indices, labels, strict=True):
            if not isinstance(label, int) or label < 0:
                what = "a stream's labels are whole numbers from 0"
                raise UserError(
                    f"data: {self.title(i)} has the label {label!r}; {what}, leave --streaming out for names"
                )
        if self._numbers is not None:
            labels = [self._numbers[label] for label in labels]
        return torch.tensor(labels)

    def texts(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[str] | None:
        """The captions of the rows, which have these indices; None if there are none."""
        if not self._captions:
            return None
        first = "prompt" if self.field == "prompts" else "text"
        return [
            _caption({name: row[name] for name in self._captions}, i, f"{self.field}: {self.name!r}", first)
            for i, row in zip(indices, rows, strict=True)
        ]

    def _read(self, rest: Iterator[dict[str, Any]], first: int, count: int) -> list[dict[str, Any]]:
        try:
            return list(islice(rest, count))
        except Exception as error:  # of the network, or of what reads the file
            self._next = -1
            what = f"the rows of {self.name!r} from {first} on cannot be read"
            raise UserError(f"{self.field}: {what} ({_one_line(error)}); the same command goes on there") from error


def _fetched(value: Any) -> Source:
    """An image as `data.folder` reads it; of one that lies elsewhere, the bytes."""
    if not isinstance(value, dict):
        return value
    path = value["path"]
    if value["bytes"] is None and path and "://" in path:
        import fsspec  # comes with datasets

        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:
            raise UserError(f"data: the image {path} cannot be read ({_one_line(error)})") from error
    return value["bytes"] or path


def _contents(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    hash_file(digest, file)
    return f"{file.name} {digest.hexdigest()}"


def open_stream(spec: str, field: str) -> Stream:
    """A hub id, .parquet file or pattern of them, or a folder that holds some; 'SPEC#split' picks a split.

    field: "data", for images with captions or labels, or "prompts", for the column prompt, caption or text. Raises
    UserError for what cannot be read so.
    """
    base, _, part = spec.partition("#")
    part = part or "train"
    path = Path(base).expanduser()
    files = parquet_files(path)
    held = files or (sorted(path.glob("**/*.parquet")) if base and path.is_dir() and not is_saved(path) else [])
    if not held and (path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) or base.endswith(".parquet")):
        raise UserError(
            f"streaming: {spec!r} is no Hugging Face dataset (user/name) and no .parquet file that exists; other data "
            "are read from where they lie, leave --streaming out"
        )
    failed = f"{field}: {base!r} cannot be read as a Hugging Face dataset"
    datasets = _library(failed)
    try:
        size, origin = None, [_contents(file) for file in held]
        if files:
            from pyarrow import parquet  # comes with datasets

            size = sum(parquet.ParquetFile(file).metadata.num_rows for file in files)
            table = datasets.load_dataset("parquet", data_files=_named(files), split=part, streaming=True)
        elif held:
            table = datasets.load_dataset(str(path), split=part, streaming=True)
        else:
            from huggingface_hub import dataset_info

            commit = dataset_info(base).sha
            origin = [f"{base} {part} {commit}"]
            table = datasets.load_dataset(base, split=part, streaming=True, revision=commit)
        features = table.features or dict.fromkeys(next(iter(table), {}))
    except Exception as error:
        raise UserError(f"{failed}: {_one_line(error)}") from error
    if size is None and table.info.splits and part in table.info.splits:
        size = table.info.splits[part].num_examples or None
    columns = _image_columns(datasets, features) if field == "data" else (None, None, _text_columns(features))
    picture, label, texts = columns
    if not (picture if field == "data" else texts):
        columns_of = "an 'image'" if field == "data" else f"a {looked_for()}"
        raise UserError(f"{field}: {base!r} has the columns {list(features)}; give rows with {columns_of}")
    table = table.select_columns([column for column in (picture, label, *texts) if column])
    if columns[0]:
        table = _encoded_images(datasets, table, columns[0])
    return Stream(field, spec, table, columns, size, " ".join(origin))
