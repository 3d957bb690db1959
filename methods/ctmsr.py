"""CTMSR: consistency trajectory matching for one-step generative super-resolution.

You, Zhang, Zhang, Zhou, Shi, Gu, ICCV 2025, arXiv:2503.20349 (code: LabShuHangGU/CTMSR becaa7a).

A student that reads y, the enlarged small image, is trained without a teacher, on trajectories from y with noise to the
image x0 (ResShift's): with eta from 0 to 1

    x_eta = (1 - eta) x0 + eta y + kappa eta eps.

Consistency training: f(x_eta, y) is pulled to f at the next lesser eta under the same noise, and to x0 itself at the
last, over three or four steps from one end to the other. Distribution trajectory matching comes after it. A copy of f
that is renewed now and then judges the student's sample x and the image, under the same noise, at the lesser etas:

    loss = w |x - sg(x - (f'(x_eta of x) - f'(x_eta of x0)))|^2 / 2,    w = 1 / mean |x - x0|.

Since y is a condition too, x_eta - eta y = (1 - eta) x0 + kappa eta eps says the same to a network, and trajectories
given y are the same but for that shift, which no eps and no x0 moves. So all here is in the normal form, with
tan t = kappa eta/((1 - eta) data_std): a student begins from pure noise beside y, and its export is a stock one. Where
f is linear, matching pulls to the mean of the images given y: it is for the end of a training, at a low weight.

Deviations:
- The distance is one of `distance`, in both terms; the authors' are half LPIPS and half Charbonnier, and LPIPS.
- The student starts as the teacher and has its output and boundary; the authors' is a network of its own, c_skip and
  c_out with sigma/0.1. At the last step the target is x0 itself, as theirs.
- All samples of a step have times of their own; theirs have one in consistency training.
- kappa is counted in the data's deviation: theirs is 1 for images in [-1, 1], whose deviation is taken to be 0.5.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.divided import approach
from diffdistill.core.losses import l1_normaliser
from diffdistill.core.prediction import diffuse, expand
from diffdistill.errors import UserError
from diffdistill.options import ImageDistance, RestorationOptions, option
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Need, Outcome
from diffdistill.scaffold.solo import SoloMethod

ABOUT = About(
    paper="You et al. 2025, arXiv:2503.20349",
    data="real images, each with the small image that it is to be made from",
    kind="restoration",
    needs=("images",),
    equations={
        "trajectories from small images with noise": "CTMSR.grid",
        "consistency training": "CTMSR.student_turn",
        "distribution trajectory matching": "CTMSR.matching",
        "fewer steps as training goes on": "CTMSR.intervals",
    },
)


@dataclass(frozen=True)
class Config(RestorationOptions, ImageDistance):
    """CTMSR's options; a training takes both stages unless its steps are said."""

    kappa: float = option(2.0, "the noise beside y at the noisiest end, in the data's deviation", above=0)
    start_scales: int = option(
        4, "s0, the steps from one end of the trajectories to the other at the start", at_least=1
    )
    end_scales: int = option(3, "s1, these steps at the end", at_least=1)
    ramp_steps: int = option(500000, "training steps over which s0 becomes s1", at_least=1)
    consistency_steps: int = option(500000, "training steps after which matching begins", at_least=0)
    matching_steps: int = option(2000, "training steps with matching, after those; 0: none", at_least=0)
    matching_weight: float = option(1.6, "weight of the matching", above=0)
    matching_low: float = option(0.1, "the least eta of the matching, as a share of the grid's points", at_least=0)
    matching_high: float = option(0.5, "the greatest eta of the matching, likewise", above=0, at_most=1)
    renew_every: int = option(1000, "training steps after which the judging copy is the student's again", at_least=1)


class CTMSR(SoloMethod):
    """One player, the student, which is its own target; the copy that judges lies in the checkpoint."""

    needs = frozenset({Need.IMAGES})

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student=student)
        if config.matching_steps:
            self.whole = config.consistency_steps + config.matching_steps
            self.judge = copy.deepcopy(self.student).requires_grad_(False)
            self.state = {"judge": self.judge}
            low, high = sorted((config.start_scales, config.end_scales))
            for n in range(low, high + 1):
                self.matched(n)  # refuses now, not later

    def sampler(self) -> Sampler:
        """`student_steps` with fresh noise between."""
        return Sampler(self.student, self.levels_in(self.sampling_steps))

    def intervals(self, step: int) -> int:
        """N, the grid's steps at that training step: from s0 to s1 one by one, each for as long."""
        s0, s1 = self.config.start_scales, self.config.end_scales
        past = step * (abs(s0 - s1) + 1) // self.config.ramp_steps
        return max(s1, s0 - past) if s0 > s1 else min(s1, s0 + past)

    def grid(self, n: int) -> Tensor:
        """(N + 1,) descending angles of eta from 1 to 0, the first of which is where the sampler starts."""
        eta = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        angles = torch.atan2(self.config.kappa * eta, 1 - eta)
        top = self.schedule.angle(self.sampler().levels[0])
        return torch.cat([top.reshape(1), angles[1:].clamp(max=float(top))])

    def matched(self, n: int) -> tuple[int, int]:
        """The first point of the ascending grid of N steps at which samples are matched, and that after the last."""
        own = self.config
        low, high = max(1, int(own.matching_low * (n + 1))), min(n + 1, int(own.matching_high * (n + 1)))
        if low >= high:
            raise UserError(
                f"matching_high: of a grid of {n} steps no point lies between {own.matching_low:g} (matching_low) and "
                f"{own.matching_high:g}; give more"
            )
        return low, high

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """d(f(x_t), sg f(x_r)), both under one noise, and the matching once it has begun."""
        n, x0, eps = self.intervals(step), batch.images, batch.randn("student/eps")
        grid, i = self.grid(n).to(batch.device), batch.integers(n, "student/t")
        t, r, seed = grid[i], grid[i + 1], seed_for(*batch.key, "student/dropout")
        with seeded(seed, batch.device):
            x = self.student(diffuse(x0, t, eps), t, batch.cond).x0
        with torch.no_grad(), seeded(seed, batch.device):
            less = self.student(diffuse(x0, r, eps), r, batch.cond).x0
        target = torch.where(expand(r, x) <= 0, x0, less)
        loss = self.image_distance(x, target).mean()
        shown = {"consistency": loss}
        if self.config.matching_steps and step >= self.config.consistency_steps:
            matched = self.matching(n, x, batch)
            loss, shown = loss + self.config.matching_weight * matched, {**shown, "matching": matched}
        return Outcome(loss, shown)

    def matching(self, n: int, x: Tensor, batch: Batch) -> Tensor:
        """Half of w d(x, sg(x - what the judge tells samples x (B, ...) from the images by)), the mean over samples."""
        (low, high), x0, eps = self.matched(n), batch.images, batch.randn("matching/eps")
        t = self.grid(n).flip(0).to(x.device)[low + batch.integers(high - low, "matching/t")]
        fixed = x.detach()
        told = self.judged(fixed, t, eps, batch.cond) - self.judged(x0, t, eps, batch.cond)
        weight = 1 / (self.schedule.data_std * l1_normaliser(fixed, x0))
        return (weight * self.image_distance(x, fixed - told)).mean() / 2

    @torch.no_grad()
    def judged(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B, ...) what the judge makes of samples x (B, ...) under noise eps at the angles t (B,)."""
        self.judge.eval()
        return self.judge(diffuse(x, t, eps), t, cond).x0

    def after_step(self, step: int) -> None:
        """The judge becomes the student as matching begins, and now and then from there on."""
        since = step + 1 - self.config.consistency_steps
        if self.config.matching_steps and since >= 0 and since % self.config.renew_every == 0:
            approach(self.judge.parameters(), self.student.parameters(), 1.0)


METHOD = CTMSR
