"""WebDataset shards: .tar files in which the members of a sample follow one another and share a name.

Of `dir/0001.jpg`, `dir/0001.txt` and `dir/0001.json` the key is `dir/0001`. A sample is its image; its caption is the
`.txt`, or "caption", "text" or "prompt" of the `.json`; its class is the whole number in `.cls`. The archives are
indexed once and images are read from where they lie, so that any order costs the same.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from .data_folder import IMAGE_SUFFIXES, Pictures, Source, class_numbers
from .errors import UserError


class _Member(NamedTuple):
    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def shards_of(path: Path) -> list[Path]:
    """The .tar files that `path` is or holds, in sorted order."""
    return [path] if path.is_file() and path.suffix == ".tar" else sorted(path.glob("*.tar"))


def open_shards(path: Path) -> Pictures:
    """The samples with an image of one .tar or a folder of them, in the order in which they lie there.

    Raises UserError for an archive that cannot be read, one of none with an image, and a caption that is no UTF-8.
    """
    samples: list[tuple[str, dict[str, _Member]]] = []
    for shard in shards_of(path):
        try:
            with tarfile.open(shard, "r:") as archive:  # only uncompressed ones can be read from the middle
                for member in archive:
                    if member.isfile():
                        folder, _, file = member.name.rpartition("/")
                        key, _, suffix = file.partition(".")
                        name = f"{shard.name}:{folder}/{key}"
                        if not samples or samples[-1][0] != name:
                            samples.append((name, {}))
                        samples[-1][1][suffix.lower()] = _Member(shard, member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"data: {shard} is no uncompressed .tar archive ({error})") from None
    images = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
    samples = [(name, parts) for name, parts in samples if parts.keys() & images]
    if not samples:
        raise UserError(f"data: {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    pictures = [next(parts[suffix] for suffix in parts if suffix in images) for _, parts in samples]
    captions = [_caption(name, parts) for name, parts in samples]
    labels = [int(parts["cls"].read()) if "cls" in parts else None for _, parts in samples]
    digest = hashlib.blake2b(digest_size=8)
    for (name, _), picture, caption in zip(samples, pictures, captions, strict=True):
        digest.update(f"{name}\0{picture.size}\0{caption}\n".encode())

    def fetch(indices: list[int]) -> list[Source]:
        return [pictures[i].read() for i in indices]

    def texts(indices: list[int]) -> list[str]:
        return [captions[i] or "" for i in indices]

    whole: list[Any] | None = labels if all(label is not None for label in labels) else None
    classes, num_classes = class_numbers(whole, len(samples), str(path))
    told = texts if any(caption is not None for caption in captions) else None
    return Pictures(len(samples), fetch, lambda i: samples[i][0], classes, num_classes, told, digest.hexdigest())


def _caption(name: str, parts: dict[str, _Member]) -> str | None:
    try:
        if "txt" in parts:
            return parts["txt"].read().decode().strip()
        row = json.loads(parts["json"].read()) if "json" in parts else {}
        return next((row[key] for key in ("caption", "text", "prompt") if isinstance(row.get(key), str)), None)
    except (ValueError, AttributeError) as error:
        raise UserError(f"data: the caption of {name} cannot be read ({error})") from None
