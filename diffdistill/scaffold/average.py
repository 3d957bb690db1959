"""The game of the methods whose student takes the time to jump to, and learns the average velocity of the way there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser, Extra, choose
from diffdistill.core.guidance import guided, require_null
from diffdistill.core.jvp import jvp
from diffdistill.core.prediction import Prediction, expand
from diffdistill.core.times import native_uniform
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seeded
from diffdistill.scaffold.following import set_dropout
from diffdistill.scaffold.matching import dmd_loss, fake_score_loss
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.simulation import rolled_out
from diffdistill.scaffold.tangent import Point, TangentMethod, jumps_by_default, two_time_player


class AverageMethod(TangentMethod):
    """F is the velocity for which x_r = cos(t - r) x_t - sin(t - r) F; u is the same of flow matching.

    Trained without a teacher, a student is guided by itself: the data's direction v is replaced by
    omega v + (1 - omega - mix) F(x_t, t, t | none) + mix F(x_t, t, t | c), with omega = guidance_scale (1 - mix), whose
    fixed point is the velocity guided by that scale. For that it also learns without conditions, with the share
    `label_dropout`.
    """

    def __init__(self, teacher: Teacher, config: Any, student: Denoiser | None, mix: float = 0.0):
        player = student or two_time_player(teacher, config.student_steps, config.student_level)
        super().__init__(teacher, config, player)
        self.mix, self.std = mix, self.schedule.data_std
        self.guides = not self.from_teacher and (config.guidance_scale != 1 or mix > 0)
        if self.guides:
            require_null(self.student, "guidance")

    def sampler(self) -> Sampler:
        """Deterministic jumps that divide the way from `student_level` down."""
        return Sampler(self.student, self.levels, DDIM())

    def in_steps(self, steps: int) -> None:
        """The same with so many jumps, whose length the student takes for its own."""
        super().in_steps(steps)
        jumps_by_default(self.student, steps, self.config.student_level)

    def some_equal(self, t: Tensor, r: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and r (B,), where r is t with the share `equal_share`."""
        return t, torch.where(batch.uniform("student/equal") < self.config.equal_share, t, r)

    def rho_rate(self, t: Tensor) -> Tensor:
        """(B,) d rho/dt at the angles t (B,)."""
        return self.std * torch.cos(t) - torch.sin(t)

    def dropped(self, batch: Batch) -> Tensor:
        """(B,) whose condition is left out."""
        return batch.uniform("student/dropped") < self.config.label_dropout

    def unguided(self, t: Tensor, batch: Batch) -> Tensor:
        """(B,) whose direction is the data's own."""
        return self.dropped(batch)

    def conditions(self, batch: Batch) -> Cond:
        """Those of the batch, without some where the student guides itself."""
        if not self.guides:
            return super().conditions(batch)
        assert self.student.null is not None
        return choose(self.dropped(batch), self.student.null(batch.cond), batch.cond)

    def direction(self, x_t: Tensor, v: Tensor, t: Tensor, batch: Batch, cond: Cond) -> Tensor:
        """(B, ...) dx_t/dt: the teacher's, the data's, or the data's guided by the student itself."""
        if not self.guides:
            return super().direction(x_t, v, t, batch, cond)
        assert self.student.null is not None
        null, twice = self.student.null(cond), Extra(r=torch.cat([t, t]))
        both = {name: torch.cat([cond[name], null[name]]) for name in cond}
        own, none = self.student(torch.cat([x_t, x_t]), torch.cat([t, t]), both, twice).v.chunk(2)
        omega = self.config.guidance_scale * (1 - self.mix)
        replaced = omega * v + (1 - omega - self.mix) * none + self.mix * own
        return torch.where(expand(self.unguided(t, batch), v) > 0, v, replaced)

    def residual(self, f: Tensor, at: Point) -> Tensor:
        """(B, ...) what is zero for the exact average velocity, where the student says f; u - u_target over rho(t)."""
        apart, k = at.t - at.r, self.rho(at.t) / self.rho(at.r)
        along = expand(torch.cos(apart), f) * (f - at.v) + expand(torch.sin(apart), f) * at.x_t
        return expand(k, f) * along + self.derivative(at, k * torch.sin(apart), Extra(r=at.r))

    def loss_of(self, error: Tensor) -> Outcome:
        """The squares of the samples' errors (B, ...), each over (itself + c)^p without a gradient."""
        square = error.square().flatten(1).sum(1)
        weight = (square.detach() + self.config.weight_c) ** -self.config.weight_power
        return Outcome((weight * square).mean(), {"error": square.mean()})

    def jump(self, x: Tensor, t: Tensor, r: Tensor, at: Point) -> Prediction:
        """The student's prediction at x (B, ...) and t (B,) for r (B,), under the conditions of that point."""
        with seeded(at.seed, x.device):
            return self.student(x, t, at.cond, Extra(r=r))

    def arrival(self, at: Point) -> tuple[Tensor, Tensor]:
        """X(x_t, t, r) and dX/dr (B, ...) with its gradient; by a difference that stays within 0 to t, if not exact.

        At r = t the derivative is the velocity, which needs no difference.
        """
        if self.kind == "exact":
            ends = torch.ones_like(at.r)
            return jvp(lambda r: self.jump(at.x_t, at.t, r, at).at(r), (at.r,), (ends,))
        h, here = self.config.derivative_step, self.jump(at.x_t, at.t, at.r, at)
        after, before = torch.minimum(at.r + h, at.t), (at.r - h).clamp_min(0)
        change = self.jump(at.x_t, at.t, after, at).at(after) - self.jump(at.x_t, at.t, before, at).at(before)
        change = change / expand((after - before).clamp_min(1e-6), change)
        return here.at(at.r), torch.where(expand(at.t - at.r, change) > 0, change, here.v)


class OnPolicy:
    """AnyFlow's second stage: samples that the student makes in a few jumps, matched to the teacher's as in DMD.

    The teacher is guided by `scale`. No unit of the fake score drops, which would be noise in the difference.
    """

    def __init__(
        self,
        teacher: Teacher,
        scale: float,
        fake_score: Denoiser | None,
        rollout_steps: Sequence[int],
        level: float | None,
    ):
        self.judge = guided(frozen(teacher.denoiser), scale)
        self.fake_score = fake_score or teacher.player("fake_score")
        set_dropout(self.fake_score, 0.0)
        self.rollout_steps, self.level = tuple(rollout_steps), level
        self.drawn: dict[int, Tensor] = {}  # the samples of the student's last turn, by their place

    def student_loss(self, student: Denoiser, batch: Batch) -> Outcome:
        """DMD's loss of samples that are made by jumps with gradients; the fake score learns them in its turn."""
        x = rolled_out(student, self.rollout_steps, self.level, batch)
        self.drawn[batch.first] = x.detach()
        t = batch.draw("matching/t", lambda n, draw: native_uniform(student.schedule, n, draw))
        return dmd_loss(x, t, batch.randn("matching/eps"), batch.cond, self.judge, self.fake_score, True)

    def fake_score_loss(self, batch: Batch) -> Outcome:
        """The fake score's loss on the samples of the student's turn, at logit-normal fractions of the times."""

        def fractions(n: int, draw: torch.Generator) -> Tensor:
            return torch.randn(n, generator=draw, device=draw.device, dtype=torch.float64).sigmoid()

        t = self.fake_score.schedule.at_fraction(batch.draw("fake_score/t", fractions))
        x = self.drawn.pop(batch.first)
        loss = fake_score_loss(self.fake_score, x, t, batch.randn("fake_score/eps"), batch.cond)
        return Outcome(loss, {"denoising": loss})
