"""A training whose data cannot be read on the way: what is done is kept, and it is said how to go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.errors import UserError
from diffdistill.scaffold.method import Batch

if TYPE_CHECKING:
    from diffdistill.training.trainer import Trainer

_OTHERS_FIRST = 2.0  # seconds


class Unread(UserError):
    """Data could not be read in the middle of a training, of which there is a checkpoint."""

    def __init__(self, reason: str, step: int, run: Path):
        super().__init__(f"{reason}; step {step} is kept: mend that, and go on with --resume {run}")
        self.reason, self.step = reason, step

    def of(self, run: Path) -> Unread:
        """The same with another folder to resume."""
        return Unread(self.reason, self.step, run)


def read_batch(trainer: Trainer) -> Batch:
    """The batch of the trainer's step. Where any process cannot read its own, all keep what is done, and end.

    Raises Unread, or the error itself where that is not the user's or nothing could be kept.
    """
    batch, error = None, None
    try:
        batch = trainer.batches(trainer.step)
    except Exception as raised:  # one's own data may raise anything
        error = raised
    if not trainer.anywhere(error is not None):
        assert batch is not None
        return batch
    kept = _keep(trainer)
    if error is None:
        # A launcher ends all processes when the first has ended: the one that knows why is to speak before.
        time.sleep(_OTHERS_FIRST)
        error = UserError("another process of this run cannot read its data, and says why")
    if kept and isinstance(error, UserError):
        raise Unread(str(error), trainer.step, trainer.out) from error
    raise error


def _keep(trainer: Trainer) -> bool:
    """Whether there is a checkpoint of the steps that are done; if not yet, it is written."""
    if trainer.step not in (0, trainer.saved):
        try:
            trainer.save()
        except (UserError, OSError):  # overflown parameters, a full disk: the first error says more
            return False
    return trainer.step > 0
