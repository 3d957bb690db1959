"""Texts that users give: lines, JSON, CSV and the one reader of captions, whatever they come in."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffdistill.environment import is_first_process
from diffdistill.errors import UserError, first_line

#: What a caption is called, in small letters; of several the first that is not empty counts.
NAMES = ("text", "caption", "prompt", "txt", "texts", "captions", "prompts")

CAPTION_SUFFIXES = (".txt", ".caption", ".text", ".prompt")  #: of files that are captions, beside images or in archives


@lru_cache(maxsize=1024)
def note(message: str) -> None:
    """Say on standard error what was done with an input that could be meant otherwise: once, and by one process."""
    if is_first_process():
        print(f"note: {message}", file=sys.stderr)


def shortened(value: object, most: int = 60) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 2]}.."


def printable(name: str) -> str:
    """The name of a file as UTF-8 can write it: bytes of it that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_text(path: Path, field: str) -> str:
    """A text without a byte order mark; UserError, which begins with the user's `field`, if it is no UTF-8."""
    if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
        raise UserError(f"{field}: {path} is no file that can be read; give one")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror})") from None
    # Not the codec utf-8-sig, which does not count the mark's bytes.
    return text.removeprefix("\ufeff")


def read_lines(path: Path, field: str) -> list[str]:
    """The lines of `read_text`."""
    # Not splitlines, which cuts at U+2028 too.
    return read_text(path, field).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; UserError, which begins with `where`, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None


def read_jsonl(path: Path, field: str) -> list[tuple[int, Any]]:
    """Line numbers and values of JSON lines; blank ones are passed over."""
    lines = [(number, line) for number, line in enumerate(read_lines(path, field), 1) if line.strip()]
    return [(number, read_json(line, f"{field}: {path}, line {number}")) for number, line in lines]


def read_csv(path: Path, field: str) -> list[tuple[int, dict[str, str | None]]]:
    """Line numbers and rows of a table whose first line names its columns; an empty cell is None."""
    text = read_text(path, field)
    head = text.partition("\n")[0]
    delimiter = next((d for d in "\t;" if d in head and "," not in head), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="")
    rows: list[tuple[int, dict[str, str | None]]] = []
    try:
        for row in reader:
            if row.pop("", None):
                more = f"has more cells than the first line has columns; put texts with a {delimiter!r} in quotes"
                raise UserError(f"{field}: {path}, line {reader.line_num} {more}")
            rows.append((reader.line_num, {name.strip(): cell or None for name, cell in row.items()}))
    except csv.Error as error:
        raise UserError(f"{field}: {path}, line {reader.line_num} is no line of a table ({error})") from None
    return rows


def read_parquet(path: Path, field: str) -> list[tuple[int, dict[str, Any]]]:
    """Numbers, from 0, and rows of a .parquet table."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{field}: {path} cannot be read: that needs pip install 'diffdistill[datasets]'") from None
    try:
        return list(enumerate(parquet.read_table(path).to_pylist()))
    except Exception as error:  # the library raises what its file layers do
        raise UserError(f"{field}: {path} cannot be read ({first_line(error)})") from None


def parquet_columns(path: Path) -> list[str] | None:
    """The names of a .parquet table's columns; None where they cannot be read."""
    try:
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    except Exception:  # it is not installed, or the file is damaged: who reads the rows says so
        return None


def caption_of(row: Mapping[str, Any], source: str, place: str, first: str = "text") -> str | None:
    """The caption among a row's fields, None if it has none; `source` and `place` name the row in messages.

    Fields are told by NAMES, `first` before the others. Null is no caption, an empty text is one if no other field has
    more, and of a list the first text is taken, with a note. Raises UserError for a value that is no text.
    """
    fields: dict[str, Any] = {}
    for name, value in row.items():
        fields.setdefault(str(name).lower(), value)
    found = None
    for name in sorted(NAMES, key=lambda name: name != first):
        value = fields.get(name)
        if isinstance(value, (list, tuple)) and all(isinstance(each, str) or each is None for each in value):
            note(f"{source}: {name!r} is a list of captions; the first of each is taken")
            texts = [each for each in value if each is not None]
            value = next((each for each in texts if each.strip()), texts[0] if texts else None)
        if value is None:
            continue
        if not isinstance(value, str):
            right = "a caption is a text, or a list of texts"
            raise UserError(f"{source}, {place}: {name!r} is {shortened(value)}; {right}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            half = "holds half of a character (a lone surrogate); write the whole one"
            raise UserError(f"{source}, {place}: {name!r} {half}")
        if value.strip():
            return value
        found = value if found is None else found
    return found


def looked_for() -> str:
    """The names of captions, for messages."""
    return "'prompt', 'caption' or 'text'"
