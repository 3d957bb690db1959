"""The game of the methods whose student jumps to the end of its segment of the teacher's trajectory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import elementwise
from diffdistill.core.prediction import expand
from diffdistill.core.schedule import student_levels
from diffdistill.options import MergingOptions, SegmentOptions
from diffdistill.players.sampler import DDIM, Sampler, gamma_step
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import EdgeAdversary
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.halving import Stage
from diffdistill.scaffold.method import Batch, Need, Outcome, Turn


class Jump(NamedTuple):
    """t, the less noisy r and the segment's noisiest angle and end, and the teacher's guidance scale, all (B,)."""

    t: Tensor
    r: Tensor
    top: Tensor
    e: Tensor
    scale: Tensor


class SegmentMethod(FollowingMethod[Jump]):
    """One DDIM step of the guided teacher leads from x_t to x_r, and the student jumps from both to one angle e.

    The N steps of the teacher are those between the levels of its own sampler with N steps. A method says to where the
    student jumps (`ends`) and the sampler. With a GAN the discriminator's heads, which tell the two ends apart, are a
    player too.
    """

    def __init__(
        self, teacher: Teacher, config: SegmentOptions, student: Denoiser | None = None, *, slow_target: bool = False
    ):
        super().__init__(teacher, config, student or teacher.player("student"), slow_target=slow_target)
        self.guidance = DrawnGuidance(self.teacher, config, f"guidance_scale {config.guidance_scale:g} (1 is none)")
        levels = student_levels(self.schedule, config.solver_steps, config.student_level, option="solver_steps")
        self.levels = levels.tolist()
        self.grid = torch.cat([self.schedule.angle(levels), torch.zeros(1, dtype=torch.float64)])
        self.reached: tuple[Tensor, Tensor, Jump] | None = None  # by the turn that is computed
        if config.gan_weight:
            self.adversary = EdgeAdversary(teacher, config)
            self.players["discriminator"] = self.adversary.heads

    # -- what a method says --------------------------------------------------------------------------------

    @abstractmethod
    def ends(self, step: int, i: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The segment's noisiest angle and its end e, (B,), of what takes the teacher's i-th step (B,)."""

    def weights(self, step: int) -> tuple[float, float]:
        """Those of the distance and of the GAN in the student's loss."""
        return 1.0, self.config.gan_weight

    def next(self, step: int, i: Tensor) -> Tensor:
        """(B,) where in the grid the target lies of what takes the teacher's i-th step (B,)."""
        return i + 1

    def trained(self, batch: Batch) -> Batch:
        """The samples that the student's turn makes of a batch, and the discriminator's turn takes."""
        return batch

    def reward_weight(self, step: int) -> float:
        """That of the reward of the student's ends, which are clean then."""
        return 0.0

    # -- the game --------------------------------------------------------------------------------------------

    @final
    def interval(self, step: int, batch: Batch) -> Jump:
        """One of the teacher's steps for each sample."""
        i, grid = batch.integers(self.config.solver_steps, "student/step"), self.grid.to(batch.device)
        scale = self.config.drawn(batch.uniform("student/scale"))
        return Jump(grid[i], grid[self.next(step, i)], *self.ends(step, i, batch), scale)

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Jump, cond: Cond) -> Tensor:
        """One DDIM step of the guided teacher; x0 and eps are guided alike."""
        return self.guidance(x_t, interval.t, cond, interval.scale).at(interval.r)

    @final
    def jump(self, network: Denoiser, x_t: Tensor, t: Tensor, e: Tensor, cond: Cond) -> Tensor:
        """(B, ...) f(x_t, t), the DDIM step from the angles t (B,) to e (B,); x_t itself where it is there."""
        return torch.where(expand(t - e, x_t) <= 0, x_t, network(x_t, t, cond).at(e))

    @final
    def jumped(self, seed: int, x_t: Tensor, x_r: Tensor, at: Jump, cond: Cond) -> tuple[Tensor, Tensor]:
        """Where the student jumps to from x_t, and the target from x_r, without a gradient, both (B, ...)."""
        f, target = self.both(
            seed,
            x_t,
            lambda: self.jump(self.student, x_t, at.t, at.e, cond),
            lambda: self.jump(self.target, x_r, at.r, at.e, cond),
        )
        f = f.float() if f.dtype.itemsize < 4 else f
        self.reached = f, target.to(f), at
        return f, target.to(f)

    @final
    def following(self, x_t: Tensor, x_r: Tensor, interval: Jump, cond: Cond, seed: int = 0) -> Outcome:
        """d(f(x_t, t), sg f(x_r, r)), both at e: the mean over all elements."""
        f, target = self.jumped(seed, x_t, x_r, interval, cond)
        d = elementwise(self.config.distance, f, target, self.config.huber_c)
        return Outcome(d, {"consistency": d})

    @final
    def whole_loss(self, followed: Outcome, batch: Batch) -> Outcome:
        """The distance, and what the discriminator says of the student's end."""
        distance, gan = self.weights(batch.key[1])
        assert self.reached is not None, "`following` calls `jumped`"
        (f, target, at), self.reached = self.reached, None
        loss, terms = distance * followed.loss, dict(followed.shown)
        if gan:
            terms["gan"] = self.adversary.student_loss(f, target, at.e, at.top, batch)
            loss = loss + gan * terms["gan"]
        if weight := self.reward_weight(batch.key[1]):
            terms["reward"] = self.scored(f, batch).mean()
            loss = loss - weight * terms["reward"]
        return Outcome(loss, terms)

    @final
    def more_turns(self, step: int) -> Sequence[Turn]:
        """The discriminator's, on the ends of the student's turn."""
        turn = Turn("discriminator", lambda batch: self.adversary.turn(self.trained(batch)))
        return [turn] if self.weights(step)[1] else []


class MergingMethod(SegmentMethod):
    """Segments that merge stage by stage, into one at last, in which the student jumps to clean data from anywhere.

    It is then sampled in any number of steps. In a stage before, a grid of samples takes a deterministic step for each
    segment. A reward counts in the last stage.
    """

    trained_steps = range(1, 1001)
    slow_target = False  #: whether the target is a copy, and no pass of the student

    def __init__(self, teacher: Teacher, config: MergingOptions, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student, slow_target=self.slow_target)
        self.state = {**self.state, "stage": Stage(None)}
        self.whole = len(config.stages) * config.stage_steps
        if config.reward_weight:
            self.needs = self.needs | {Need.REWARD, Need.GRADIENT}  # type: ignore[misc]

    def stage(self, step: int) -> int:
        """That of a training step; the last one goes on."""
        return min(step // self.config.stage_steps, len(self.config.stages) - 1)

    def stepped(self, step: int) -> None:
        """The sampler is that of the step's stage."""
        self.state["stage"].done.fill_(step + 1)  # type: ignore[operator]

    def segments(self, step: int) -> int:
        """How many there are at a training step."""
        return int(self.config.stages[self.stage(step)])

    def sampler(self) -> Sampler:
        """Before training that of the last stage, at whose end it is exported."""
        done = int(self.state["stage"].done)  # type: ignore[arg-type]
        number = self.segments(done - 1) if done else 1
        if number == 1:
            return Sampler(self.student, self.levels_in(self.sampling_steps), gamma_step(self.config.gamma))
        return Sampler(self.student, self.levels[:: self.config.solver_steps // number], DDIM())

    def ends(self, step: int, i: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """A step that ends at a border belongs to the segment above it."""
        n = self.config.solver_steps // self.segments(step)
        grid, first = self.grid.to(i.device), i - i % n
        return grid[first], grid[first + n]

    def reward_weight(self, step: int) -> float:
        """None before the segments are one."""
        return float(self.config.reward_weight) if self.segments(step) == 1 else 0.0
