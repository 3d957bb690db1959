"""Data sets that Hugging Face's `datasets` reads: by their id, from parquet files, or as save_to_disk left them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .data_folder import Pictures, Source, class_numbers, content, naming_image
from .errors import UserError


def is_saved(path: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def _load(source: str, split: str | None, failed: str) -> tuple[Any, Any]:
    """The library, and the table of that source; UserError, which begins with `failed`, where it cannot be read."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{failed}: that needs pip install 'diffdistill[datasets]'") from error
    part = split or "train"
    try:
        if is_saved(Path(source)):
            table = datasets.load_from_disk(source)
            splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
            if part not in splits and (split or len(splits) > 1):
                raise ValueError(f"it has no split {part!r}, but {sorted(splits)}")
            table = splits.get(part) or next(iter(splits.values()))
        elif source.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files=source, split=part)
        else:
            table = datasets.load_dataset(source, split=part)
    except Exception as error:  # the library passes on what its network and file layers raise
        why = " ".join(str(error).split())
        raise UserError(f"{failed}: {why}") from error
    return datasets, table


def open_texts(source: str, split: str | None) -> list[str]:
    """The column prompt, caption or text of such a data set."""
    _, table = _load(source, split, f"prompts: {source!r} cannot be read as a Hugging Face dataset")
    column = next((name for name in ("prompt", "caption", "text") if name in table.features), None)
    if column is None or not len(table):
        held = f"{len(table)} rows with the columns {list(table.features)}"
        raise UserError(f"prompts: {source!r} has {held}; give at least one row, with a 'prompt', 'caption' or 'text'")
    return [text or "" for text in table.with_format(None).select_columns([column])[:][column]]


def open_hub(source: str, split: str | None, doubt: str = "") -> Pictures:
    """An id, a .parquet file or a folder on this machine; `doubt` opens the message where it cannot be read.

    The images are the column image, img or pixel_values, else the first of type Image; the labels label or
    labels; the captions text or caption.
    """
    datasets, table = _load(source, split, f"data: {source!r} {doubt}cannot be read as a Hugging Face dataset")
    table, features = table.with_format(None), table.features  # a saved format would turn images into tensors
    pictures = [c for c in ("image", "img", "pixel_values") if c in features]
    pictures += [c for c in features if isinstance(features[c], datasets.Image)]
    if not pictures or not len(table):
        rows = f"{len(table)} rows with the columns {list(features)}"
        raise UserError(f"data: {source!r} has {rows}; give at least one row, with an 'image'")
    picture = pictures[0]
    scalar = [c for c in features if isinstance(features[c], (datasets.Value, datasets.ClassLabel))]
    label = next((c for c in ("label", "labels") if c in scalar), None)
    caption = next((c for c in ("text", "caption") if c in scalar and "string" in features[c].dtype), None)
    encoded = table.select_columns([picture])
    if isinstance(features[picture], datasets.Image):  # decoded here, so that a bad image can be named
        encoded = encoded.cast_column(picture, datasets.Image(decode=False))

    def fetch(indices: list[int]) -> list[Source]:
        return [v["bytes"] or v["path"] if isinstance(v, dict) else v for v in encoded[indices][picture]]

    def title(i: int) -> str:
        return f"{source}, row {i}"

    def texts(indices: list[int]) -> list[str]:
        return [text or "" for text in table.select_columns([caption])[indices][caption]]

    labels = table.select_columns([label])[:][label] if label else None
    classes, num_classes = class_numbers(labels, len(table), f"{source!r}")
    if label and isinstance(features[label], datasets.ClassLabel):
        num_classes = len(features[label].names or []) or num_classes
    # The library's own fingerprint depends on where the data lies.
    digest = hashlib.blake2b(f"{len(table)} {list(features)} {labels}".encode(), digest_size=8)
    some = sorted({i * len(table) // 64 for i in range(64)})
    for i, value in zip(some, fetch(some), strict=True):
        with naming_image(title(i)):
            found = content(value)
        digest.update(found if isinstance(found, bytes) else str(found).encode())
    digest.update(str(texts(some) if caption else None).encode())
    return Pictures(len(table), fetch, title, classes, num_classes, texts if caption else None, digest.hexdigest())
