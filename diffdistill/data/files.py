"""Image files of a folder: which there are, and whether they can be read before a training begins."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import PngImagePlugin

from diffdistill.data.texts import note, printable
from diffdistill.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_NO_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".md", ".db", ".ini", ".html", ".xml", ".py", ".yaml", ".yml"}
_NO_IMAGES |= {".caption", ".text", ".npz", ".safetensors", ".parquet", ".tar", ".log", ".arrow"}
_MOST_VISITS = 100  # of one folder, by way of links
_TAIL = 64  # bytes, in which an image file must show its end
_JPEG, _LEAST_JPEG = b"\xff\xd8", 100  # its first bytes, and bytes that any has


def walk(root: Path, passed: Counter[str] | None = None) -> Iterator[str]:
    """The image files below a folder, relative to it; links to folders are followed, hidden names passed over.

    `passed` counts, by suffix, the other files. A link to a folder that holds the link is passed over with a note.
    Raises UserError for a folder that cannot be read, and where links lead to one folder again and again.
    """
    chains: dict[str, tuple[str, ...]] = {
        str(root): (os.path.realpath(root),)
    }  # of a folder, where it and those above it really lie
    visits: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise UserError(f"data: the folder {error.filename} cannot be read ({error.strerror})") from None

    # Not rglob: before Python 3.13 it does not enter linked folders, of which subsets are often made.
    for folder, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        chain = chains.pop(folder)
        inner[:] = [name for name in inner if not name.startswith(".") and not _leads_back(folder, name, chain)]
        for name in inner:
            path = os.path.join(folder, name)
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(chain[-1], name)
            chains[path] = (*chain, real)
            visits[real] += 1
            if visits[real] > _MOST_VISITS:
                raise UserError(f"data: {root} holds links that lead to {real} again and again; remove some")
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                yield (Path(folder) / name).relative_to(root).as_posix()
            elif passed is not None:
                passed[suffix] += 1


def _leads_back(folder: str, name: str, chain: tuple[str, ...]) -> bool:
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), "")
    back = any(os.path.join(real, "").startswith(target) for real in chain)
    if back:
        note(f"data: {printable(path)} is a link to a folder that holds it, and is passed over")
    return back


def note_passed(root: Path, passed: Counter[str]) -> None:
    """Say which files are read as no images, if they may be some."""
    odd = {suffix: count for suffix, count in sorted(passed.items()) if suffix not in _NO_IMAGES}
    if odd:
        counts = ", ".join(f"{n} {printable(suffix) or 'without a suffix'}" for suffix, n in list(odd.items())[:5])
        read = " ".join(sorted(IMAGE_SUFFIXES))
        note(f"data: {printable(str(root))}: files are passed over ({counts}); images are {read}")


def ends_of(path: Path) -> tuple[int, bytes, bool]:
    """A file's size, its last bytes, and whether these show the end of an image; UserError unless it is a file."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"data: {path} is no file (a pipe, a device or a folder); remove it")
        with open(path, "rb") as file:
            head = file.read(16)
            file.seek(max(0, state.st_size - _TAIL))
            tail = file.read(_TAIL)
        return state.st_size, tail, looks_whole(head, tail, state.st_size)
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise UserError(f"data: {path} is a link that leads nowhere ({os.readlink(path)})") from None
        raise UserError(f"data: {path} cannot be read ({error.strerror})") from None


def looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file's last bytes are those of a whole image: what is not must be decoded to know."""
    if head.startswith(_JPEG):
        return b"\xff\xd9" in tail and size > _LEAST_JPEG
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"RIFF") and len(head) >= 8:
        return size >= struct.unpack("<I", head[4:8])[0] + 8 and any(tail)
    if head.startswith(b"BM") and len(head) >= 6:
        return size >= struct.unpack("<I", head[2:6])[0]
    return False


def is_cut_short(data: bytes) -> bool:
    """Whether an image lacks its end although decoders take it: zeros, with which downloads begin, are pixels too."""
    if data.startswith(_JPEG):  # the end's marker cannot occur among coded pixels, which the other one opens
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith(b"RIFF") and not any(data[-_TAIL:])


def without_large_texts(data: bytes) -> bytes | None:
    """A PNG without the texts and colour profile that are larger than Pillow takes; None if it has none such."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, at, total = [data[:8]], 8, 0
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        expanded = _expanded(kind, data[at + 8 : end - 4])
        total += expanded
        if expanded <= PngImagePlugin.MAX_TEXT_CHUNK and total <= PngImagePlugin.MAX_TEXT_MEMORY:
            kept.append(data[at:end])
        else:
            total -= expanded
        at = end
    slim = b"".join(kept)
    return slim if len(slim) < at and len(slim) < len(data) else None


def _expanded(kind: bytes, body: bytes) -> int:
    """Bytes of a chunk of text or of a colour profile when it is expanded, or more than Pillow takes; else 0."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
        return 0
    start = body.find(b"\0") + 2
    if kind == b"iTXt" and body[start - 1 : start] == b"\1":  # keyword 0 flag method language 0 translated 0 text
        start = body.find(b"\0", body.find(b"\0", start + 1) + 1) + 1
    elif kind in (b"tEXt", b"iTXt"):
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(body[start:], PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return 0
