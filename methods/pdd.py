"""PDD: Parallel Decoding Distillation.

Shaul, Liu, Vahdat, Berner 2026, arXiv:2607.26004 (code: NVIDIA's Model-Optimizer, pull request 2329).

The teacher's sampler takes N steps. The student has a head for each of them, a copy of its teacher's last layer, and
one pass of the network at step n gives what the teacher would say at all steps that follow. With u_k head k's output,

    x_k = x_n + the steps n, .., k - 1 by u_n, .., u_(k-1),     loss = mean over k of |u_k - u_teacher(x_k, t_k)|^2,

where x_k gets no gradient. What head k should say depends on the heads before it alone. So there is one optimum, and
there a pass makes many of the teacher's own steps exactly: the teacher's N steps are the best that can be reached. x_n
is where the student's own passes lead from noise, and no image is needed. A student that is trained for several numbers
of passes (`more_steps`) can be sampled in each of them.

Deviations:
- All heads are computed in each pass, which costs as much as a wider last layer does. The authors fuse those of a pass,
  weighted by their steps, to one layer for each pass, which gives the same samples.
- A step trains one pass of one number of passes, both drawn, from x_n of that sampler. With the authors n is any
  multiple of the shortest block, what follows it has any length up to the longest, and x goes on from block to block.
- The error is that of v in the normal form, between 0.7 and 1 times a flow's own.
- `states` asks the teacher at some of a pass's steps, one in each part of them; with the authors at all.
- With `solver_steps` a head learns the one step that does as several of the teacher's; theirs have the midpoint rule.
- Their steps of Wan without a layer in the unguided pass are not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import ddim_step, inverse_ddim
from diffdistill.core.prediction import expand
from diffdistill.core.schedule import student_levels
from diffdistill.errors import UserError
from diffdistill.options import StudentLevel, StudentOptions, TeacherGuidance, option
from diffdistill.players.policy import PolicySettings
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.policies import PolicyMethod
from diffdistill.scaffold.simulation import drawn_level, simulated_input

ABOUT = About(
    paper="Shaul et al. 2026, arXiv:2607.26004",
    data="nothing",
    kind="trajectory",
    equations={
        "a head for each of the teacher's steps": "core.policies.Heads, players.policy.policy_player",
        "the states that the heads lead to": "core.policies.Heads.roll",
        "loss": "PDD.student_turn, PDD.velocity",
        "sampling, a block of steps a pass": "PDD.sampler, players.policy.PolicyDenoiser",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, StudentLevel, TeacherGuidance, student_lr=5e-5):
    """PDD's options."""

    intervals: int = option(32, "N, the teacher's steps from noise to data, each of which has a head", at_least=1)
    student_steps: int = option(2, "the student's passes, a divisor of the intervals", at_least=1)
    more_steps: tuple[int, ...] = option(
        (), "other numbers of passes that are trained as well, divisors of the intervals, as 4,8", at_least=1
    )
    states: int | None = option(
        None, "steps of a pass at which the teacher is asked, one in each part of it; none: all", at_least=1
    )
    solver_steps: int = option(1, "the teacher's DDIM steps that one step of a head stands for", at_least=1)

    def check(self) -> None:
        for name, steps in (("student_steps", (self.student_steps,)), ("more_steps", self.more_steps)):
            for n in steps:
                if self.intervals % n:
                    raise UserError(f"{name}: {n} is no divisor of the {self.intervals} intervals; give one that is")

    @property
    def passes(self) -> tuple[int, ...]:
        """All numbers of passes that are trained, each once."""
        return tuple(dict.fromkeys((self.student_steps, *self.more_steps)))


class PDD(PolicyMethod):
    """A pass has a head for each of the teacher's steps."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        schedule = teacher.denoiser.schedule
        levels = student_levels(schedule, config.intervals, config.student_level, option="intervals")
        self.levels = levels.tolist()
        self.nodes = torch.cat([schedule.angle(levels), torch.zeros(1, dtype=torch.float64)])
        super().__init__(teacher, config, student=student)
        self.trained_steps = config.passes

    def settings(self) -> PolicySettings:
        return PolicySettings("heads", self.config.intervals, 1, self.config.passes)

    def angles(self) -> Tensor:
        return self.nodes[:-1]

    def sampler(self) -> Sampler:
        """Passes at evenly spaced ones of the teacher's steps."""
        return self.in_passes(self.sampling_steps or self.config.student_steps)

    def in_passes(self, passes: int) -> Sampler:
        return Sampler(self.student, self.levels[:: self.config.intervals // passes], DDIM())

    def velocity(self, x: Tensor, head: Tensor, cond: Cond) -> Tensor:
        """(B, ...) v of the teacher's step from x (B, ...) at the angles of the heads (B,), or of its several steps."""
        n, (t, s) = self.config.solver_steps, (self.nodes.to(head.device)[head + j] for j in (0, 1))
        if n == 1:
            return self.teacher(x, t, cond).v
        end = x
        for j in range(n):
            end = ddim_step(self.teacher, end, torch.lerp(t, s, j / n), torch.lerp(t, s, (j + 1) / n), cond)
        return (expand(torch.cos(t), x) * x - inverse_ddim(end, x, t, s)) / expand(torch.sin(t), x)

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """One pass of one of the samplers, and the teacher where its heads lead."""
        c, nodes = self.config, self.nodes.to(batch.device)
        passes = c.passes[drawn_level(len(c.passes), batch, "student/passes")]
        k, block = drawn_level(passes, batch), c.intervals // passes
        x, here = simulated_input(self.in_passes(passes), k, batch)
        policy = self.student(x, here, batch.cond).policy
        states, u, losses = min(c.states or block, block), batch.uniform("student/head"), []
        for i in range(states):
            head = k * block + ((i + u) * block / states).long().clamp(max=block - 1)
            t = nodes[head]
            with torch.no_grad():
                x = policy.roll(x, here, t, 1)
                theirs = self.velocity(x, head, batch.cond)
            losses.append(per_sample_mean((policy.v(x, t) - theirs).square()))
            here = t
        loss = torch.stack(losses).mean()
        return Outcome(loss, {"imitation": loss})


METHOD = PDD
