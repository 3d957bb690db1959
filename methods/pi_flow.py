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

`arc_flow` is the same loop with another policy, of momenta.

Read in the authors' code. Deviations:
- States and small steps are evenly spaced in the angle, each state in a part of its own; theirs in the unshifted time.
- The stretches are those of the student's levels; with the authors the last one is half as long.
- The error is that of v in the normal form, between 0.7 and 1 times a flow's own, without their factor of 30.
- The student's path leads from noise through the levels before; the authors may begin at noised images as well.
- The width of a mixture is one number of the image, a mean over the network's output; theirs is of the time embedding.
- `teacher_share` leads from each state on by one step of the teacher, for a share of the way to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffdistill.catalogue import About
from diffdistill.errors import UserError
from diffdistill.options import ImitationOptions, option
from diffdistill.players.policy import PolicySettings
from diffdistill.scaffold.policies import ImitationMethod

ABOUT = About(
    paper="Chen et al. 2025, arXiv:2510.14974",
    data="nothing",
    kind="trajectory",
    equations={
        "the policy of a mixture (GMFlow)": "core.policies.Mixture.x0",
        "the policy of values on the way (DX)": "core.policies.Nodes.x0",
        "integration without the network": "core.policies.Policy.roll",
        "policy imitation (pi-ID)": (
            "scaffold.policies.ImitationMethod.student_turn, scaffold.policies.ImitationMethod.velocity"
        ),
        "mixing with the teacher's path": "scaffold.policies.ImitationMethod.share",
        "dropout of components": "scaffold.policies.ImitationMethod.dropped",
        "sampling": "scaffold.policies.PolicyMethod.sampler, players.policy.PolicyDenoiser",
    },
)


@dataclass(frozen=True)
class Config(ImitationOptions):
    """pi-Flow's options."""

    student_steps: int = option(4, "the student's passes", at_least=1)
    policy: Literal["mixture", "nodes"] = option(
        "mixture", "what a pass gives: a mixture of Gaussians at each position, or values of x0 on the way"
    )
    components: int = option(8, "K, the Gaussians of a mixture, or the values on the way", at_least=1)

    def check(self) -> None:
        if self.policy == "nodes" and self.components < 3:
            raise UserError(f"components: {self.components} values on the way are too few; give 3 or more")
        if self.policy == "nodes" and self.component_dropout:
            raise UserError("component_dropout: values on the way are no mixture; leave it out")


class PiFlow(ImitationMethod):
    """One player, whose passes say mixtures, or values on the way."""

    def settings(self) -> PolicySettings:
        return PolicySettings(self.config.policy, self.config.components, self.config.substeps)


METHOD = PiFlow
