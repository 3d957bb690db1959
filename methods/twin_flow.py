"""TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows.

Cheng, Sun, Li, Lin 2025, arXiv:2512.05150 (code: inclusionAI/TwinFlow). Its consistency term is that of RCGM (Sun &
Lin, any-step generation via n-th order recursive consistent velocity field estimation).

One network, of two times, is student, teacher and fake score at once: no other is trained or kept but its average. With
F(x_t, t, r) the average velocity of the jump from t to r, in a flow's own time from noise at 1,

    F(x_t, t, t)     learns the data's velocity (or that guided by itself: + ratio (F_c - F_none) of the average);
    F(x_t, t, r)     learns jumps, by a step of size delta along that velocity u and the average's jump on from there:
                     D = ((t - r) F - (t - delta - r) F-)/delta - u,  F is pulled to F - cut(D);
    the fake branch  (their negative times) learns the velocity of the network's own one-step samples;

and a one-step sample x is moved by the difference of the two branches where it is noised to t,

    F_grad = cut(F_fake(x_t, t) - F(x_t, t, t)),    F(z, 1, 0) is pulled to F - F_grad,

which is the gradient of DMD; `clamp` cuts each element. A sample counts e^2/c, e its root mean square error, with the
weight 1/sqrt((e/c)^2 + 1) that gets no gradient, and tan((1 - (t - r)) pi/2.5) + 1. A batch has jumps from noise, short
ones, any, and own samples, a quarter each.

Read in the authors' code. Deviations:
- The network learns of r by the gap to t in its schedule's own time, and of the fake branch by a gap of -1, which no
  jump has; negative times are none of a stock network's. A schedule that is no flow has the times of a flow's noise.
- The average begins as the network and has one decay; theirs rises to it. With LoRA it is the network itself.
- Data are given; their image-free variant is not here, nor is the frozen network as the teacher that LoRA has there.
- `verify` has no training of it in the plane: 6 to 7% of the scale are missing at its end (`matching_weight` 8, `delta`
  0.1, 8000 steps), 8 to 15% with other values, and 6% are the limit.
- The last jump of F- is cut into `ode_order` equal ones, as theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import reweighted_square
from diffdistill.core.prediction import diffuse, expand
from diffdistill.errors import UserError
from diffdistill.options import StudentLevels, StudentOptions, option
from diffdistill.players.sampler import DDIM, Renoise, Sampler
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.branches import BranchesMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Cheng et al. 2025, arXiv:2512.05150",
    data="real images",
    kind="trajectory",
    needs=("images",),
    equations={
        "flow matching of both branches": "TwinFlow.drawn, scaffold.branches.BranchesMethod.jump",
        "guidance by itself": "TwinFlow.enhanced",
        "consistency (RCGM)": "TwinFlow.consistent, scaffold.branches.BranchesMethod.along",
        "distribution matching without other networks": "TwinFlow.rectified",
        "weighted losses": "core.losses.reweighted_square",
        "few-step and any-step sampling": "TwinFlow.sampler",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, StudentLevels, student_lr=1e-5):
    """TwinFlow's options; times are those of a flow."""

    student_steps: int = option(1, "sampling steps; its training is the same for any number", at_least=1)
    sampling: Literal["few", "any"] = option("few", "few: jumps to 0 with fresh noise between; any: jumps to the next")
    self_guidance: float = option(0.0, "ratio of F_c - F_none that is added to the data's velocity", at_least=0)
    delta: float = option(0.01, "the step along the velocity in the consistency term", above=0, below=1)
    ode_order: int = option(2, "the jumps of the average that lead from there on", at_least=1)
    matching_weight: float = option(0.5, "weight of the distribution matching; 0: none", at_least=0)
    clamp: float = option(1.0, "the most that D and F_grad count in an element; it biases what is spread", above=0)
    loss_c: float = option(1e-3, "c of a sample's weight", above=0)
    average_decay: float = option(0.99, "decay of the average that targets are taken from", at_least=0, below=1)


class TwinFlow(BranchesMethod):
    """One player, the student; its average lies in the checkpoint."""

    def sampler(self) -> Sampler:
        """Jumps to 0 with noise between, or from level to level."""
        step = Renoise() if self.config.sampling == "few" else DDIM()
        return Sampler(self.student, self.levels_in(self.sampling_steps), step)

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The kind of each sample, by its place in the step (jumps from noise, short, any, fake), and t and r (B,)."""
        if batch.whole < 4:
            raise UserError(
                f"batch_size: {batch.whole} samples in a step leave out some of twin_flow's four kinds; give at least 4"
            )
        kind = torch.arange(batch.first, batch.first + batch.size, device=batch.device) * 4 // batch.whole
        t = torch.where(kind == 0, 1.0, batch.uniform("student/t")) * self.top
        share = batch.uniform("student/r") * torch.where(kind == 1, 0.05, 1.0)
        share = torch.where(kind == 0, 1.0, torch.where(kind == 3, 0.0, share))
        return kind, t, t * (1 - share)

    def cut(self, x: Tensor) -> Tensor:
        """(B, ...) x between the two ends of what counts."""
        return x.clamp(-self.config.clamp, self.config.clamp)

    @torch.no_grad()
    def enhanced(self, u: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, ...) the velocity u, guided by the average's own two."""
        null = self.student.null
        if null is None or not self.config.self_guidance:
            return u
        both = (self.velocity(self.jump(self.average, x_t, t, t, c)) for c in (cond, null(cond)))
        with_class, without = both
        return u + self.config.self_guidance * (with_class - without)

    @torch.no_grad()
    def consistent(self, f: Tensor, u: Tensor, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) what F is pulled to: F - cut(D); u itself within a step of r."""
        delta, n = self.config.delta, self.config.ode_order
        now = torch.maximum(t - delta, r)
        x = self.along(x_t, t, u, now)
        way = torch.zeros_like(f)
        for k in range(n):
            here, there = (torch.lerp(now, r, (k + j) / n) for j in (0, 1))
            jump = self.jump(self.average, x, here, there, cond)
            way = way + expand(here - there, f) * self.velocity(jump)
            x = jump.at(self.flow.angle(there))
        d = (expand(t - r, f) * f - way) / delta - u
        d = torch.where(expand(t - r - delta, f) < 0, f - u, d)
        return f - self.cut(d)

    @torch.no_grad()
    def rectified(self, x: Tensor, batch: Batch, rows: slice) -> Tensor:
        """(b, ...) F_grad of one-step samples x (b, ...), which are those rows of the batch."""
        t, z = batch.uniform("student/matched t")[rows], batch.randn("student/matched eps")[rows]
        x_t, cond = diffuse(x, self.flow.angle(t), z), {name: value[rows] for name, value in batch.cond.items()}
        fake, real = (
            self.velocity(self.jump(self.student, x_t, t, t, cond, torch.full_like(t, kind) > 0)) for kind in (1.0, 0.0)
        )
        return self.cut(fake - real)

    def student_turn(self, batch: Batch) -> Outcome:
        """All four kinds of samples at once, and the matching of those from noise."""
        (kind, t, r), images, z = self.drawn(batch), batch.images, batch.randn("student/eps")
        places = torch.arange(batch.first, batch.first + batch.size) * 4 // batch.whole  # which are known beforehand
        noise, fake = (slice(int((places < k).sum()), int((places <= k).sum())) for k in (0, 3))
        seed, cond = seed_for(*batch.key, "student/dropout"), batch.cond
        if fake.start < fake.stop:
            own = {name: value[fake] for name, value in cond.items()}
            with torch.no_grad(), seeded(seed, z.device):
                start = batch.randn("student/z")[fake]
                one, zero = torch.full_like(t[fake], self.top), torch.zeros_like(t[fake])
                x = self.jump(self.student, start, one, zero, own).x0
            images = torch.cat([images[: fake.start], x])
        x_t, u = diffuse(images, self.flow.angle(t), z), z - self.schedule.data_std * images
        with seeded(seed, z.device):
            prediction = self.jump(self.student, x_t, t, r, cond, kind == 3)
        f, target = self.velocity(prediction), u
        if fake.start > 0:
            with seeded(seed, z.device):
                guided = self.enhanced(u, x_t, t, cond)
            with seeded(seed, z.device):
                learned = self.consistent(f.detach(), guided, x_t, t, r, cond)
            target = torch.where(expand(kind == 3, u) > 0, u, learned)
        weight = torch.where(kind == 3, 1.0, torch.tan((1 - (t - r)) * math.pi / 2.5) + 1)
        loss = (weight.to(f) * reweighted_square(f, target, self.config.loss_c)).mean()
        shown = {"flow": loss, "matching": torch.zeros_like(loss)}
        if self.config.matching_weight and noise.start < noise.stop:
            with seeded(seed, z.device):
                pull = self.rectified(prediction.x0[noise].detach(), batch, noise)
            each = reweighted_square(f[noise], (f[noise] - pull).detach(), self.config.loss_c)
            matched = each.sum() * 4 / batch.size  # the mean of a quarter
            loss = loss + self.config.matching_weight * matched
            shown["matching"] = matched
        return Outcome(loss, shown)


METHOD = TwinFlow
