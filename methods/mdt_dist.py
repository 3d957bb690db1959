"""MDT-dist: few-step flow for 3D generation via marginal-data transport distillation.

Zhou, Wang et al. 2025, arXiv:2509.04406 (code: Zanue/MDT-dist 10faf36).

The student takes the teacher's time alone and learns the average velocity u of the path from z_s down to data, so that
z_s - s u is its end. By the identity of `mean_flow` for the whole way, velocity matching pulls u to

    u_target = v - s du/ds,    v the guided teacher's velocity, du/ds along it.

Its gradient treats a target that the student moves as fixed, and it sees the images' noised points alone. So velocity
distillation does the same where the student's own samples x = f(z) are, noised anew, and hands what u misses there to
what made them:

    loss = |u - sg u_target|^2 + lambda |x - sg(x + (u - u_target)(x_s, s))|^2,    x_s = (1 - s) sg x + s eps.

If u is the exact average velocity of the law of the samples, u - u_target is that law's velocity less the teacher's,
times the Jacobian of the map from z_s to clean data, since du/ds is taken along the teacher's velocity: a direction of
distribution matching (DMD), without a fake score. Nothing here is about images: samples may be points, latents of three
dimensions, or anything else that a network takes.

All that follows is for any teacher: in the normal form, with F the student's velocity, rho = data_std sin + cos,

    u - u_target = rho(t)^2 (cos(t) (F - v) + sin(t) (x_t + dF/dt)).

Deviations:
- The authors divide du/ds by its norm plus 0.1, which moves the minimum away from the average velocity; `derivative_c`
  does so. By default velocity matching has u - u_target divided as a whole (`norm`), which leaves the minimum where it
  is, and du/ds counts more and more over a warm-up, both as in `scm`: undivided, trainings of digits diverged.
- Their derivative is a difference backwards over 0.01 of the way; here `--derivative` chooses, as in every method.
- Velocity distillation draws times and noise of its own; theirs reuses those of the images, logit-normal (1, 1). Here
  those of images reach further, to the pure noise that one step begins with.
- lambda is 1 in the authors' code, whose rate is 4e-8. From a teacher far from few steps it is 0.1 here: in the plane 1
  led far off, and rates are to be low (`digits`: a quarter of `scm`'s).
- Both terms of x are in the data's units; the authors' term is in u at pure noise, which is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import logit_normal
from diffdistill.options import TangentNorm, TangentOptions, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point, TangentMethod, normalised

ABOUT = About(
    paper="Zhou et al. 2025, arXiv:2509.04406",
    data="real samples, images or not, to place z_s where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "velocity matching": "MDTDist.regression, MDTDist.gap",
        "du/ds": "scaffold.tangent.TangentMethod.derivative, scaffold.tangent.normalised",
        "velocity distillation": "MDTDist.second_term, MDTDist.missed",
        "times": "MDTDist.times, core.times.logit_normal",
        "Euler steps": "MDTDist.sampler, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(TangentOptions, TangentNorm, student_lr=1e-5):
    """MDT-dist's options; the mode is distillation. Times are flow times sigma/(alpha + sigma)."""

    time_mean: float = option(0.0, "mean of the logit of the images' times")
    time_std: float = option(2.0, "standard deviation of the logit of the images' times", above=0)
    matching_weight: float = option(
        0.1, "lambda, the weight of velocity distillation; 0: velocity matching alone", at_least=0
    )
    matching_mean: float = option(1.0, "mean of the logit of the times of the student's own samples")
    matching_std: float = option(1.0, "standard deviation of the logit of these times", above=0)
    matching_scale: float | None = option(
        None, "guidance of the teacher in velocity distillation; default: guidance_scale", at_least=0
    )
    derivative_c: float | None = option(
        None, "c of d/(|d| + c) for d = du/ds, which moves the minimum; the authors' is 0.1; default: d itself", above=0
    )


class MDTDist(TangentMethod):
    """One player, the student, which takes one time."""

    untaught = "mdt_dist matches the velocity of its teacher"

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        scale = config.guidance_scale if config.matching_scale is None else config.matching_scale
        self.judge = guided(frozen(teacher.denoiser), scale)

    def sampler(self) -> Sampler:
        """Euler's steps along the average velocity, which DDIM's are."""
        return Sampler(self.student, self.levels, DDIM())

    def angles(self, batch: Batch, stream: str, mean: float, std: float) -> Tensor:
        """(B,) logit-normal flow times, within what the student's schedule has."""
        t = batch.draw(stream, lambda n, draw: logit_normal(self.schedule, n, draw, mean, std))
        return t.clamp(self.schedule.t_min, self.schedule.t_max)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        t = self.angles(batch, "student/t", self.config.time_mean, self.config.time_std)
        return t, torch.zeros_like(t)

    def gap(self, f: Tensor, at: Point, share: float = 1.0) -> Tensor:
        """(B, ...) u - u_target in the data's units, where the student says f and the path goes on by at.v.

        `share`: of s du/ds, which counts.
        """
        own, rho, sin, cos = self.config, self.rho(at.t), torch.sin(at.t), torch.cos(at.t)
        along = expand(cos, f) * (f - at.v) + expand(sin, f) * at.x_t
        apart = expand(rho, f) * (f - at.v)  # u - v
        change = expand(rho, f) * (expand(rho, f) * along + self.derivative(at, rho * sin)) - apart  # s du/ds
        if own.derivative_c is not None:
            s = expand(self.flow_time(at.t), f)
            change = s * normalised(change / s, "l2", own.derivative_c)
        return apart + share * change

    def regression(self, step: int, at: Point) -> Outcome:
        """|u - sg u_target|^2, the mean over all elements."""
        f, rho = self.velocity(at), self.rho(at.t)
        gap = normalised(self.gap(f.detach(), at, self.config.warm(step)), self.config.norm, self.config.norm_c)
        target = f.detach() - gap / expand(rho, f)
        loss = (expand(rho, f) * (f - target)).square().mean()
        return Outcome(loss, {"matching": loss})

    @torch.no_grad()
    def missed(self, x: Tensor, batch: Batch, seed: int) -> Tensor:
        """(B, ...) u - u_target where samples x (B, ...) of the student are, noised anew."""
        t = self.angles(batch, "matching/t", self.config.matching_mean, self.config.matching_std)
        x_t = diffuse(x, t, batch.randn("matching/eps"))
        v = self.judge(x_t, t, batch.cond).v
        at = Point(x_t, t, v, torch.zeros_like(t), batch.cond, seed)
        return self.gap(self.velocity(at), at)

    def second_term(self, batch: Batch) -> Outcome | None:
        """lambda |x - sg(x + u - u_target)|^2 of the student's one-step samples."""
        if not self.config.matching_weight:
            return None
        seed, (z, start) = seed_for(*batch.key, "matching/dropout"), self.sampler().start(batch.randn("matching/z"))
        with seeded(seed, z.device):
            x = self.student(z, start, batch.cond).x0
        gap, x = self.missed(x.detach(), batch, seed), self.schedule.data_std * x
        loss = (x - (x + gap).detach()).square().mean()
        return Outcome(self.config.matching_weight * loss, {"distillation": loss})


METHOD = MDTDist
