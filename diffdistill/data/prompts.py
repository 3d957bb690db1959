"""Prompts that users give: files of texts and tables, and data sets with captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffdistill.data.hub import open_texts, parquet_files
from diffdistill.data.texts import (
    NAMES,
    caption_of,
    looked_for,
    note,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    shortened,
)
from diffdistill.errors import UserError

_TEXTS, _LINES, _TABLES = {".txt"}, {".jsonl", ".ndjson"}, {".csv", ".tsv"}
SUFFIXES = {*_TEXTS, *_LINES, *_TABLES, ".json"}


def all_prompts(spec: str, keep_blank: bool = False) -> list[str]:
    """The prompts of a file or data set; `keep_blank` as in `read_prompts`."""
    base, _, split = spec.partition("#")
    path, held = Path(spec).expanduser(), Path(base).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return read_prompts(path, keep_blank)
    if held.exists() or parquet_files(held):
        return open_texts(str(held), split or None)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        return open_texts(base, split or None)
    known = f"a {' '.join(sorted(SUFFIXES))} or .parquet file, a save_to_disk folder or a Hugging Face dataset"
    raise UserError(f"prompts: {spec!r} is of no known kind; give {known}")


def read_prompts(path: Path, keep_blank: bool = False) -> list[str]:
    """The prompts of a file, in its order; UserError if it holds none.

    A .txt has one on each line. Each row of a .jsonl, a table (.csv, .tsv) or a .json has a caption under a usual name;
    rows of JSON may also be texts. A .json holds a list of rows, or a mapping, of a name such as 'prompts' to a list or
    of keys to rows. Blank lines of a .txt are passed over, or with `keep_blank` are empty prompts (but those at its
    end), so that line i stays the prompt of image i.
    """
    kind, source = path.suffix.lower(), f"prompts: {path}"
    if kind in _TEXTS:
        prompts = _lines(path, source, keep_blank)
    elif kind in _TABLES:
        prompts = [_prompt(row, source, f"line {number}") for number, row in read_csv(path, "prompts")]
    elif kind == ".json":
        prompts = [
            _prompt(row, source, place) for place, row in _rows(read_json(read_text(path, "prompts"), source), source)
        ]
    else:
        prompts = [_prompt(row, source, f"line {number}") for number, row in read_jsonl(path, "prompts")]
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompt; write one on each line")
    return prompts


def _lines(path: Path, source: str, keep_blank: bool) -> list[str]:
    lines = [line.strip() for line in read_lines(path, "prompts")]
    while lines and not lines[-1]:
        lines.pop()
    if keep_blank and "" in lines:
        note(f"{source}: line {lines.index('') + 1} is blank: image {lines.index('') + 1} has an empty caption")
    return [line for line in lines if line or keep_blank]


def _rows(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """Places and rows of a JSON value; UserError where it is neither a list nor a mapping of them."""
    if _is_row(value) and any(isinstance(value[name], str) for name in value if name.lower() in NAMES):
        value = [value]
    if isinstance(value, dict):
        lists = [held for name, held in value.items() if name.lower() in NAMES and isinstance(held, list)]
        if not lists and not all(isinstance(row, dict) for row in value.values()):
            lists = [held for held in value.values() if isinstance(held, list) and any(map(_is_row, held))]
        if len(lists) > 1:
            raise UserError(f"{source} holds several lists; give one list of prompts")
        value = lists[0] if lists else value
    if isinstance(value, dict):
        return ((f"entry {shortened(name)}", row) for name, row in value.items())
    if not isinstance(value, list):
        raise UserError(f"{source} holds {shortened(value)}; give a list of prompts")
    return ((f"entry {i}", row) for i, row in enumerate(value, 1))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and any(str(name).lower() in NAMES for name in value)


def _prompt(row: Any, source: str, place: str) -> str:
    held = {"prompt": row} if isinstance(row, str) else row
    text = caption_of(held, source, place, "prompt") if isinstance(held, dict) else None
    if text is None:
        path = source.removeprefix("prompts: ")
        raise UserError(f"prompts: {place} of {path} is no text, nor an object with a text called {looked_for()}")
    return text
