"""The game of the methods that follow trajectories: from x_t to a less noisy x_r, where a slow copy says the rest."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.divided import approach
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import DiscreteVP, Schedule, sampling_grid
from diffdistill.core.times import karras_grid
from diffdistill.errors import UserError
from diffdistill.options import AdversarialTerm, TrajectoryOptions
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn


class Interval(Protocol):
    """A stretch of trajectory for each sample; a method's own has more fields."""

    @property
    def t(self) -> Tensor:
        """(B,) the angles of the noisier end."""


I = TypeVar("I", bound=Interval)


class FollowingMethod(Method, Generic[I]):
    """One player, the student. Its slow copy, the target, lies in the checkpoint; without one it is its own target.

    A method says the interval that is followed (`interval`), where it leads (`less_noisy`) and the loss there
    (`following`), which gets a seed so that both passes of the student drop the same units. With `AdversarialTerm`
    among its options the heads of a discriminator are a player too (`adversary`), whose loss the method takes.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})  # type: ignore[misc]

    def __init__(self, teacher: Teacher, config: Any, student: Denoiser, *, slow_target: bool):
        super().__init__(teacher, config)
        self.teacher: Any = frozen(teacher.denoiser)
        if isinstance(config, TrajectoryOptions):
            change_student(student, config)
        self.student = self.target = student
        self.players = {"student": student}
        if slow_target:
            self.target = copy.deepcopy(student).requires_grad_(False)
            self.state = {"target": self.target}
        if isinstance(config, AdversarialTerm) and config.gan_weight:
            self.adversary: Any = LatentAdversary(teacher, config)
            self.players["discriminator"] = self.adversary.heads

    # -- what a method says --------------------------------------------------------------------------------

    @abstractmethod
    def interval(self, step: int, batch: Batch) -> I:
        """What each sample of a training step follows."""

    @abstractmethod
    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: I, cond: Cond) -> Tensor:
        """(B, ...) x_r: by a teacher's step from x_t, or x0 under the same noise eps as x_t. No gradient passes."""

    def noised(self, batch: Batch, interval: I, eps: Tensor) -> Tensor:
        """(B, ...) x_t: the images under noise eps."""
        return diffuse(batch.images, interval.t, eps)

    @abstractmethod
    def following(self, x_t: Tensor, x_r: Tensor, interval: I, cond: Cond, seed: int = 0) -> Outcome:
        """The loss of the student at x_t (B, ...) against the target at x_r (B, ...)."""

    def sampler(self) -> Sampler:
        """`student_steps` from `student_level` down, with fresh noise between."""
        return Sampler(self.student, self.levels_in(self.sampling_steps))

    def target_decay(self, step: int) -> float:
        """The decay of the target's moving average at a training step."""
        return self.config.target_ema

    def prepared(self, step: int, batch: Batch) -> Batch:
        """The batch that the student's turn takes, of whose conditions a method may drop some."""
        return batch

    def stepped(self, step: int) -> None:
        """What follows the moves of a training step, besides the target's."""
        return None

    def whole_loss(self, followed: Outcome, batch: Batch) -> Outcome:
        """The student's loss, to which a method may add terms beside that of `following`."""
        return followed

    def more_turns(self, step: int) -> Sequence[Turn]:
        """Moves that follow the student's."""
        return []

    # -- the game --------------------------------------------------------------------------------------------

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.student_turn, step)), *self.more_turns(step)]

    @final
    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """From noised images and what lies less noisy on their trajectories to the loss."""
        batch = self.prepared(step, batch)
        interval, eps = self.interval(step, batch), batch.randn("student/eps")
        x_t = self.noised(batch, interval, eps)
        with torch.no_grad():
            x_r = self.less_noisy(x_t, batch.images, eps, interval, batch.cond)
        followed = self.following(x_t, x_r, interval, batch.cond, seed_for(*batch.key, "student/dropout"))
        return self.whole_loss(followed, batch)

    @final
    def both(self, seed: int, x_t: Tensor, own: Callable[[], Tensor], target: Callable[[], Tensor]) -> list[Tensor]:
        """What the student says and what the target says, without a gradient; both drop the units of the seed."""
        with seeded(seed, x_t.device):
            first = own()
        with torch.no_grad(), seeded(seed, x_t.device):
            return [first, target()]

    @final
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """target <- mu target + (1 - mu) student."""
        if self.target is not self.student:
            approach(self.target.parameters(), self.student.parameters(), 1 - self.target_decay(step))
        self.stepped(step)


def trajectory_grid(
    schedule: Schedule, n: int, kind: str, first: float, level: float | None, *, option: str = "grid_points"
) -> Tensor:
    """(n,) descending angles from the level `first` on, where the sampler starts.

    `kind` native: those of the teacher's own steps, from `level` down (None: the noisiest), and zero; karras: from
    `level` down to the schedule's cleanest. Raises UserError, which begins with `option`, for more points than there is
    room for.
    """
    top = schedule.t_max if level is None else float(schedule.angle(level))
    grid = sampling_grid(schedule, n - 1, level, option=option) if kind == "native" else karras_grid(schedule, n, top)
    grid[0] = schedule.angle(first)
    if not bool((grid.diff() < 0).all()):
        raise UserError(f"{option}: {n} points are more than the teacher's schedule has room for; give fewer")
    return grid


def change_student(student: Denoiser, config: TrajectoryOptions) -> None:
    """Gives the student, a copy of its own, the output and dropout of the options; UserError where it cannot."""
    if config.student_output != "teacher":
        if not isinstance(student.schedule, DiscreteVP):
            raise UserError(
                f"student_output: {config.student_output} is for teachers of discrete timesteps (DDPM, DDIM), and no "
                f"stock scheduler of a {type(student.schedule).__name__} teacher takes it; leave it out"
            )
        student.output = OUTPUTS[config.student_output]
    if config.student_dropout is not None:
        set_dropout(student, config.student_dropout)


def set_dropout(student: nn.Module, share: float) -> None:
    """The student's layers of the name dropout, which residual blocks have, drop that share; UserError without any."""
    named = [m for name, m in student.named_modules() if name.endswith("dropout") and isinstance(m, nn.Dropout)]
    if share and not named:
        raise UserError(f"student_dropout: {share} was given, and the student's network has no dropout; leave it out")
    for layer in named:
        layer.p = share
