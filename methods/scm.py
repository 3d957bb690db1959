"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models.

Lu & Song 2024, arXiv:2410.11081 (no code by the authors; read in NVlabs/FastGen and diffusers' SANA-Sprint script).

A consistency model f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t) is the same along a trajectory if df/dt = 0. That total
derivative is the signal itself, without a step from one time to another: one Jacobian-vector product of the network
along dx_t/dt. Mode distillation is the paper's sCD, whose direction is the teacher's, guided if wanted; mode training
is its sCT, whose direction is that of the image and its noise. With F- the value of F, which gets no gradient,

    g = -cos(t)^2 (F- - dx/dt) - r (cos(t) sin(t) x_t + cos(t) sin(t) dF-/dt),    g <- g/(|g| + c),
    loss = e^(-w(t))/tan(t) |F - F- - g|^2 + w(t),

g being cos(t) df/dt at r = 1, to which r rises from 0; the adaptive weight w is a small network of t.

Truncation (TCM: Lee et al. 2024, arXiv:2410.14895, code: NVlabs/TCM) is a second stage on a student of the first: only
times above `truncate_at` are trained, and at that time the student is held to what it was when it began.

Deviations:
- F is the velocity of the normal form of any network, which is TrigFlow's F. A network whose embedding of the time has
  high frequencies has a large derivative (section 4 of the paper changes the embedding); nothing is changed here.
- The weight is 1/tan(t) where the paper has 1/(sigma_d tan(t)); w learns the factor, which Adam does not see either.
- `norm`: FastGen's |g| is the root mean square, SANA-Sprint's and rCM's the l2 norm, where the same c is much smaller.
- AdamW stands for RAdam. The sampler's levels are evenly spaced in the schedule, not searched for by FID.
- TCM is discrete; here its composite is the loss above on t > t', with the boundary's term beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import expand
from diffdistill.core.times import edm_log_normal
from diffdistill.errors import UserError
from diffdistill.options import AdaptiveWeightRate, TangentOptions, TangentTarget, option
from diffdistill.players.adaptive_weight import AdaptiveWeight
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.continuous import ContinuousMethod
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point, refuse_unused_guidance

ABOUT = About(
    paper="Lu & Song 2024, arXiv:2410.11081",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "f = cos(t) x - sin(t) F (section 3)": "core.prediction.Prediction",
        "tangent with the factor cos(t) sin(t) inside (section 4.2)": "scaffold.tangent.TangentMethod.derivative",
        "g and its warm-up (Algorithm 1)": ("scaffold.continuous.ContinuousMethod.tangent, options.TangentTarget.warm"),
        "tangent normalisation (section 4.2)": (
            "scaffold.continuous.ContinuousMethod.target, scaffold.tangent.normalised"
        ),
        "loss with the adaptive weight (eq. 8)": (
            "SCM.regression, scaffold.continuous.ContinuousMethod.weighed, "
            "scaffold.continuous.ContinuousMethod.weight_turn, players.adaptive_weight.AdaptiveWeight"
        ),
        "times (section 4)": "SCM.times, core.times.edm_log_normal",
        "multistep sampling": "scaffold.tangent.TangentMethod.sampler, players.sampler.Renoise",
    },
)


@dataclass(frozen=True)
class Config(TangentOptions, TangentTarget, AdaptiveWeightRate, student_lr=1e-4):
    """The options of sCM."""

    adaptive: bool = option(True, "learn a weight of each time, which makes the losses of all times alike")
    truncate_at: float | None = option(
        None, "TCM: the sigma, for data of deviation 0.5, below which nothing is trained; none: no such stage", above=0
    )
    boundary_weight: float = option(0.1, "TCM: the weight of the samples at truncate_at", at_least=0)


class SCM(ContinuousMethod):
    """f is the student's x0; without a second time."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        refuse_unused_guidance(1.0 if self.from_teacher else config.guidance_scale, "mode training has none")
        self.weight = AdaptiveWeight()
        if config.adaptive:
            self.players["weight"] = self.weight
        self.least = math.atan((config.truncate_at or 0.0) / 0.5)
        if self.least and self.from_teacher:
            raise UserError(
                "truncate_at: the second stage follows the data from the first stage's student; use mode training"
            )

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draws below `truncate_at` are set to it, where the student is held."""
        normal = self.config.time_mean, self.config.time_std
        t = batch.draw("student/t", lambda n, draw: edm_log_normal(self.schedule, n, draw, *normal))
        return t.clamp_min(self.least), torch.zeros_like(t)

    def regression(self, step: int, at: Point) -> Outcome:
        """The squared error against F- + g, weighted by time."""
        c, f = self.config, self.velocity(at)
        target, weight = self.target(f, at, c.warm(step)), 1 / torch.tan(at.t)
        if self.least:
            held = at.t <= self.least
            first_stage = self.teacher(at.x_t, at.t, at.cond).v.detach()
            target = torch.where(expand(held, f) > 0, first_stage, target)
            weight = torch.where(held, c.boundary_weight, 1.0) * weight
        return self.weighed(weight.to(f) * per_sample_mean((f - target).square()), at)


METHOD = SCM
