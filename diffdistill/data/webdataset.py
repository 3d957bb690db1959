"""WebDataset shards: .tar files in which the members of a sample follow one another and share a name.

Of `dir/0001.jpg`, `dir/0001.txt` and `dir/0001.json` the key is `dir/0001`. A sample is its image; its caption is the
`.txt`, or "caption", "text" or "prompt" of the `.json`; its class is the whole number in `.cls`. The archives are
indexed once and images are read from where they lie, so that any order costs the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import NamedTuple, TypeVar

from diffdistill.data.folder import IMAGE_SUFFIXES, Pictures, Source, class_numbers
from diffdistill.data.shards import hash_file
from diffdistill.errors import UserError

T = TypeVar("T")
_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
_ROW = re.compile(r"\{(\d+)\.\.(\d+)\}")


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


def named_shards(pattern: str) -> list[Path]:
    """The .tar files of `folder/*.tar`, sorted, or `folder/{00000..00003}.tar`, in that order.

    Empty if `pattern` is neither. Raises UserError if it names no file, or one of a row that is not there.
    """
    if not (pattern.endswith(".tar") and (glob.has_magic(pattern) or _ROW.search(pattern))):
        return []
    files = []
    for name in _counted(pattern):
        if glob.has_magic(name):
            files += [Path(file) for file in sorted(glob.glob(name, recursive=True))]
        elif Path(name).is_file():
            files.append(Path(name))
        else:
            raise UserError(f"data: {name}, which {pattern!r} names, does not exist; give a row of those that do")
    if not files:
        raise UserError(f"data: no file is called {pattern!r}; give the pattern of .tar files that exist")
    return files


def _counted(pattern: str) -> list[str]:
    """`{08..11}` is 08, 09, 10, 11, as in a shell: of one width where a number begins with 0."""
    row = _ROW.search(pattern)
    if row is None:
        return [pattern]
    padded = any(len(end) > 1 and end[0] == "0" for end in row.groups())
    width = max(map(len, row.groups())) if padded else 0
    numbers = range(int(row[1]), int(row[2]) + 1)
    rests = _counted(pattern[row.end() :])
    return [f"{pattern[: row.start()]}{number:0{width}d}{rest}" for number in numbers for rest in rests]


def open_shards(shards: list[Path], where: str) -> Pictures:
    """The samples with an image of .tar files, in the order in which they lie there; `where` is their name for people.

    The fingerprint is that of the files' names and bytes. Raises UserError for an archive that cannot be read or is
    cut short, for none with an image, for a caption that is no UTF-8 or a class that is no whole number, and where
    only some of the samples have one.
    """
    samples: list[tuple[str, dict[str, _Member]]] = []
    digest = hashlib.blake2b(digest_size=8)
    for shard in shards:
        samples += ((name, parts) for name, parts in _index(shard) if parts.keys() & _IMAGES)
        digest.update(f"{shard.name}\0{shard.stat().st_size}\n".encode())
        hash_file(digest, shard)
    if not samples:
        raise UserError(f"data: {where} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = [name for name, _ in samples]
    pictures = [next(parts[suffix] for suffix in parts if suffix in _IMAGES) for _, parts in samples]
    captions = _all_or_none([_caption(name, parts) for name, parts in samples], names, "caption (.txt or .json)")
    labels = _all_or_none([_label(name, parts) for name, parts in samples], names, "class (.cls)")
    classes, num_classes = class_numbers(labels, len(samples), where)

    def fetch(indices: list[int]) -> list[Source]:
        return [pictures[i].read() for i in indices]

    texts = None if captions is None else lambda indices: [captions[i] for i in indices]
    return Pictures(len(samples), fetch, names.__getitem__, classes, num_classes, texts, digest.hexdigest())


def _index(shard: Path) -> list[tuple[str, dict[str, _Member]]]:
    """Name and members, by suffix, of every sample."""
    samples: list[tuple[str, dict[str, _Member]]] = []
    try:
        # Only uncompressed ones can be read from the middle.
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, slash, last = member.name.rpartition("/")
                    key, _, suffix = last.partition(".")
                    name = f"{shard.name}:{folder}{slash}{key}"
                    if not samples or samples[-1][0] != name:
                        samples.append((name, {}))
                    samples[-1][1][suffix.lower()] = _Member(shard, member.offset_data, member.size)
            # A download that stops between two members, or a header that is damaged, looks like the end to tarfile.
            end = archive.offset
            file.seek(end)
            closed = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data: {shard} is no whole, uncompressed .tar archive ({error})") from None
    if not closed:
        raise UserError(f"data: {shard} is cut short or damaged at byte {end}; copy or download it again")
    return samples


def _all_or_none(values: list[T | None], names: list[str], what: str) -> list[T] | None:
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        raise UserError(f"data: {names[values.index(None)]} has no {what}, which others have; give all of them one")
    return present or None


def _label(name: str, parts: dict[str, _Member]) -> int | None:
    if "cls" not in parts:
        return None
    text = parts["cls"].read().strip()
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise UserError(f"data: the class of {name}.cls is {text[:40]!r}; write a whole number from 0")
    return int(text)


def _caption(name: str, parts: dict[str, _Member]) -> str | None:
    try:
        if "txt" in parts:
            return parts["txt"].read().decode().strip()
        row = json.loads(parts["json"].read()) if "json" in parts else {}
        return next((row[key] for key in ("caption", "text", "prompt") if isinstance(row.get(key), str)), None)
    except (ValueError, AttributeError) as error:
        raise UserError(f"data: the caption of {name} cannot be read ({error})") from None
