"""WebDataset shards: .tar files in which the members of a sample share a name, and usually follow one another.

Of `dir/0001.jpg`, `dir/0001.txt` and `dir/0001.json` the key is `dir/0001`. A sample is its image; its caption is the
`.txt`, `.caption`, `.text` or `.prompt`, or that of the `.json`; its class is the whole number in `.cls`. The
archives are indexed once and images are read from where they lie, so that any order costs the same.
"""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from diffdistill.data.beside import all_or_none
from diffdistill.data.files import IMAGE_SUFFIXES, looks_whole
from diffdistill.data.folder import Pictures, Source, check_whole, class_numbers
from diffdistill.data.shards import hash_file
from diffdistill.data.texts import CAPTION_SUFFIXES, caption_of, note, printable, read_json, shortened
from diffdistill.errors import UserError, first_line

_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
_TEXTS = tuple(suffix.removeprefix(".") for suffix in CAPTION_SUFFIXES)
_KNOWN = {*_IMAGES, *_TEXTS, "json", "cls"}
_CONDITION = ".condition"
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
    return (
        [path]
        if path.is_file() and path.suffix.lower() == ".tar"
        else sorted(p for p in path.glob("*") if p.suffix.lower() == ".tar" and p.is_file())
    )


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


def open_shards(shards: list[Path], where: str, conditioned: bool = False) -> Pictures:
    """The samples with an image of .tar files, in the order in which they lie there; `where` is their name for people.

    The fingerprint is that of the files' names and bytes. `conditioned`: each sample has a condition image too, its
    `.condition.png` or another kind of image. Raises UserError for an archive that cannot be read or is
    cut short, for none with an image, for a caption that is no UTF-8 or a class that is no whole number, and where
    only some of the samples have one.
    """
    samples: list[tuple[str, dict[str, _Member]]] = []
    digest = hashlib.blake2b(digest_size=8)
    for shard in shards:
        held = _index(shard)
        with_image = [(name, parts) for name, parts in held if parts.keys() & _IMAGES]
        if not conditioned:
            _note_passed(shard, held)
        _check_images(shard, with_image)
        samples += with_image
        digest.update(os.fsencode(f"{shard.name}\0{shard.stat().st_size}\n"))
        hash_file(digest, shard)
    if not samples:
        raise UserError(f"data: {where} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = [name for name, _ in samples]
    pictures = [_image(parts) for _, parts in samples]
    captions = all_or_none([_caption(name, parts) for name, parts in samples], names, "caption (.txt or .json)")
    labels = all_or_none([_label(name, parts) for name, parts in samples], names, "class (.cls)")
    classes, num_classes = class_numbers(labels, len(samples), where)

    def fetch(indices: list[int]) -> list[Source]:
        return [pictures[i].read() for i in indices]

    texts = None if captions is None else lambda indices: [captions[i] for i in indices]
    found = Pictures(len(samples), fetch, names.__getitem__, classes, num_classes, texts, digest.hexdigest())
    if not conditioned:
        return found
    conditions = [_condition(name, parts) for name, parts in samples]
    return found._replace(
        conditions=lambda rows: [conditions[i].read() for i in rows],
        condition_title=lambda i: f"{names[i]}{_CONDITION}",
    )


def _index(shard: Path) -> list[tuple[str, dict[str, _Member]]]:
    """Name and members, by suffix, of every sample, in the order of their first members."""
    members: list[tuple[str, str, _Member]] = []
    places: dict[str, _Member] = {}
    links: list[tuple[int, str, str]] = []  # before which member, the link's name, and what it names
    try:
        # Only uncompressed ones can be read from the middle.
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = shard.stat().st_size
            for member in archive:
                if member.size < 0 or (member.isfile() and member.offset_data + member.size > size):
                    raise UserError(f"data: {shard} is cut short or damaged at byte {member.offset}; copy it again")
                if member.sparse is not None:
                    raise UserError(f"data: {shard} holds {member.name!r} as a sparse file; pack it without --sparse")
                folder, _, last = member.name.rpartition("/")
                if (member.islnk() or member.issym()) and not last.startswith("."):
                    target = member.linkname if member.islnk() else f"{folder}/{member.linkname}"
                    links.append((len(members) + len(links), member.name, target))
                if member.isfile() and not last.startswith("."):
                    places[posixpath.normpath(member.name)] = place = _Member(shard, member.offset_data, member.size)
                    members.append((folder, last, place))
            # A download that stops between two members, or a header that is damaged, looks like the end to tarfile.
            end = archive.offset
            file.seek(end)
            closed = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            more = closed and any(any(block) for block in iter(lambda: file.read(1 << 20), b""))
    except (tarfile.TarError, OSError, MemoryError, OverflowError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data: {shard} is no whole, uncompressed .tar archive ({first_line(error)})") from None
    if not closed:
        raise UserError(f"data: {shard} is cut short or damaged at byte {end}; copy or download it again")
    if more:
        raise UserError(f"data: {shard} goes on after its end at byte {end}; of archives that were joined, give each")
    for at, name, target in links:  # tar stores a file that it has met already as a link to that
        linked = places.get(posixpath.normpath(target).removeprefix("/"))
        folder, _, last = name.rpartition("/")
        if linked is not None:
            members.insert(at, (folder, last, linked))
        elif last.rpartition(".")[2].lower() in _KNOWN:
            raise UserError(f"data: {shard} holds {name!r} as a link to {target!r}; pack it with tar --dereference")
    return _grouped(shard, members)


def _grouped(shard: Path, members: list[tuple[str, str, _Member]]) -> list[tuple[str, dict[str, _Member]]]:
    """Members by the samples that they belong to: those of one name, wherever they lie in the archive."""
    plain = {
        (folder, last.partition(".")[0])
        for folder, last, _ in members
        if last.partition(".")[2].lower() in _IMAGES
    }  # fmt: skip
    samples: list[tuple[str, dict[str, _Member]]] = []
    latest: dict[str, dict[str, _Member]] = {}
    for folder, last, member in members:
        key, _, suffix = last.partition(".")
        # `v1.5-0.png` is an image called v1.5-0; but `a.seg.png` beside `a.png` is the part seg.png of a.
        if suffix.lower() not in _KNOWN and (folder, key) not in plain:
            stem, _, ending = last.rpartition(".")
            key, suffix = (stem, ending) if ending.lower() in _KNOWN else (key, suffix)
        name, suffix = f"{shard.name}:{folder}/{key}" if folder else f"{shard.name}:{key}", suffix.lower()
        again = suffix in latest.get(name, {}) and samples[-1][0] != name
        if name not in latest or again:  # shards that were joined may begin with the same names anew
            latest[name] = {}
            samples.append((name, latest[name]))
        latest[name][suffix] = member
    return samples


def _note_passed(shard: Path, samples: list[tuple[str, dict[str, _Member]]]) -> None:
    """Say which members that may be images are not read."""
    odd: list[str] = []
    for name, parts in samples:
        is_sample = bool(parts.keys() & _IMAGES)
        named = (f"{name}.{suffix}" for suffix in parts if suffix not in _IMAGES)
        odd += (n for n in named if Path(n).suffix.lower() in IMAGE_SUFFIXES or not is_sample)
    if odd:
        note(f"data: {printable(str(shard))}: {len(odd)} members are passed over, {printable(odd[0])} the first")


def _check_images(shard: Path, samples: list[tuple[str, dict[str, _Member]]]) -> None:
    """UserError for an image that is cut short."""
    with open(shard, "rb") as file:
        for name, parts in samples:
            member = _image(parts)
            file.seek(member.offset)
            head = file.read(min(16, member.size))
            file.seek(member.offset + max(0, member.size - 64))
            if not looks_whole(head, file.read(min(64, member.size)), member.size):
                check_whole(member.read(), name)


def _image(parts: dict[str, _Member]) -> _Member:
    return next(parts[suffix] for suffix in parts if suffix in _IMAGES)


def _condition(name: str, parts: dict[str, _Member]) -> _Member:
    found = next((parts[f"{_CONDITION[1:]}.{kind}"] for kind in _IMAGES if f"{_CONDITION[1:]}.{kind}" in parts), None)
    if found is None:
        raise UserError(f"data: {name} has no condition image, which this teacher reads; add a {_CONDITION}.png to it")
    return found


def _label(name: str, parts: dict[str, _Member]) -> int | None:
    if "cls" not in parts:
        return None
    text = parts["cls"].read().strip()
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise UserError(f"data: the class of {name}.cls is {text[:40]!r}; write a whole number from 0")
    return int(text)


def _caption(name: str, parts: dict[str, _Member]) -> str | None:
    found = None
    for suffix in _TEXTS:
        if suffix in parts:
            try:
                found = parts[suffix].read().decode().removeprefix("\ufeff").strip()
            except ValueError as error:
                raise UserError(f"data: the caption of {name} cannot be read ({error})") from None
            if found:
                return found
    if "json" not in parts:
        return found
    row = read_json(parts["json"].read(), f"data: the caption of {name} cannot be read, its .json")
    if not isinstance(row, dict):
        raise UserError(f"data: the caption of {name} cannot be read, its .json is {shortened(row)} and no object")
    in_json = caption_of(row, f"data: {name.partition(':')[0]}", f"{name}.json", "caption")
    return found if in_json is None else in_json
