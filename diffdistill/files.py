"""Whole files or none: every artifact this package writes goes through `atomic_write`."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffdistill.errors import UserError


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
