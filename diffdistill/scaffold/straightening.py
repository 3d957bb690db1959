"""The game of the methods that straighten a flow: one velocity for the student all along a line of noise and data.

`StagedMethod` is that of those whose second stage makes one step of the straightened flow.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.options import StagedOptions, TrajectoryOptions
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.following import change_student
from diffdistill.scaffold.halving import Stage
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn


class Line(NamedTuple):
    """The data x0 and the noise eps (B, ...) of a line, t (B,) where it is looked at, and the conditions there."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Cond


class StraighteningMethod(Method):
    """One player, the student, which is to say at cos(t) x0 + sin(t) eps what the line's x0 and eps are.

    For a flow that is a straight line; for other schedules the one that its DDIM steps, of any length, stay on. A
    method says the lines and the sampler, and the loss where it is another than the velocity's.
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

    def error(self, prediction: Prediction, line: Line) -> Tensor:
        """(B,) the loss of what the student says on the line: the mean square of its velocity's error."""
        return squared(*self.velocities(prediction, line))

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


class StagedMethod(StraighteningMethod):
    """Lines of pairs for `reflow_steps` training steps, then `distill_steps` that leave one step, if there are any.

    A method says the lines, their loss, and the loss of the second stage, which holds the student of the first.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS})  # type: ignore[misc]

    def __init__(self, teacher: Teacher, config: StagedOptions, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        self.stage = Stage(frozen(copy.deepcopy(self.student)) if config.distill_steps else None)
        self.state = {"stage": self.stage}
        if config.distill_steps:
            self.whole = config.reflow_steps + config.distill_steps
        else:
            self.trained_steps = range(1, 1001)

    @abstractmethod
    def distill_turn(self, batch: Batch) -> Outcome:
        """The loss of the student's one step."""

    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step, and begins the second stage with a new optimizer."""
        first = self.config.reflow_steps
        if not self.config.distill_steps or step < first:
            return super().turns(step)
        return [Turn("student", self.distill_turn, restart=step == first)]

    def after_step(self, step: int) -> None:
        """The second stage gets the student of the first when that ends."""
        self.stage.done.fill_(step + 1)
        if self.stage.previous is not None and step + 1 == self.config.reflow_steps:
            self.stage.previous.load_state_dict(self.student.state_dict())

    def sampler(self) -> Sampler:
        """`student_steps` of Euler's; one, after the second stage and before training, if there is one."""
        distilled = self.config.distill_steps and not 0 < int(self.stage.done) <= self.config.reflow_steps
        return Sampler(self.student, self.levels_in(self.sampling_steps or (1 if distilled else None)), DDIM())

    @property
    @final
    def reflowed(self) -> Denoiser:
        """The first stage's student, frozen."""
        assert self.stage.previous is not None, "there is no second stage"
        return self.stage.previous

    @final
    def one_step(self, z: Tensor, cond: Cond) -> Tensor:
        """(B, ...) what the student's one step makes of noise z (B, ...); a gradient passes."""
        return Sampler(self.student, self.levels_in(1), DDIM()).one_step(z, cond)


def squared(own: Tensor, other: Tensor) -> Tensor:
    """(B,) the mean square of the difference of both (B, ...)."""
    return per_sample_mean((own - other).square())
