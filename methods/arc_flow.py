"""ArcFlow: few-step generation by curved flows of momenta.

2026, arXiv:2602.09014 (code: pnotp/ArcFlow, which is built on pi-Flow's).

A step of a sampler is straight, and the teacher's trajectories are not. Here a pass of the student gives a velocity for
the whole way to its next level, a mixture of K momenta that grow or fall as exponentials of the flow's time, from x_s:

    u(t) = sum_k w_k m_k exp(rate_k (s - t)),    rate_0 = 0,

whatever x is, so that the way is integrated in closed form: where a pass leads costs one sum, and no small steps.
K = 1 is the Euler step. It is trained by policy imitation (`pi_flow`): along a path that the policy itself takes, its
velocity is to be the teacher's where it is,

    loss = mean over states of |v(x_t, t) - v_teacher(x_t, t)|^2,

with x_t constant. No image is needed, and a LoRA on the teacher beside the wider last layer is enough.

Read in the authors' code. Deviations:
- The flow is that of data of unit variance, also for teachers that are none; a window's velocity is its mean.
- States are evenly spaced in the angle, each in a part of its own; theirs in the unshifted time.
- The stretches are those of the student's levels; with the authors the last one is half as long.
- The error is that of v in the normal form, between 0.7 and 1 times a flow's own, without their factor of 30.
- Weights and rates are outputs of the last layer at each position, beside the momenta, and begin at zero.
- `teacher_share` leads from each state on by one step of the teacher, for a share of the way to the next.
- Their own scheduler is `pi_flow`'s here, of another kind of policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.options import ImitationOptions, option
from diffdistill.players.policy import PolicySettings
from diffdistill.scaffold.policies import ImitationMethod

ABOUT = About(
    paper="2026, arXiv:2602.09014",
    data="nothing",
    kind="trajectory",
    equations={
        "the velocity of momenta": "core.policies.Momenta.x0",
        "integration in closed form": "core.policies.Momenta.roll",
        "imitation along the student's own path": (
            "scaffold.policies.ImitationMethod.student_turn, scaffold.policies.ImitationMethod.velocity"
        ),
        "mixing with the teacher's path": "scaffold.policies.ImitationMethod.share",
        "dropout of components": "scaffold.policies.ImitationMethod.dropped",
        "sampling": "scaffold.policies.PolicyMethod.sampler, players.policy.PolicyDenoiser",
    },
)


@dataclass(frozen=True)
class Config(ImitationOptions):
    """ArcFlow's options; of the substeps none is made, they say where states lie."""

    student_steps: int = option(2, "the student's passes", at_least=1)
    momenta: int = option(16, "K, the momenta that a pass gives; 1: the Euler step", at_least=1)


class ArcFlow(ImitationMethod):
    """One player, whose passes say momenta."""

    def settings(self) -> PolicySettings:
        return PolicySettings("momenta", self.config.momenta, self.config.substeps)


METHOD = ArcFlow
