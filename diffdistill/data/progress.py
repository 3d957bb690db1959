"""Long work says where it is: a bar on a terminal, and lines in a log.

A log has a line at each tenth of the work, and where that is slow one after `FIRST` seconds, and then whenever a tenth
of the time so far has passed: some seventy lines in ten hours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

FIRST = 15.0
"""Seconds without a line after which there is one."""

T = TypeVar("T", bound=object)


def _long(now: float, said: float, began: float) -> bool:
    """Whether nothing was said for long: `FIRST` seconds, and a tenth of the time so far."""
    return now - said >= max(FIRST, (now - began) / 10)


@dataclass
class Pace:
    """When a log gets its next line."""

    total: int
    clock: Callable[[], float] = time.perf_counter
    began: float = field(init=False)
    said: float = field(init=False)  #: when the last line came

    def __post_init__(self) -> None:
        self.began = self.said = self.clock()

    def due(self, done: int, more: int) -> bool:
        """Whether there is a line now that `done` of the total are done, `more` of them since it was last asked."""
        tenth = done * 10 // self.total != (done - more) * 10 // self.total
        return self.late(tenth)

    def late(self, anyway: bool = False) -> bool:
        """Whether there is a line now, since there was none for long or `anyway`."""
        now = self.clock()
        due = anyway or _long(now, self.said, self.began)
        if due:
            self.said = now
        return due


def rate_and_rest(rate: float, left: int, unit: str = "") -> str:
    """What a line says of speed and of the time that is left: "11.8 it/s  3 s left"."""
    speed = f"{rate:.2f} {unit}/s" if rate >= 0.1 else f"{1 / max(rate, 1e-9):.1f} s/{unit}"
    return f"{speed}  {left / max(rate, 1e-9):.0f} s left"


def progress(unit: str, total: int, done: int = 0, silent: bool = False) -> Callable[[int], None]:
    """n -> shows that n more are made."""
    if silent or total < 1:
        return lambda n: None
    bar = tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True)
    pace, before = Pace(total), done

    def show(n: int) -> None:
        nonlocal done
        bar.update(n)
        done += n
        if bar.disable and pace.due(done, n):
            rate = (done - before) / max(time.perf_counter() - pace.began, 1e-9)
            print(f"{unit} {done}/{total}  {rate:.1f}/s  {(total - done) / rate:.0f} s left", flush=True)
        if done == total:
            bar.close()

    return show


# -- inside of what knows nothing of logs ------------------------------------------------------------------------


@dataclass
class Speaker:
    """Who says what is computed, and when it last did."""

    name: str
    said: float


_SPEAKER: ContextVar[Speaker | None] = ContextVar("speaker", default=None)


@contextmanager
def speaking(name: str) -> Iterator[Speaker]:
    """What is `slow` inside is said under this name, which may change on the way; elsewhere it is silent."""
    speaker = Speaker(name, time.perf_counter())
    token = _SPEAKER.set(speaker)
    try:
        yield speaker
    finally:
        _SPEAKER.reset(token)


def slow(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items as they are; once nothing was said for `FIRST` seconds, how many of the total there were so far.

    An item that has a length counts as so many. On a terminal there is a bar instead, after two seconds.
    """
    speaker = _SPEAKER.get()
    if speaker is None:
        yield from items
        return
    terminal = sys.stderr.isatty()
    began, done = time.perf_counter(), 0
    with tqdm(total=total, unit=unit, desc=speaker.name, delay=2, leave=False, disable=not terminal) as bar:
        for item in items:
            yield item
            n = len(item) if isinstance(item, Sized) else 1
            done += n
            bar.update(n)
            now = time.perf_counter()
            if not terminal and done < total and _long(now, speaker.said, began):
                speaker.said = now
                said = rate_and_rest(done / (now - began), total - done, unit)
                print(f"{speaker.name}: {unit} {done}/{total}  {said}", flush=True)
