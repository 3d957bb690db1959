"""Judging the student while it is trained, and which judging was the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from diffdistill.training.metrics import MetricsFile

if TYPE_CHECKING:
    from diffdistill.training.trainer import Trainer


class Judging(Protocol):
    """What judges the student, in all processes together."""

    every: int  #: steps between two judgings
    lower: bool  #: whether the better of two values is the lower

    def __call__(self, step: int) -> tuple[dict[str, float], float | None]:
        """What is logged, and the value that counts; None of one that cannot be had, or in other processes."""


def judged(trainer: Trainer, writer: MetricsFile | None) -> bool:
    """Judge the student of the trainer's step if it is time to; whether it is the best so far.

    An untrained one is judged and never the best.
    """
    judge, step = trainer.judge, trainer.step
    if judge is None or (step % judge.every and step != trainer.config.steps):
        return False
    trainer.check_parameters()
    with trainer.evaluating(), trainer.offload.on_host():
        values, value = judge(step)
    better = False
    if value is not None and step > 0 and math.isfinite(value):
        before = None if trainer.best is None else trainer.best[1]
        better = before is None or (value < before if judge.lower else value > before)
        trainer.best = (step, value) if better else trainer.best
    if writer is not None:
        best = 0 if trainer.best is None else trainer.best[0]
        writer.write({"step": step, **values, "judge/best step": best})
        trainer.accelerator.log(values, step=step)
    return trainer.most(int(better)) > 0
