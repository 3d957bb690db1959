"""metrics.jsonl: what a training logs, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffdistill.files import atomic_write, json_of


class MetricsFile:
    """metrics.jsonl, one object a line. On a resume, lines after the checkpoint are dropped first."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line, values in metrics_lines(path) if values["step"] <= step]
            atomic_write(path, b"".join(line + b"\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line of JSON."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def metrics_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl with their values; what a crash or an editor has made of a line is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            values = json_of(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values
