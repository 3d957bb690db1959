"""SCott: Stochastic Consistency Distillation.

Liu, Xie, Ye, Deng, Chen, Tang, Fu, Lu, Zha 2024, arXiv:2403.01505. No training code by the authors was found.

In consistency distillation the less noisy point x_r is a step of the teacher's ODE away from x_t. Here several steps of
its SDE lead there, which corrects errors of the way as it adds noise: `sde_steps` DDIM steps of the guided teacher,
each of which exchanges some of the noise that it leads to for fresh noise,

    x_s = cos(s) x0 + sqrt(sin(s)^2 - n^2) eps + n z,    n = eta sin(s)/sin(t) sqrt(1 - cos(t)^2/cos(s)^2),

which for a VP teacher is DDIM with its eta (arXiv:2010.02502, eq. 16). With f the student's x0 and f- a slow copy's,

    loss = |f(x_t, t) - sg f-(x_r, r)|^2 + lambda GAN, of f and images (hinge).

What is learned by the first term alone is the mean of f over what the SDE may do: with eta = 0 the end of the
trajectory, with eta = 1 and ever finer steps E[x0 | x_t], which is blurred. So eta is small, r near to t, or the GAN is
there. `verify` measures it.

Deviations:
- The paper's solver is ER-SDE or DDIM with eta; here it is the latter.
- The GAN is that of `ladd`: heads on the frozen teacher, which reads noised images. Theirs is a LoRA copy of the
  network. It moves in every step, after the student.
- The grid has N steps of the teacher's own sampler, of which `skip` are between t and r; theirs are 24 of 1000.
  Here they are 12 of 500, as long: a flow whose noisiest level is 0.999 has no room for 1000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import elementwise
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_eta_step
from diffdistill.core.prediction import expand
from diffdistill.errors import UserError
from diffdistill.options import AdversarialTerm, ElementDistance, FollowingOptions, TeacherGuidance, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.following import FollowingMethod, trajectory_grid
from diffdistill.scaffold.method import Batch, Outcome, Turn

ABOUT = About(
    paper="Liu et al. 2024, arXiv:2403.01505",
    data="real images, to place x_t where the trajectories pass, and for the GAN",
    kind="trajectory",
    needs=("images",),
    equations={
        "stochastic consistency loss": "SCott.following, scaffold.following.FollowingMethod.after_step",
        "steps of the teacher's SDE": "SCott.less_noisy, core.ode.ddim_eta_step",
        "GAN": "SCott.whole_loss, scaffold.adversary.LatentAdversary",
        "multistep sampling": "players.sampler.Renoise",
    },
)


@dataclass(frozen=True)
class Config(FollowingOptions, TeacherGuidance, ElementDistance, AdversarialTerm, student_lr=8e-6, distance="l2"):
    """SCott's options."""

    solver_steps: int = option(500, "N, the steps of the grid from noise to data", at_least=1)
    skip: int = option(12, "the steps of the grid from t to r", at_least=1)
    sde_steps: int = option(3, "h, the teacher's stochastic steps from t to r; skip is a multiple", at_least=1)
    eta: float = option(0.1, "the share of fresh noise in them; 0: the ODE; 1: DDPM's", at_least=0, at_most=1)

    def check(self) -> None:
        if self.skip % self.sde_steps:
            raise UserError(f"sde_steps: {self.sde_steps} do not divide skip ({self.skip}) evenly")
        if self.skip > self.solver_steps:
            raise UserError(f"skip: {self.skip} is more than all solver_steps ({self.solver_steps})")


class Walk(NamedTuple):
    """t (B,), the first of the angles (h + 1, B) that the SDE passes, and its noise (h, B, ...)."""

    t: Tensor
    path: Tensor
    noise: Tensor


class SCott(FollowingMethod[Walk]):
    """With a GAN the discriminator's heads are a player too."""

    trained_steps = range(1, 1001)

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student or teacher.player("student"), slow_target=True)
        self.x: Tensor | None = None  # the student's samples of the turn that is computed
        self.guided = guided(self.teacher, config.guidance_scale)
        first = self.sampler().levels[0]
        n, level = config.solver_steps, config.student_level
        self.grid = trajectory_grid(self.schedule, n + 1, "native", first, level, option="solver_steps")

    def interval(self, step: int, batch: Batch) -> Walk:
        n, h = self.config.solver_steps, self.config.sde_steps
        i, apart = batch.integers(n, "student/t"), self.config.skip // h
        places = [(i + k * apart).clamp(max=n) for k in range(h + 1)]
        noise = torch.stack([batch.randn(f"student/sde {k}") for k in range(h)])
        path = self.grid.to(i.device)[torch.stack(places)]
        return Walk(path[0], path, noise)

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Walk, cond: Cond) -> Tensor:
        """Steps of the SDE; those that have come to clean data stay there."""
        x = x_t
        for t, s, z in zip(interval.path[:-1], interval.path[1:], interval.noise, strict=True):
            moved = ddim_eta_step(self.guided(x, t, cond), s, self.config.eta, z)
            x = torch.where(expand(t - s, x) <= 0, x, moved)
        return x

    def following(self, x_t: Tensor, x_r: Tensor, interval: Walk, cond: Cond, seed: int = 0) -> Outcome:
        """|f(x_t, t) - sg f-(x_r, r)|^2; clean data are their own target."""
        r = interval.path[-1]
        own, slow = lambda: self.student(x_t, interval.t, cond).x0, lambda: self.target(x_r, r, cond).x0
        f, other = self.both(seed, x_t, own, slow)
        self.x = f
        target = torch.where(expand(r, x_r) <= 0, x_r, other)
        d = elementwise(self.config.distance, f, target.to(f), self.config.huber_c)
        return Outcome(d, {"stochastic": d})

    def whole_loss(self, followed: Outcome, batch: Batch) -> Outcome:
        (x, self.x), weight = (self.x, None), self.config.gan_weight
        if not weight:
            return followed
        judged = self.adversary.student_loss(x, batch)
        return Outcome(followed.loss + weight * judged, {**followed.shown, "gan": judged})

    def more_turns(self, step: int) -> Sequence[Turn]:
        return [Turn("discriminator", self.adversary.turn)] if self.config.gan_weight else []


METHOD = SCott
