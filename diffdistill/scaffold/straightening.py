"""The game of the methods that straighten a flow: one velocity for the student all along a line of noise and data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.options import TrajectoryOptions
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.following import change_student
from diffdistill.scaffold.method import Batch, Method, Outcome, Turn


class Line(NamedTuple):
    """The data x0 and the noise eps (B, ...) of a line, t (B,) where it is looked at, and the conditions there."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Cond


class StraighteningMethod(Method):
    """One player, the student, which is to say at cos(t) x0 + sin(t) eps what the line's x0 and eps are.

    For a flow that is a straight line; for other schedules the one that its DDIM steps, of any length, stay on. A
    method says the lines, the loss and the sampler.
    """

    def __init__(self, teacher: Teacher, config: TrajectoryOptions, student: Denoiser | None):
        super().__init__(teacher, config)
        self.teacher: Any = frozen(teacher.denoiser)
        self.student = student or teacher.player("student")
        change_student(self.student, config)
        self.players = {"student": self.student}

    # -- what a method says --------------------------------------------------------------------------------

    @abstractmethod
    def line(self, step: int, batch: Batch) -> Line:
        """One for each sample; no gradient passes."""

    @abstractmethod
    def error(self, prediction: Prediction, line: Line) -> Tensor:
        """(B,) the loss of what the student says on the line."""

    # -- the game --------------------------------------------------------------------------------------------

    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.straight_turn, step))]

    @final
    def straight_turn(self, step: int, batch: Batch) -> Outcome:
        """From the lines to the loss."""
        with torch.no_grad():
            line = self.line(step, batch)
        prediction = self.student(diffuse(line.x0, line.t, line.eps), line.t, line.cond)
        loss = self.error(prediction, line).mean()
        return Outcome(loss, {"straightness": loss})

    @final
    def velocities(self, prediction: Prediction, line: Line) -> tuple[Tensor, Tensor]:
        """That of the student and that of the line in a flow's own time, noise minus data, both (B, ...)."""
        std = self.schedule.data_std
        return prediction.eps - std * prediction.x0, line.eps - std * line.x0


def squared(own: Tensor, other: Tensor) -> Tensor:
    """(B,) the mean square of the difference of both (B, ...)."""
    return per_sample_mean((own - other).square())
