"""A teacher's files while it is trained with: whoever writes into them is noticed at the next checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from diffdistill.data.pairs import weights_fingerprint
from diffdistill.errors import UserError, one_line, shown
from diffdistill.players.teacher import Teacher


def teacher_check(teacher: Teacher, fingerprint: str | None) -> Callable[[], None]:
    """A function to call before each checkpoint: it warns of files of the teacher's folder that are others than now.

    UserError where the weights in memory are others too than those of the fingerprint, since files may be mapped into
    memory (None: none are). Only then all weights are read; else files are looked at by size and time. Hub caches are
    left alone.
    """
    folder = Path(teacher.source)
    last = _state(folder)

    def check() -> None:
        nonlocal last
        now = _state(folder)
        if now == last:
            return
        name = min(path for path in {*now, *last} if now.get(path) != last.get(path))
        last = now
        what = f"{name} {'has changed' if name in now else 'is gone'} since the training began"
        if fingerprint is not None and weights_fingerprint(teacher) != fingerprint:
            raise UserError(
                f"teacher: {shown(str(folder))}: {what}, and with it the weights in memory; this step is not kept: put "
                "the file back and resume"
            )
        warning = f"warning: teacher: {shown(str(folder))}: {what}; this training goes on with what it has loaded"
        print(one_line(f"{warning}, a resumed one will refuse other weights: put the file back"), file=sys.stderr)

    return check


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files of a folder; none of what is no folder."""
    state = {}
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            stat = path.stat()
        except OSError:  # it went while the folder was read
            continue
        if path.is_file():
            state[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return state
