"""A protocol of sixty digits, and what tests of evaluation read of its results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

PROTOCOL = {
    "title": "sixty digits", "conditions": ["classes", "none"], "classes": 10, "labels": "reference", "count": 60,
    "resolution": 8, "channels": 1, "reference": "digits", "batch": 10, "shard": 20,
    "metrics": [
        {"name": "frechet distance", "kind": "frechet", "measure": "digits"},
        {"name": "kernel distance", "kind": "kernel", "measure": "digits"},
        {"name": "precision_recall", "kind": "precision_recall", "measure": "digits"},
        {"name": "agreement %", "kind": "mean", "measure": "digits", "column": "agrees", "scale": 100},
    ],
}  # fmt: skip
Run = Callable[..., dict[str, Any]]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("measured/*.safetensors"))}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("rows", "reference", "metrics", "count", "seed")}


def pictures(folder: Path, *kinds: tuple[str, int], count: int = 20) -> Path:
    folder.mkdir()
    for i in range(count):
        mode, side = kinds[i % len(kinds)]
        Image.new(mode, (side, side)).save(folder / f"{i:03d}.png")
    return folder
