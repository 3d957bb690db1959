"""The plainest game: one player, the student, which moves in every step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, final

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.options import TeacherGuidance, TrajectoryOptions
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.following import change_student
from diffdistill.scaffold.method import Batch, Method, Outcome, Turn


class SoloMethod(Method):
    """A method says the loss and the sampler, and its student where that does not begin as the teacher.

    With `TeacherGuidance` among its options `teacher` is the frozen one, guided as they say.
    """

    def __init__(self, teacher: Teacher, config: Any, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.student = student or teacher.player("student")
        self.players = {"student": self.student}
        if isinstance(config, TrajectoryOptions):
            change_student(self.student, config)
        if isinstance(config, TeacherGuidance):
            self.teacher: Any = guided(frozen(teacher.denoiser), config.guidance_scale)

    @abstractmethod
    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """The student's loss in a training step."""

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.student_turn, step))]
