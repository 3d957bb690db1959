"""Whole files or none: every artifact this package writes goes through `atomic_write`. And records, which are JSON
and YAML from a folder that anyone may have edited or a disk may have damaged, read within bounds.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffdistill.errors import UserError, first_line, shown


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8, lone surrogates escaped) so that a reader sees the old file or the whole new one.

    Missing parent folders are made. Returns the path. Raises OSError if the folder cannot be
    written; what was at `path` is then untouched and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private (mode 0600), and the rename would keep that.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            # Names of files that are no UTF-8 are surrogates in Python.
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash after the rename can leave an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def atomic_folder(final: Path, marker: str) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `final` when the block ends well, and is removed if not.

    A folder that is there already is replaced if it is empty or one of ours, which hold a file called `marker`;
    UserError for any other.
    """
    if final.exists() and not (final.is_dir() and ((final / marker).is_file() or not any(final.iterdir()))):
        raise UserError(
            f"out: {str(final)!r} exists and is not a folder with {marker}; choose another, to lose nothing"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    mode = partial.stat().st_mode & 0o666
    try:
        yield partial
        for path in partial.rglob("*.safetensors"):
            if path.stat().st_nlink == 1:  # a linked file is its owner's too
                path.chmod(mode)  # safetensors makes its files private, whatever the umask
        for path in [*partial.rglob("*"), partial]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if final.exists():
            replaced = final.parent / f".{final.name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            partial.rename(final)
    except SafetensorError as error:  # its I/O errors are no OSErrors
        raise OSError(f"{final} cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_folder() -> Path:
    """Where references, and teachers that are single files, are kept: $DIFFDISTILL_CACHE, else ~/.cache/diffdistill."""
    return Path(os.environ.get("DIFFDISTILL_CACHE", Path.home() / ".cache" / "diffdistill"))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


# -- records -----------------------------------------------------------------------------------------------

_YAML_BYTES, _YAML_NODES, _YAML_DEPTH = 1 << 17, 10_000, 40


def json_of(text: str | bytes) -> Any:
    """The JSON value of a text; ValueError for whatever is none, also one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; OSError or ValueError, which says what is wrong, for anything else."""
    values = json_of(path.read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"it holds {shown(values)} and no JSON object")
    return values


def yaml_mapping(path: str) -> dict[str, Any]:
    """The mapping of texts to values that a YAML file holds.

    Raises OSError where it cannot be read, and ValueError, which says what is wrong, for a file that is no YAML, no
    such mapping, larger than 128 KiB, nested too deeply, or large once its aliases are written out; for a key that
    stands twice; and for a value that its own tag or form does not allow.
    """
    with open(path, "rb") as file:
        return yaml_of(file.read(_YAML_BYTES + 1))


def yaml_of(data: bytes) -> dict[str, Any]:
    """The mapping of texts to values that a YAML text holds; ValueError as of `yaml_mapping`."""
    import yaml

    if len(data) > _YAML_BYTES:
        raise ValueError(f"it is larger than {_YAML_BYTES >> 10} KiB")
    try:
        loader = yaml.SafeLoader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("it is not a mapping of names to values")
            _check_bounds(node, {}, 0)
            _check_keys(node)
            loader.flatten_mapping(node)
            return {str(key.value): _constructed(loader, key, value) for key, value in node.value}
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not YAML ({' '.join(str(error).split())})") from None


def _check_bounds(node: Any, sizes: dict[int, int], depth: int) -> int:
    """How many nodes there are once aliases are written out; ValueError for too many, or too deep ones."""
    if id(node) in sizes:
        return sizes[id(node)]
    if depth > _YAML_DEPTH:
        raise ValueError(f"it is nested more than {_YAML_DEPTH} deep")
    size = 1
    if isinstance(node.value, str):
        try:
            whole = b"\0" not in os.fsencode(node.value)  # surrogates stand for the bytes of a path that is not UTF-8
        except UnicodeEncodeError:
            whole = False
        if not whole:
            raise ValueError(f"line {node.start_mark.line + 1}: {shown(node.value)} is no text")
    else:
        for part in node.value:
            members = part if isinstance(part, tuple) else (part,)
            size += sum(_check_bounds(member, sizes, depth + 1) for member in members)
    if size > _YAML_NODES:
        raise ValueError(f"it holds more than {_YAML_NODES} values once its aliases are written out")
    sizes[id(node)] = size
    return size


def _check_keys(node: Any) -> None:
    """ValueError for a key that is no text, or that stands twice."""
    seen = set()
    for key, _ in node.value:
        where = f"line {key.start_mark.line + 1}"
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ValueError(f"it is not a mapping of names to values: {where}: a name is no text")
        if key.value in seen:
            raise ValueError(f"{where}: {shown(key.value)} stands twice")
        seen.add(key.value)


def _constructed(loader: Any, key: Any, value: Any) -> Any:
    if key.tag != "tag:yaml.org,2002:str":  # of a mapping that was merged
        raise ValueError("it is not a mapping of names to values")
    try:
        constructed = loader.construct_object(value, deep=True)
        repr(constructed)  # of a number with thousands of digits, which has no decimal form, ValueError
        return constructed
    except Exception as error:  # PyYAML's constructors raise whatever Python raises: a month 13, a bool of 'x'
        line, reason = value.start_mark.line + 1, " ".join(str(error).split())
        raise ValueError(
            f"line {line}: the value of {shown(key.value)} is none ({first_line(ValueError(reason))})"
        ) from None
