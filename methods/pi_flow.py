"""pi-Flow: Policy-Based Few-Step Generation via Imitation Distillation.

Chen, Zhang, Tan, Yuan, Wetzstein, Guibas 2025, arXiv:2510.14974 (code: Lakonik/LakonLab).

A pass of the student gives no point but a policy: x0 at any x and t, all the way to its next level. The flow of the
policy is integrated by many small steps without the network, so one pass makes what the teacher needs many for. It is
trained by imitation: along a path that the policy itself takes, its velocity is to be the teacher's where it is,

    loss = mean over states of |v_policy(x_t, t) - v_teacher(x_t, t)|^2,

with x_t constant, so that the policy learns to come back from where its own errors lead. No image is needed.

"mixture" (the authors' GMFlow): at each position x0 given x_s is a mixture of K Gaussians of one width, conditioned on
x_t too. For data that are such a mixture that is exact, at every x. "nodes" (their DX): K values of x0 on the way,
linear between them.

ArcFlow (arXiv:2602.09014) is the same loop with another policy, of momenta, which is not there.

Read in the authors' code. Deviations:
- States and small steps are evenly spaced in the angle, each state in a part of its own; theirs in the unshifted time.
- The stretches are those of the student's levels; with the authors the last one is half as long.
- The error is that of v in the normal form, between 0.7 and 1 times a flow's own, without their factor of 30.
- The student's path leads from noise through the levels before; the authors may begin at noised images as well.
- The width of a mixture is one number of the image, a mean over the network's output; theirs is of the time embedding.
- `teacher_share` leads from each state on by one step of the teacher, for a share of the way to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.policies import Mixture, Policy
from diffdistill.errors import UserError
from diffdistill.options import StudentLevels, StudentOptions, TeacherGuidance, option
from diffdistill.players.policy import PolicySettings, policy_player
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Method, Outcome, Turn
from diffdistill.scaffold.simulation import drawn_level, simulated_input

ABOUT = About(
    paper="Chen et al. 2025, arXiv:2510.14974",
    data="nothing",
    kind="trajectory",
    equations={
        "the policy of a mixture (GMFlow)": "core.policies.Mixture.x0",
        "the policy of values on the way (DX)": "core.policies.Nodes.x0",
        "integration without the network": "core.policies.Policy.roll",
        "policy imitation (pi-ID)": "PiFlow.student_turn, PiFlow.velocity",
        "mixing with the teacher's path": "PiFlow.share",
        "dropout of components": "PiFlow.dropped",
        "sampling": "PiFlow.sampler, players.policy.PolicyDenoiser",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, StudentLevels, TeacherGuidance, student_lr=1e-4):
    """pi-Flow's options."""

    student_steps: int = option(4, "the student's passes", at_least=1)
    policy: Literal["mixture", "nodes"] = option(
        "mixture", "what a pass gives: a mixture of Gaussians at each position, or values of x0 on the way"
    )
    components: int = option(8, "K, the Gaussians of a mixture, or the values on the way", at_least=1)
    substeps: int = option(32, "the policy's steps from a level to the next", at_least=1)
    states: int = option(4, "states on the policy's path, at each of which the teacher is asked", at_least=1)
    window: int = option(
        1, "steps over which the policy's velocity is averaged; 1: it is that at the state", at_least=1
    )
    teacher_share: float = option(
        0.0, "at the training's beginning, how much of the path is the teacher's", at_least=0, at_most=1
    )
    mixing_steps: int = option(2000, "training steps in which the teacher's share falls to none", at_least=1)
    component_dropout: float = option(0.0, "the share of a mixture's Gaussians that are left out", at_least=0, below=1)

    def check(self) -> None:
        if self.states > self.substeps:
            raise UserError(f"states: {self.states} is more than the {self.substeps} substeps; give that or fewer")
        if self.policy == "nodes" and self.components < 3:
            raise UserError(f"components: {self.components} values on the way are too few; give 3 or more")
        if self.policy == "nodes" and self.component_dropout:
            raise UserError("component_dropout: values on the way are no mixture; leave it out")


class PiFlow(Method):
    """One player, whose passes say policies."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        if student is None:
            settings = PolicySettings(config.policy, config.components, config.substeps)
            angles = torch.stack([self.schedule.angle(level) for level in self.levels_in()])
            student = policy_player(teacher.player("student"), settings, teacher.shape[0], angles)
        self.student: Any = student
        self.players = {"student": student}

    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", partial(self.student_turn, step))]

    def sampler(self) -> Sampler:
        """A pass at each level, whose policy leads to the next."""
        return Sampler(self.student, self.levels_in(), DDIM())

    def share(self, step: int) -> float:
        """How much of the way from a state to the next is the teacher's."""
        return self.config.teacher_share * max(0.0, 1 - step / self.config.mixing_steps)

    def dropped(self, policy: Policy, batch: Batch) -> Policy:
        """A mixture without some of its Gaussians, but not without all of them."""
        if not isinstance(policy, Mixture) or not self.config.component_dropout:
            return policy
        k = policy.values.shape[1]
        u = batch.draw("student/components", lambda n, draw: torch.rand(n, k, generator=draw, device=draw.device))
        out = (u < self.config.component_dropout) & (u < u.max(1, keepdim=True).values)
        return replace(
            policy, logits=policy.logits.masked_fill(out.reshape(*u.shape, *[1] * (policy.logits.ndim - 2)), -1e9)
        )

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


METHOD = PiFlow
