"""Tables and JSON files of results."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.files import atomic_write


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """A Markdown table of the named columns, numbers to the right. A missing key or None is a dash."""
    cells = [[cell(row.get(c)).replace("|", "\\|").replace("\n", " ") for c in columns] for row in rows]
    rules = ["---:" if numeric(rows, c) else "---" for c in columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(columns), rules, *cells])


def text_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """The same table for a terminal: padded columns under a rule."""
    cells = [[cell(row.get(c)).replace("\n", " ") for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [numeric(rows, c) for c in columns]
    lines = [list(columns), ["-" * w for w in widths], *cells]
    return "".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip() + "\n"
        for line in lines
    )


def write_json(value: object, path: str | os.PathLike[str]) -> Path:
    """Raises ValueError on NaN or infinity, which JSON has no word for."""
    return atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """A text file, whole or not at all."""
    return atomic_write(path, text)


WRITTEN = ("<!-- written by the benchmark: begin -->", "<!-- written by the benchmark: end -->")
"""The marks in a page between which a benchmark writes."""


def write_between(page: Path, text: str, marks: tuple[str, str] = WRITTEN) -> None:
    """Puts a text between the marks of a page, in place of what stands there; UserError for a page without them."""
    begin, end = marks
    whole = page.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise UserError(f"docs: {page} has no lines '{begin}' and '{end}', between which the table goes")
    before, rest = whole.split(begin)
    write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", page)


def publish(rows: Sequence[Mapping[str, object]], columns: Sequence[str], out: str | None, data: str | None) -> None:
    """Print a benchmark's rows and where they were measured; write them, as Markdown to `out` and as JSON to `data`."""
    table, machine = markdown_table(rows, columns), environment()
    versions = f"torch {machine['torch']}, diffusers {machine['diffusers']}, {machine['commit']}"
    print(f"{table}\n{machine['gpu'] or machine['platform']}, {versions}")
    if out:
        write_text(table, out)
    if data:
        write_json({"rows": rows, "columns": columns, "environment": machine}, data)


def check_writable(folder: Path) -> None:
    """OSError now and not after the work, for a folder that nothing can be written to."""
    write_text("", folder / ".probe").unlink()


def with_notes(tables: Sequence[str], notes: Sequence[str]) -> str:
    """Markdown tables, and a list of notes below them."""
    return "\n".join(tables) + "\n" + "".join(f"- {line}\n" for line in notes)


def numeric(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    """Whether all that the rows have in a column are numbers, and they have any."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def cell(value: object) -> str:
    """Floats at four significant digits, or whole where that is more: 0.9950, 12.34, 50000."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 999.95 <= abs(value) < 1e9 else f"{value:#.4g}"
