"""Multistep consistency: Multistep Consistency Models.

Heek, Hoogeboom, Salimans, 2024, arXiv:2403.06807 (v3; no official code).

The noise levels are cut into `segments`, and f has to be the same along a trajectory only within a segment: it
says where the trajectory leaves it. One segment is a consistency model, as many as the teacher's steps are a
diffusion model. From x_t one step of the teacher gives x_r; f(x_r, r) and a DDIM step give z_e at the segment's
end e; the x0 whose DDIM step from x_t lands there as well is what f(x_t, t) is pulled to. The teacher's step is
adjusted DDIM, which lengthens the noise by the variance that DDIM leaves out. Sampling is DDIM, one step a segment.

Deviations: the paper cuts the time of its cosine schedule evenly. Here the segments lie between the levels of the
teacher's own sampler (`schedule.student_levels`), so that a stock sampler repeats the student, and are cut into
steps evenly in the angle, which is the cosine schedule's time. Points below the least level that the network knows
are moved there. The
last step of a segment that ends at 0 takes x_r itself for z_e. `snr_plus_one` weighs the norm of the error in x0,
as Algorithm 1 prints it; the text calls it equivalent to a v-loss, which for a norm that is not squared would be
`v`. The variance is eta |x0_teacher - x0|^2/d of each sample, as in Algorithm 1, which leaves out the eta of
Algorithm 3. The paper gives no learning rate. `huber_c` counts in the data's own units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide_with_conditional, guided
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import addim_step, inverse_ddim
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.core.schedule import student_levels
from diffdistill.errors import UserError
from diffdistill.options import ImageDistance, StudentOptions, TeacherGuidance, option
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.following import FollowingMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Heek et al. 2024, arXiv:2403.06807",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "multistep consistency loss in x0 (eq. 7, Algorithm 1)": "MultistepConsistency.following",
        "z_ref and its x0 (eq. 5, Algorithm 1)": "MultistepConsistency.reference, core.ode.inverse_ddim",
        "adjusted DDIM (eq. 14, Algorithm 3)": "core.ode.addim_step, MultistepConsistency.less_noisy",
        "N_teacher(i), log-linear (appendix A.1)": "MultistepConsistency.per_segment",
        "sampling (Algorithm 2)": "players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, ImageDistance, TeacherGuidance, student_lr=1e-4, huber_c=1e-4):
    """The options of multistep consistency models; the pseudo-Huber distance is close to the norm of a whole sample."""

    mode: Literal["distillation", "training"] = option(
        "distillation", "training: x_r has the noise of x_t, and no teacher takes part"
    )
    segments: int = option(4, "parts of the noise levels, each left with one sampling step", at_least=1)
    eta: float = option(0.75, "the share of |x0_teacher - x0|^2 that adjusted DDIM adds; 0: DDIM", at_least=0)
    teacher_steps_start: int = option(64, "the teacher's steps over all segments at the start", at_least=1)
    teacher_steps_end: int = option(1280, "the teacher's steps at the end of the annealing", at_least=1)
    anneal_steps: int = option(
        100000, "training steps in which the teacher's steps go from start to end, evenly in the logarithm", at_least=1
    )
    loss_weight: Literal["snr_plus_one", "v", "uniform"] = option(
        "snr_plus_one", "snr_plus_one, uniform: weight of the distance in x0; v: the distance in v"
    )


class Segment(NamedTuple):
    """t, the less noisy r and the segment's end e, all (B,)."""

    t: Tensor
    r: Tensor
    e: Tensor


class MultistepConsistency(FollowingMethod[Segment]):
    """The student is its own target."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student or teacher.player("student"), slow_target=False)
        if config.guidance_scale != 1:
            if config.mode == "training":
                raise UserError(
                    f"guidance_scale: {config.guidance_scale} guides the teacher's step, and mode training has none"
                )
            guided(self.teacher, config.guidance_scale)  # which refuses a teacher without a null condition

    def sampler(self) -> Sampler:
        levels = student_levels(self.schedule, self.config.segments, option="segments")
        return Sampler(self.student, levels.tolist(), DDIM())

    def per_segment(self, step: int) -> int:
        """The teacher's steps in a segment at that training step."""
        c = self.config
        done = min(step / c.anneal_steps, 1)
        return max(1, round(c.teacher_steps_start ** (1 - done) * c.teacher_steps_end**done / c.segments))

    def grid(self, step: int) -> Tensor:
        """(segments, per_segment + 1) descending angles, each row from a level of the sampler to its segment's end."""
        tops = torch.stack([self.schedule.angle(level) for level in self.sampler().levels])
        ends = torch.cat([tops[1:], torch.zeros(1, dtype=torch.float64)])
        part = torch.linspace(0, 1, self.per_segment(step) + 1, dtype=torch.float64)
        grid = torch.lerp(tops[:, None], ends[:, None], part).clamp_min(self.schedule.t_min)
        grid[:, -1] = ends
        return grid

    def interval(self, step: int, batch: Batch) -> Segment:
        grid = self.grid(step)

        def cells(n: int, draw: torch.Generator) -> Tensor:
            row = torch.randint(len(grid), (n,), generator=draw, device=draw.device)
            return torch.stack([row, torch.randint(grid.shape[1] - 1, (n,), generator=draw, device=draw.device)], 1)

        row, i = batch.draw("student/t", cells).unbind(1)
        grid = grid.to(row.device)
        return Segment(grid[row, i], grid[row, i + 1], grid[row, -1])

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Segment, cond: Cond) -> Tensor:
        if self.config.mode == "training":
            return diffuse(x0, interval.r, eps)
        pred, conditional = self.predictions(x_t, interval.t, cond)
        x_var = self.config.eta * per_sample_mean((conditional.x0 - x0).square())
        return addim_step(pred, interval.r, x_var)

    def predictions(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """The teacher's guided prediction, and the conditional one, of which the variance is taken; one call."""
        if self.config.guidance_scale == 1:
            pred = self.teacher(x_t, t, cond)
            return pred, pred
        scale = torch.full_like(t, self.config.guidance_scale)
        return guide_with_conditional(self.teacher, x_t, t, cond, scale)

    @torch.no_grad()
    def reference(self, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Cond) -> Tensor:
        """(B, ...) x_ref: its DDIM step from x_t to e lands where the student's from x_r does."""
        t, r, e = interval
        z_e = torch.where(expand(r - e, x_r) <= 0, x_r, self.student(x_r, r, cond).at(e))
        return inverse_ddim(z_e, x_t, t, e)

    def following(self, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Cond, seed: int = 0) -> Outcome:
        """w(t) d(f(x_t, t), sg x_ref)."""
        x0, x_ref = self.both(
            seed,
            x_t,
            lambda: self.student(x_t, interval.t, cond).x0,
            lambda: self.reference(x_t, x_r, interval, cond),
        )
        sin = torch.sin(interval.t)
        if self.config.loss_weight == "v":  # v is (cos(t) x_t - x0)/sin(t)
            d = self.image_distance(x0 / expand(sin, x0), x_ref / expand(sin, x0))
        else:
            d = self.image_distance(x0, x_ref)
        weighted = (sin**-2).to(d) * d if self.config.loss_weight == "snr_plus_one" else d
        return Outcome(weighted.mean(), {"distance": d.mean()})


METHOD = MultistepConsistency
