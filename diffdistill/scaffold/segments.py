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
from diffdistill.options import SegmentOptions
from diffdistill.players.scale_input import DrawnGuidance
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import EdgeAdversary
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.method import Batch, Outcome, Turn


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

    # -- the game --------------------------------------------------------------------------------------------

    @final
    def interval(self, step: int, batch: Batch) -> Jump:
        """One of the teacher's steps for each sample."""
        i, grid = batch.integers(self.config.solver_steps, "student/step"), self.grid.to(batch.device)
        scale = self.config.drawn(batch.uniform("student/scale"))
        return Jump(grid[i], grid[i + 1], *self.ends(step, i, batch), scale)

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
        loss = distance * followed.loss
        if not gan:
            return Outcome(loss, followed.shown)
        judged = self.adversary.student_loss(f, target, at.e, at.top, batch)
        return Outcome(loss + gan * judged, {**followed.shown, "gan": judged})

    @final
    def more_turns(self, step: int) -> Sequence[Turn]:
        """The discriminator's, on the ends of the student's turn."""
        return [Turn("discriminator", self.adversary.turn)] if self.weights(step)[1] else []
