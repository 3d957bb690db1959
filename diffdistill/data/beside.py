"""What lies beside images and speaks of them: metadata files, and a text or JSON for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffdistill.data.files import walk
from diffdistill.data.texts import (
    CAPTION_SUFFIXES,
    caption_of,
    note,
    parquet_columns,
    printable,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
    read_text,
)
from diffdistill.errors import UserError

T = TypeVar("T")
#: What metadata call the file of a condition image, in small letters; `_file_name` may follow.
CONDITIONS = ("condition_image", "condition", "conditioning_image", "source_image", "input_image", "original_image")
_BESIDE = ".condition"
_TABLES = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
_READERS: dict[str, Callable[[Path, str], Sequence[tuple[int, Any]]]] = {
    **_TABLES,
    ".ndjson": read_jsonl,
    ".tsv": read_csv,
}


def metadata_of(root: Path) -> list[Path]:
    """The files that say which images a folder has."""
    found = [file for kind in _TABLES if (file := root / f"metadata{kind}").is_file()]
    return [file for file in found if file.suffix != ".parquet" or _lists_images(file)]


def _lists_images(parquet: Path) -> bool:
    """Whether it is a table of files, and not of images; where nobody can tell, whether images lie beside it."""
    columns = parquet_columns(parquet)
    return any(walk(parquet.parent)) if columns is None else "file_name" in columns


def read_metadata(
    path: Path,
    exists: Callable[[Path], bool] = os.path.isfile,
    listed: Callable[[Path], Iterable[str]] = walk,
    what: str = "images",
) -> tuple[list[str], list[str] | None, list[Any] | None]:
    """Files, captions and labels of an imagefolder's metadata (file_name, text or caption, label).

    `exists` says whether a sample is there, `listed` which there are in the folder, and `what` they are.
    """
    read: Callable[[Path, str], Sequence[tuple[int, Any]]] = _TABLES[path.suffix]
    rows, unit = read(path, "data"), "row" if path.suffix == ".parquet" else "line"
    form = "one JSON object a line" if path.suffix == ".jsonl" else "a column of that name"
    for number, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"data: {path}, {unit} {number} has no 'file_name'; give {form}")
        if not exists(path.parent / row["file_name"]):
            raise UserError(f"data: {path}, {unit} {number}: the file {row['file_name']!r} does not exist")
    named = {name for _, row in rows for name in (row["file_name"], *conditions_of(row))}
    others = set(listed(path.parent)) - {os.path.normpath(name) for name in named}
    if others and rows:
        here = f"{len(others)} {what} beside it are not in it and passed over"
        note(f"data: {printable(str(path))}: {here}, {printable(min(others))} the first")
    captions = [caption_of(row, f"data: {path}", f"{unit} {number}") for number, row in rows]
    labels, places = [row.get("label") for _, row in rows], [f"{path}, {unit} {number}" for number, _ in rows]
    return (
        [row["file_name"] for _, row in rows],
        all_or_none(captions, places, "caption ('text')"),
        all_or_none(labels, places, "label"),
    )


def conditions_of(row: Any) -> list[str]:
    """The files of the condition images that a row of metadata names: one, or a list of several."""
    fields = {str(name).lower().removesuffix("_file_name"): value for name, value in dict(row).items()}
    for value in (fields.get(name) for name in CONDITIONS):
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
        if names and all(isinstance(name, str) for name in names):
            return names
    return []


def names_conditions(path: Path) -> bool:
    """Whether the first row of a metadata file or of prompts names a condition image."""
    if path.suffix.lower() not in _READERS or not path.is_file():
        return False
    rows = _READERS[path.suffix.lower()](path, "data")
    return bool(rows) and isinstance(rows[0][1], dict) and bool(conditions_of(rows[0][1]))


def conditions_in(path: Path, field: str = "data") -> list[list[str]]:
    """The condition images of each row of a metadata file or of prompts.

    UserError if one is not named or there, or where a row has another number of them than the first: in a batch all
    have the same.
    """
    found: list[list[str]] = []
    unit = "row" if path.suffix == ".parquet" else "line"
    for number, row in _READERS[path.suffix.lower()](path, field):
        names = conditions_of(row) if isinstance(row, dict) else []
        if not names:
            raise UserError(
                f"{field}: {path}, {unit} {number} names no condition image, which this teacher reads; give one as "
                f"{CONDITIONS[0]!r}"
            )
        if found and len(names) != len(found[0]):
            raise UserError(
                f"{field}: {path}, {unit} {number} has {len(names)} condition images, and the first row has "
                f"{len(found[0])}; give all rows as many"
            )
        for name in names:
            if not os.path.isfile(path.parent / name):
                raise UserError(f"{field}: {path}, {unit} {number}: the condition image {name!r} does not exist")
        found.append(names)
    return found


def conditions_beside(root: Path, files: list[str]) -> tuple[list[str], list[list[str]]]:
    """Images, and the condition image of each: of `a.png` it is `a.condition.png`, or another kind of image.

    UserError for an image without one.
    """
    stems = {os.path.splitext(file)[0]: file for file in files}
    images = [file for file in files if not os.path.splitext(file)[0].lower().endswith(_BESIDE)]
    conditions = [stems.get(os.path.splitext(file)[0] + _BESIDE) for file in images]
    for image, condition in zip(images, conditions, strict=True):
        if condition is None:
            name = os.path.basename(os.path.splitext(image)[0])
            raise UserError(
                f"data: {root / image} has no condition image, which this teacher reads; put {name}{_BESIDE}.png "
                f"beside it, or name one in a metadata.jsonl as {CONDITIONS[0]!r}"
            )
    return images, [[condition] for condition in conditions if condition is not None]


def captions_beside(root: Path, files: list[str]) -> list[str] | None:
    """The captions of images, in files beside them: of `a.png` in `a.txt`, `A.TXT`, `a.png.txt` or `a.json`.

    None if not all images have one.
    """
    captions: list[str | None] = []
    named: dict[str, dict[str, str]] = {}  # the names of a folder's files, also by what they are in small letters
    for file in files:
        parent, _, image = file.rpartition("/")
        if parent not in named:
            held = os.listdir(root / parent)
            named[parent] = {name.lower(): name for name in held} | {name: name for name in held}
        captions.append(_caption_beside(root / parent, image, named[parent]))
        if len(captions) == 64 and not any(caption is not None for caption in captions):
            return None  # these are no captions: nothing more is looked for
    there = [caption for caption in captions if caption is not None]
    if there and len(there) < len(files):
        some = f"only {len(there)} of {len(files)} images have a caption beside them (.txt)"
        note(f"data: {printable(str(root))}: {some}, and none is read; give all of them one, or a metadata.jsonl")
    return there if there and len(there) == len(files) else None


def _caption_beside(folder: Path, image: str, named: dict[str, str]) -> str | None:
    for stem in (image.rpartition(".")[0], image):
        for suffix in (*CAPTION_SUFFIXES, ".json"):
            name = f"{stem}{suffix}"
            path = folder / named.get(name, named.get(name.lower(), ""))
            if path == folder or not path.is_file():
                continue
            if path.suffix.lower() != ".json":
                return read_text(path, "data").strip()
            row = read_json(read_text(path, "data"), f"data: {path}")
            if isinstance(row, dict) and (caption := caption_of(row, "data", str(path), "caption")) is not None:
                return caption
    return None


def all_or_none(values: list[T | None], names: list[str], what: str) -> list[T] | None:
    """The values, None if there are none; UserError if only some of the samples have one."""
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        missing = next(name for name, value in zip(names, values, strict=True) if value is None)
        raise UserError(f"data: {missing} has no {what}, which others have; give all of them one")
    return present or None
