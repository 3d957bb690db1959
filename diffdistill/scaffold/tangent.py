"""The game of the methods whose target is the student's own derivative along the path that a noised image moves on."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.guidance import guided
from diffdistill.core.jvp import Derivative, derivative, jvp, nearer_derivative
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.schedule import Schedule, student_levels
from diffdistill.errors import UserError
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.players.two_times import second_times, time_input
from diffdistill.rng import generator, seed_for, seeded
from diffdistill.scaffold.following import change_student
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn


class Point(NamedTuple):
    """Where the student is trained: x_t on its path, and the direction in which the path goes on."""

    x_t: Tensor  #: (B, ...)
    t: Tensor  #: (B,) its angles
    v: Tensor  #: (B, ...) dx_t/dt
    r: Tensor  #: (B,) the angles that the student is to reach
    cond: Cond
    seed: int = 0  #: of the units that the student drops, in all its passes
    extra: Extra = NONE  #: what the student takes besides
    batch: Batch | None = None  #: of which these are the samples
    step_seed: int = 0  #: the same for all samples of the step

    @property
    def place(self) -> int:
        """The index of the first of these samples in the step."""
        return 0 if self.batch is None else self.batch.first

    def uniform(self, purpose: str) -> Tensor:
        """(B,) in [0, 1) for that purpose, by the samples' places in the step."""
        n, rows = (len(self.t), slice(None)) if self.batch is None else (self.batch.whole, self.batch.rows)
        draw = generator(self.t.device, self.step_seed, purpose)
        return torch.rand(n, generator=draw, device=draw.device, dtype=self.t.dtype)[rows]


class TangentMethod(Method):
    """The student F is a velocity of the normal form: cos(t - r) x_t - sin(t - r) F is to be where the path is at r.

    A method says the angles (`times`) and the loss (`regression`), for which it asks `derivative`. In mode distillation
    the direction is the guided teacher's, in mode training that of the image and its noise, whose mean is the same.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})  # type: ignore[misc]
    stream: ClassVar[str] = "student"  # of the noise and the dropout; another where the student plays a second game
    untaught: ClassVar[str] = ""  # why there is no mode training, where there is none

    def __init__(self, teacher: Teacher, config: Any, student: Denoiser | None):
        if self.untaught and config.mode == "training":
            raise UserError(f"mode: {self.untaught}; use distillation")
        super().__init__(teacher, config)
        student = student or teacher.player("student")
        self.teacher: Any = frozen(teacher.denoiser)
        self.from_teacher = config.mode == "distillation"
        if self.from_teacher:
            self.teacher = guided(self.teacher, config.guidance_scale)
        change_student(student, config)
        self._teacher = teacher
        self._kind: Derivative | None = None
        self.student = student
        self.players = {"student": student}
        self.levels = self.levels_in()

    # -- what a method says --------------------------------------------------------------------------------

    @abstractmethod
    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and r (B,), the angles of a training step; r is at most t."""

    @abstractmethod
    def regression(self, step: int, at: Point) -> Outcome:
        """The student's loss there, against a target that gets no gradient."""

    def conditions(self, batch: Batch) -> Cond:
        """The conditions that the student is trained with."""
        return batch.cond

    def extra(self, batch: Batch) -> Extra:
        """What the student takes besides, in the step's points; a time to jump to is the method's to add."""
        return NONE

    def direction(self, x_t: Tensor, v: Tensor, t: Tensor, batch: Batch, cond: Cond) -> Tensor:
        """(B, ...) dx_t/dt for the direction v (B, ...) of the image and its noise. No gradient passes."""
        return self.teacher(x_t, t, cond).v if self.from_teacher else v

    def second_term(self, batch: Batch) -> Outcome | None:
        """What is added to the student's loss, of samples of its own say; None: nothing."""
        return None

    def sampler(self) -> Sampler:
        """`student_steps` from `student_level` down, with fresh noise between."""
        return Sampler(self.student, self.levels)

    def in_steps(self, steps: int) -> None:
        """The sampler takes so many steps from here on."""
        self.levels = self.levels_in(steps)

    def more_turns(self, step: int) -> Sequence[Turn]:
        """Moves that follow the student's."""
        return []

    # -- the game --------------------------------------------------------------------------------------------

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.student_turn, step)), *self.more_turns(step)]

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """From noised images and the direction of their paths to the loss."""
        (t, r), eps, cond = self.times(batch), batch.randn(f"{self.stream}/eps"), self.conditions(batch)
        t = t.clamp(self.schedule.t_min, self.schedule.t_max)
        x_t, v = diffuse(batch.images, t, eps), moving(batch.images, t, eps)
        with torch.no_grad():
            v = self.direction(x_t, v, t, batch, cond)
        seed = seed_for(*batch.key, f"{self.stream}/dropout")
        step_seed = seed_for(*batch.key[:2], 0, f"{self.stream}/dropout")
        at = Point(x_t, t, v, torch.minimum(r, t), cond, seed, self.extra(batch), batch, step_seed)
        outcome = self.regression(step, at)
        more = self.second_term(batch)
        return outcome if more is None else Outcome(outcome.loss + more.loss, {**outcome.shown, **more.shown})

    @final
    def velocity(self, at: Point, extra: Extra = NONE) -> Tensor:
        """(B, ...) F there, with its gradient."""
        with seeded(at.seed, at.x_t.device):
            return self.student(at.x_t, at.t, at.cond, extra).v

    @final
    @torch.no_grad()
    def derivative(self, at: Point, speed: Tensor, extra: Extra = NONE) -> Tensor:
        """(B, ...) speed (B,) times dF/dt along the path, r being held; no gradient passes.

        The speed multiplies the tangents of an exact derivative, so that the result is finite where dF/dt is not.
        """

        def field(x_t: Tensor, t: Tensor) -> Tensor:
            return self.student(x_t, t, at.cond, extra).v

        kind, step = self.kind, self.config.derivative_step
        if kind == "exact":
            with seeded(at.seed, at.x_t.device):
                return jvp(field, (at.x_t, at.t), (expand(speed, at.v) * at.v, speed.to(at.t)))[1]
        # The student knows no times beyond r; there must be some room all the same.
        times = (at.r.clamp(self.schedule.t_min, self.schedule.t_max - step), self.schedule.t_max)
        change = derivative(field, at.x_t, at.t, at.v, kind, step, times=times, seed=at.seed)
        return expand(speed, change) * change

    def rho(self, t: Tensor) -> Tensor:
        """(B,) by how much an error of F is one of the average velocity u, at the angles t (B,)."""
        return self.schedule.data_std * torch.sin(t) + torch.cos(t)

    def flow_time(self, t: Tensor) -> Tensor:
        """(B,) sigma/(alpha + sigma) at the angles t (B,)."""
        return self.schedule.data_std * torch.sin(t) / self.rho(t)

    @property
    def kind(self) -> Derivative:
        """How the derivative is computed; `auto` asks the teacher once, at its own samples, the same on all ranks."""
        if self._kind is None:
            auto = self.config.derivative == "auto"
            self._kind = nearer_for(self._teacher, self.config.derivative_step) if auto else self.config.derivative
        return self._kind


def nearer_for(teacher: Teacher, step: float) -> Derivative:
    """Which derivative is nearer the truth for a teacher's network."""
    times = (teacher.denoiser.schedule.t_min, teacher.denoiser.schedule.t_max)
    return nearer_derivative(*own_path(teacher), step, times=times)


@torch.no_grad()
def own_path(teacher: Teacher, count: int = 16) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]:
    """A teacher's velocity as a function of x_t and t, and where it is asked: x_t (n, ...), t (n,) and dx_t/dt.

    x_t are its one-step samples, noised again, the same in every call.
    """
    denoiser, schedule, cond = teacher.denoiser, teacher.denoiser.schedule, teacher.sample_cond(count)
    weight = next(itertools.chain(denoiser.parameters(), denoiser.buffers()))
    draw = generator(weight.device, "derivative")
    z, eps = torch.randn(2, count, *teacher.shape, generator=draw, device=weight.device).to(weight)
    t = torch.linspace(0.05, 0.95, count, dtype=torch.float64, device=weight.device)
    t = schedule.t_min + t * (schedule.t_max - schedule.t_min)
    x_t = diffuse(denoiser(z, torch.full_like(t, schedule.t_max), cond).x0, t, eps)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, cond).v

    return velocity, x_t, t, velocity(x_t, t)


def two_time_player(teacher: Teacher, steps: int, level: float | None) -> Denoiser:
    """A student that takes the time to jump to, sampled in so many equal jumps from `level` (None: the noisiest) down.

    One that is LoRA has the layers of that input beside its matrices.
    """
    return time_input(teacher.player("student"), default=gap_of(teacher.denoiser.schedule, steps, level))


def jumps_by_default(student: Denoiser, steps: int, level: float | None) -> None:
    """From now on the student takes the length of so many equal jumps for its own."""
    for layer in second_times(student):
        layer.default.fill_(gap_of(student.schedule, steps, level))


def gap_of(schedule: Schedule, steps: int, level: float | None) -> float:
    """What each of so many jumps from `level` (None: the noisiest) down is of the schedule's own time."""
    first = schedule.angle(student_levels(schedule, steps, level)[0])
    return float(schedule.fraction(first)) / steps


def moving(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """(B, ...) the derivative of x_t = cos(t) x0 + sin(t) eps with respect to t (B,)."""
    return expand(torch.cos(t), x0) * eps - expand(torch.sin(t), x0) * x0


def normalised(g: Tensor, norm: str, c: float) -> Tensor:
    """g/(|g| + c) of each sample (B, ...), |g| as `norm` says: rms, l2, or none for g itself (sCM, section 4.2)."""
    if norm == "none":
        return g
    size = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / expand((size / math.sqrt(g[0].numel()) if norm == "rms" else size) + c, g)


def refuse_unused_guidance(scale: float, why: str) -> None:
    """UserError for a guidance scale where nothing is guided."""
    if scale != 1:
        raise UserError(f"guidance_scale: {scale} guides the teacher's direction, and {why}; use 1")
