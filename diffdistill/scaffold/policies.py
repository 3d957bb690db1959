"""The game of policies: a pass of the student says a path, and the teacher is asked where it leads.

Chen et al. 2025, arXiv:2510.14974 (pi-Flow). The student's network is its teacher's with a wider last layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.policies import Policy, Weighted
from diffdistill.players.policy import PolicySettings, policy_player
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Method, Outcome, Turn
from diffdistill.scaffold.simulation import drawn_level, simulated_input


class PolicyMethod(Method):
    """One player, whose passes say policies; `self.teacher` is guided. Its options are those of a student of levels.

    A subclass says `settings` and `student_turn`.
    """

    def __init__(self, teacher: Teacher, config: Any, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        if student is None:
            student = policy_player(teacher.player("student"), self.settings(), teacher.shape[0], self.angles())
        self.student: Any = student
        self.players = {"student": student}

    @abstractmethod
    def settings(self) -> PolicySettings:
        """What the student's policies are made of."""

    @abstractmethod
    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """What the student minimises in a step."""

    def angles(self) -> Tensor:
        """(n,) those of the levels at which policies begin."""
        return torch.stack([self.schedule.angle(level) for level in self.levels_in()])

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.student_turn, step))]

    def sampler(self) -> Sampler:
        """A pass at each level, whose policy leads to the next."""
        return Sampler(self.student, self.levels_in(), DDIM())


class ImitationMethod(PolicyMethod):
    """Policy imitation (pi-ID): the policy's velocity is to be the teacher's, along a path that it takes itself.

    The options are `options.trajectories.ImitationOptions`. A subclass says `settings`.
    """

    @final
    def share(self, step: int) -> float:
        """How much of the way from a state to the next is the teacher's."""
        return self.config.teacher_share * max(0.0, 1 - step / self.config.mixing_steps)

    def dropped(self, policy: Policy, batch: Batch) -> Policy:
        """The policy without some of its components, by `component_dropout`, but not without all of them."""
        if not isinstance(policy, Weighted) or not self.config.component_dropout:
            return policy
        k = policy.values.shape[1]
        u = batch.draw("student/components", lambda n, draw: torch.rand(n, k, generator=draw, device=draw.device))
        return policy.without((u < self.config.component_dropout) & (u < u.max(1, keepdim=True).values))

    def velocity(self, policy: Policy, x: Tensor, t: Tensor) -> Tensor:
        """(B, ...) the policy's at x (B, ...) and the angles t (B,), averaged over the window."""
        step = (policy.s - policy.e) / self.config.substeps
        total = policy.v(x, t)
        for _ in range(self.config.window - 1):
            after = torch.maximum(t - step, policy.e + step)
            x, t = policy.roll(x, t, after, 1), after
            total = total + policy.v(x, t)
        return total / self.config.window

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """From a level of the student's own path, along the path of its policy."""
        c, sampler = self.config, self.sampler()
        k = drawn_level(len(sampler.levels), batch)
        x, s = simulated_input(sampler, k, batch)
        policy = self.dropped(self.student(x, s, batch.cond).policy, batch)
        here, e = s, sampler.leads(k).to(s)
        u, losses, steps = batch.uniform("student/t"), [], -(-c.substeps // c.states)
        for i in range(c.states):
            part = torch.floor((i + u) * c.substeps / c.states) / c.substeps
            t = torch.lerp(s, e.expand_as(s), part).clamp(min=self.schedule.t_min)
            with torch.no_grad():
                x = policy.roll(x, here, t, steps)
                theirs = self.teacher(x, t, batch.cond)
            losses.append(per_sample_mean((self.velocity(policy, x, t) - theirs.v).square()))
            here = torch.lerp(t, e.expand_as(t), self.share(step) / c.states)
            if self.share(step):
                x = theirs.at(here)
        loss = torch.stack(losses).mean()
        return Outcome(loss, {"imitation": loss})
