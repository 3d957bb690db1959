"""One trainer to a run folder: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffdistill.environment import is_first_process
from diffdistill.errors import UserError, one_line, shown
from diffdistill.files import json_of

FILE = ".lock"
"""The locked file, which says who holds it. One that is left by a process that was killed is no obstacle."""

_held: set[int] = set()  # descriptors of this process


def _close_in_child() -> None:
    # A child that outlives the training, a worker of somebody's data say, would hold the lock on.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def only_trainer(run: Path, field: str) -> Iterator[None]:
    """The folder, which is made if need be, is this process's to train in; it goes again if nothing is put into it.

    UserError of `field` where another process has it, or where it cannot be made. Of several processes that train
    together the first has the lock. Where a file system has no locks a note says so.
    """
    if not is_first_process():
        yield
        return
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    descriptor = _locked(run, field)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (run / FILE).unlink(missing_ok=True)  # while it is locked
            _held.discard(descriptor)
            os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _locked(run: Path, field: str) -> int | None:
    """The descriptor of the locked file; None where there is none to be had."""
    path = run / FILE
    while True:
        try:
            run.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{field}: cannot write to {str(run)!r} ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{field}: {shown(str(run))} is being trained by {holder}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            os.close(descriptor)
            note = f"note: {shown(str(run))} cannot be locked here ({error.strerror}): let no second process train it"
            print(one_line(note), file=sys.stderr)
            return None
        if _is_still_there(path, descriptor):
            break
        os.close(descriptor)  # its holder has just removed it
    _held.add(descriptor)
    with suppress(OSError):  # a full disk, which holds nobody's lock up
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n", 0)
    return descriptor


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """The process that has the lock, as the file names it."""
    try:
        record = json_of(os.pread(descriptor, 1000, 0))
        return f"process {int(record['pid'])} on {shown(record['host'])}"
    except (ValueError, TypeError, KeyError):  # it has not yet been written
        return "another process"


def trainer_of(run: Path) -> str | None:
    """The process that trains a run, as its lock says; None where there is none, as far as can be seen from here."""
    try:
        record = json_of((run / FILE).read_bytes())
        pid, host = int(record["pid"]), str(record["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # another user's
            pass
    return f"process {pid} on {one_line(host, 80)}"
