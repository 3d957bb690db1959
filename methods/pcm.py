"""PCM: Phased Consistency Models.

Wang, Huang, Bergman, Shen, Gao, Lingelbach, Sun, Bian, Song, Liu and others 2024, arXiv:2405.18407 (code:
G-U-N/Phased-Consistency-Model).

A consistency model says where a trajectory ends, so that more steps need fresh noise, and none of them comes to what
the teacher makes of the first. Here the trajectory is cut into K phases, and f(x_t, t), one DDIM step to the lower
edge e of the phase that t is in, has to be the same all along a phase. With x_r one guided step of the teacher from
x_t, and at the edge f(x_r, e) = x_r itself,

    loss = d(f(x_t, t), sg f(x_r, r)) + lambda GAN,

K deterministic steps are then the trajectory. The GAN tells f from its target, which counts as real, after both have
been noised from the edge to a level of the same phase: at the optimum of the first term it has nothing to tell.

Read in the authors' code. Guidance scales here are diffusers' a = 1 + w with theirs: w in [4, 5] is guidance_scale
5.5, guidance_spread 0.5.

Deviations:
- The N steps are those of the teacher's own sampler, and N is a multiple of K, so that a stock sampler repeats the
  student. The authors' edges for N = 50 and K = 4, 739 the highest, are none of those that they sample at, 749.
- d is taken in the normal form, which for a VP teacher is its own latents. Data of another standard deviation are
  divided by it.
- Both players move in every step, the discriminator on the student's ends of that step; with the authors they take
  turns. Its heads are those of `ladd`: convolutions on a few of the frozen teacher's layers, where theirs read all of
  the way down.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.errors import UserError
from diffdistill.options import SegmentOptions, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.segments import SegmentMethod

ABOUT = About(
    paper="Wang et al. 2024, arXiv:2405.18407",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "phased consistency distillation loss": (
            "scaffold.segments.SegmentMethod.following, scaffold.segments.SegmentMethod.jumped"
        ),
        "the phases and their edges": "PCM.ends, scaffold.segments.SegmentMethod.interval",
        "f, the solver's step to the edge": "scaffold.segments.SegmentMethod.jump",
        "guided step of the teacher": ("scaffold.segments.SegmentMethod.less_noisy, players.scale_input.DrawnGuidance"),
        "adversarial consistency loss": ("scaffold.adversary.EdgeAdversary, core.losses.hinge_discriminator_loss"),
        "deterministic sampling": "PCM.sampler, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(SegmentOptions, student_lr=5e-6):
    """PCM's options."""

    phases: int = option(4, "K, the phases, each left with one sampling step; solver_steps is a multiple", at_least=1)

    def check(self) -> None:
        if self.solver_steps % self.phases:
            near = max(1, self.solver_steps // self.phases) * self.phases
            raise UserError(f"solver_steps: {self.solver_steps} do not divide into {self.phases} phases; say {near}")


class PCM(SegmentMethod):
    """The student is its own target."""

    @property
    def steps_in(self) -> int:
        """The teacher's steps in a phase."""
        return self.config.solver_steps // self.config.phases

    def sampler(self) -> Sampler:
        """One deterministic step for each phase."""
        return Sampler(self.student, self.levels[:: self.steps_in], DDIM())

    def ends(self, step: int, i: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """A step that ends at an edge belongs to the phase above it."""
        phase, grid = i // self.steps_in, self.grid.to(i.device)
        return grid[phase * self.steps_in], grid[(phase + 1) * self.steps_in]


METHOD = PCM
