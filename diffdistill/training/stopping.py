"""How a training ends before its last step: by a signal, or since its hours are over, after a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

CODES = {
    int(signal.SIGINT): "stopped by Ctrl-C or SIGINT",
    int(signal.SIGTERM): "stopped by SIGTERM",
    0: "stopped since --max-hours are over",
}
"""What each number of a stop means; 0 is no signal."""

OUT_OF_TIME = 75
"""The exit code of a training whose hours are over: EX_TEMPFAIL, 'try again later'."""


class Interrupted(Exception):
    """Training was stopped after a checkpoint was written, which a resumed run goes on from."""

    def __init__(self, run: Path, step: int, steps: int, number: int):
        super().__init__(str(run))
        self.run, self.step, self.steps, self.number = run, step, steps, number

    def of(self, run: Path) -> Interrupted:
        """The same with another folder to resume."""
        return Interrupted(run, self.step, self.steps, self.number)

    @property
    def code(self) -> int:
        """The exit code: 130 after SIGINT, 143 after SIGTERM, 75 when the hours are over."""
        return 128 + self.number if self.number else OUT_OF_TIME

    def line(self, command: str) -> str:
        """What is said, with the command that goes on."""
        at = f"{CODES[self.number]}, at step {self.step} of {self.steps}, which is kept"
        return f"{at}; go on with: diffdistill {command} --resume {self.run}"


class Stop:
    """Whether a training is to stop, and why. `began` is on the clock of `time.monotonic`."""

    def __init__(self, hours: float, began: float):
        self.number = -1  #: of the signal that came; -1: none
        self.until = began + 3600 * hours if hours else None

    @property
    def reason(self) -> int:
        """One more than the number in `CODES`; 0 as long as it is to go on."""
        if self.number < 0 and self.until is not None and time.monotonic() >= self.until:
            self.number = 0
        return self.number + 1


@contextmanager
def stopping(hours: float, began: float) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM stop the training, so that the step in progress ends first; a second one kills."""
    stop = Stop(hours, began)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # handlers can only be set there
        return

    def heard(number: int, frame: FrameType | None) -> None:
        stop.number = number
        signal.signal(number, before[signal.Signals(number)])

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
