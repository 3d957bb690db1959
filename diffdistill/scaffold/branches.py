"""The game of a network that is its own fake score: a branch of jumps for the data, and one for its own samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.divided import approach
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import LinearFlow
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn
from diffdistill.scaffold.tangent import jumps_by_default, two_time_player


class BranchesMethod(Method):
    """One player, the student, which takes the time to jump to; its average lies in the checkpoint (LoRA is its own).

    Times are a flow's, from 0 for data to `top`, where the sampler starts. A method says the student's turn and the
    sampler; options besides the student's: `average_decay`, `student_steps`, `student_level`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})  # type: ignore[misc]
    trained_steps = range(1, 1001)

    def __init__(self, teacher: Teacher, config: Any, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.student = self.average = student or two_time_player(teacher, config.student_steps, config.student_level)
        self.players = {"student": self.student}
        if "student" not in teacher.lora:
            self.average = copy.deepcopy(self.student).requires_grad_(False)
            self.state = {"average": self.average}
        self.flow = LinearFlow(data_std=self.schedule.data_std)
        self.top = float(self.flow.native(self.schedule.angle(self.levels_in(1)[0])).sigma)

    def student_turn(self, batch: Batch) -> Outcome:
        """What the student minimises."""
        raise NotImplementedError

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", self.student_turn)]

    @final
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """average <- decay average + (1 - decay) student."""
        if self.average is not self.student:
            approach(self.average.parameters(), self.student.parameters(), 1 - self.config.average_decay)

    @final
    def in_steps(self, steps: int) -> None:
        """Any number, whose jumps the student takes for its own."""
        super().in_steps(steps)
        jumps_by_default(self.student, steps, self.config.student_level)

    @final
    def jump(
        self, net: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond, fake: Tensor | None = None
    ) -> Prediction:
        """That whose DDIM step is the jump from the times t to r (B,); of the fake branch where `fake` (B,) is true.

        The fake branch is told a gap of -1 between the two times, which no jump has.
        """
        start, end = self.flow.angle(t), self.flow.angle(r)
        if fake is None:
            return net(x_t, start, cond, Extra(r=end))
        from_here = self.schedule.fraction(start.clamp(self.schedule.t_min, self.schedule.t_max))
        return net(x_t, start, cond, Extra(gap=torch.where(fake, -1.0, from_here - self.schedule.fraction(end))))

    @final
    def velocity(self, prediction: Prediction) -> Tensor:
        """(B, ...) F, the average velocity of the jump that is predicted: noise minus data."""
        return prediction.eps - self.schedule.data_std * prediction.x0

    @final
    def along(self, x_t: Tensor, t: Tensor, u: Tensor, s: Tensor) -> Tensor:
        """(B, ...) x at the times s, straight on from x_t at the times t (B,) with the velocity u (B, ...)."""
        at = torch.full_like(t, -self.schedule.data_std), torch.ones_like(t)
        return Prediction(x_t, self.flow.angle(t), u, *at).at(self.flow.angle(s))
