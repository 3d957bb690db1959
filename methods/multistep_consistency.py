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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.guidance import guided
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import addim_step, inverse_ddim
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.core.schedule import student_levels
from diffdistill.errors import UserError
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Heek et al. 2024, arXiv:2403.06807"
DATA = "real images, to place x_t where the trajectories pass"
EQUATIONS = {
    "multistep consistency loss in x0 (eq. 7, Algorithm 1)": "MultistepConsistency.consistency",
    "z_ref and its x0 (eq. 5, Algorithm 1)": "MultistepConsistency.reference, ode.inverse_ddim",
    "adjusted DDIM (eq. 14, Algorithm 3)": "ode.addim_step, MultistepConsistency.less_noisy",
    "N_teacher(i), log-linear (appendix A.1)": "MultistepConsistency.per_segment",
    "sampling (Algorithm 2)": "players.FewStepSampler",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 250,
        "batch_size": 64,
        "segments": 2,
        "eta": 0.0,
        "teacher_steps_start": 16,
        "teacher_steps_end": 32,
        "anneal_steps": 200,
        "loss_weight": "v",
        "student_lr": 5e-4,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "imagenet64": {
        "steps": 200000,
        "batch_size": 2048,
        "segments": 8,
        "eta": 0.75,
        "teacher_steps_start": 64,
        "teacher_steps_end": 1280,
        "anneal_steps": 100000,
        "huber_c": 1e-4,
    },
    "text-to-image": {
        "steps": 30000,
        "batch_size": 2048,
        "segments": 16,
        "eta": 0.75,
        "teacher_steps_start": 256,
        "teacher_steps_end": 256,
        "huber_c": 1.0,
    },
}
PASSES = {"digits": 3}
SCALES = ["anneal_steps"]
END_TO_END = {
    "kind": "trajectory",
    "options": {
        "segments": 2,
        "eta": 0.0,
        "teacher_steps_start": 32,
        "teacher_steps_end": 32,
        "loss_weight": "v",
        "steps": 2000,
        "student_lr": 1e-3,
    },
}


@dataclass(frozen=True)
class Config:
    """The options of multistep consistency models."""

    mode: Literal["distillation", "training"] = option(
        "distillation", "training: x_r has the noise of x_t, and no teacher takes part"
    )
    segments: int = option(4, "parts of the noise levels, each left with one sampling step", at_least=1)
    eta: float = option(0.75, "the share of |x0_teacher - x0|^2 that adjusted DDIM adds; 0: DDIM", at_least=0)
    teacher_steps_start: int = option(64, "the teacher's steps over all segments at the start", at_least=1)
    teacher_steps_end: int = option(1280, "... and at the end of the annealing", at_least=1)
    anneal_steps: int = option(100000, "training steps from the one to the other, evenly in the logarithm", at_least=1)
    distance: Literal["huber", "l2"] = option("huber", "huber: close to the norm of the whole sample; l2: squared")
    huber_c: float = option(1e-4, "pseudo-Huber's c", above=0)
    loss_weight: Literal["snr_plus_one", "v", "uniform"] = option(
        "snr_plus_one", "of the distance in x0; v: the distance in v"
    )
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    student_lr: float = option(1e-4, "AdamW's learning rate", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)


class MultistepConsistency:
    """One player, which is its own target."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        if config.guidance_scale != 1 and config.mode == "training":
            raise UserError(
                f"guidance_scale: {config.guidance_scale} guides the teacher's step, and this mode has none"
            )
        self.config = config
        self.schedule = teacher.denoiser.schedule
        guided(teacher.denoiser, config.guidance_scale)  # a teacher without a null condition is refused
        self.teacher = frozen(teacher.denoiser)
        self.student = student or teacher.player("student")
        self.distance = distance(config.distance, teacher.shape, self.schedule.data_std, config.huber_c)
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", partial(self.student_turn, step))]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        levels = student_levels(self.schedule, self.config.segments)
        return FewStepSampler(self.student, levels.tolist(), renoise=False)

    # -- times ---------------------------------------------------------------------------------------------

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

    def times(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t, the less noisy r and the segment's end e, all (B,)."""
        draw = batch.generator("student/t")
        grid = self.grid(step).to(draw.device)
        row = torch.randint(len(grid), (batch.size,), generator=draw, device=draw.device)
        i = torch.randint(grid.shape[1] - 1, (batch.size,), generator=draw, device=draw.device)
        return grid[row, i], grid[row, i + 1], grid[row, -1]

    # -- the loss ------------------------------------------------------------------------------------------

    def student_turn(self, step: int, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        t, r, e = self.times(step, batch)
        eps = batch.randn("student/eps")
        x_t = diffuse(batch.x0, t, eps)
        x_r = self.less_noisy(x_t, batch.x0, eps, t, r, batch.cond)
        return self.consistency(x_t, x_r, t, r, e, batch.cond, seed_for(*batch.key, "student/dropout"))

    @torch.no_grad()
    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_r: adjusted DDIM with the teacher from x_t, or x0 under the same noise as x_t."""
        if self.config.mode == "training":
            return diffuse(x0, r, eps)
        pred, conditional = self.predictions(x_t, t, cond)
        x_var = self.config.eta * per_sample_mean((conditional.x0 - x0).square())
        return addim_step(pred, r, x_var)

    def predictions(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """The teacher's guided prediction, and the conditional one, of which the variance is taken; one call."""
        if self.config.guidance_scale == 1:
            pred = self.teacher(x_t, t, cond)
            return pred, pred
        assert self.teacher.null is not None
        null = self.teacher.null(cond)
        both = self.teacher(
            torch.cat([x_t, x_t]), torch.cat([t, t]), {key: torch.cat([cond[key], null[key]]) for key in cond}
        )
        y, y_null = both.y.chunk(2)
        conditional = Prediction(x_t, both.t[: len(t)], y, both.a[: len(t)], both.b[: len(t)])
        return conditional.with_output(y_null + self.config.guidance_scale * (y - y_null)), conditional

    @torch.no_grad()
    def reference(self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, e: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_ref: its DDIM step from x_t to e lands where the student's from x_r does."""
        z_e = torch.where(expand(r - e, x_r) <= 0, x_r, self.student(x_r, r, cond).at(e))
        return inverse_ddim(z_e, x_t, t, e)

    def consistency(
        self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, e: Tensor, cond: Cond, seed: int = 0
    ) -> dict[str, Tensor]:
        """w(t) d(f(x_t, t), sg x_ref); both passes of the student drop the same units."""
        with seeded(seed, x_t.device):
            x0 = self.student(x_t, t, cond).x0
        with seeded(seed, x_t.device):
            x_ref = self.reference(x_t, x_r, t, r, e, cond)
        if self.config.loss_weight == "v":  # v is (cos(t) x_t - x0)/sin(t)
            d = self.distance(x0 / expand(torch.sin(t), x0), x_ref / expand(torch.sin(t), x0))
        else:
            d = self.distance(x0, x_ref)
        snr_plus_one = (torch.sin(t) ** -2).to(d)
        weighted = snr_plus_one * d if self.config.loss_weight == "snr_plus_one" else d
        return {"loss": weighted.mean(), "distance": d.mean()}


METHOD = MultistepConsistency
