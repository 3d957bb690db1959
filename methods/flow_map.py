"""Flow maps: x_r = X(x_t, t, r) of a network with two times, which is sampled in any number of steps.

Boffi, Albergo, Vanden-Eijnden 2025, arXiv:2505.18825 (code: nmboffi/flow-maps), the three objectives; AnyFlow: Gu et
al. 2026, arXiv:2605.13724 (code: NVlabs/AnyFlow); Align Your Flow (AYF): Sabour et al. 2025, arXiv:2506.14603.

X(x, t, r) = cos(t - r) x - sin(t - r) F(x, t, r) is the map of an ODE dx/dt = b(x, t) if b(x, t) = F(x, t, t), which
samples with r = t teach, and any one of three holds:

    lagrangian    dX(x, t, r)/dr = b(X(x, t, r), r): where it leads to, it moves on as the ODE does;
    eulerian      dX(x_t, t, r)/dt = 0 along the ODE: wherever it starts from, it leads to the same;
    progressive   X(x, t, r) = X(X(x, t, s), s, r): two jumps are one.

In mode distillation b is the teacher's velocity, guided if wanted; in mode training the student's own F(x, t, t), held
fixed, and samples with r = t learn the direction of the image and its noise. With `path: data` the Eulerian objective
takes that direction for all samples, which with `derivative: central` is AnyFlow's first stage. `matching_weight` adds
its second: samples of the student, made by at most three jumps with gradients, are matched to the teacher as in DMD.

Deviations:
- AnyFlow's published guided first stage divides a guided output by the scale and moves along the unguided path; its
  fixed point is not the guided flow map (`verify` shows both). Here the direction is guided, as in MeanFlow, with the
  student's own velocity without condition; the fixed point is the guided flow map.
- The progressive targets are the student's own but at r = t, and an error that all jumps share comes back in them k
  times, k > 1 where the map widens (`verify`); that grows unless (1 - equal_share) k < 1.
- Errors are those of flow matching's u, and dz/dr, whatever the network predicts. `weight_power` 1 stands for the
  learned weight of Boffi et al. and for AnyFlow's division by each sample's loss (which it does for r < t alone, with
  a weight t sqrt(1 - t) for r = t); 0.5 for AYF's tangent normalisation.
- The Lagrangian error has a gradient through the derivative as in the paper; the targets of the others have none.
- AYF's `tangent_share` below 1 biases the map (`verify`). Its autoguidance and GAN are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.prediction import expand
from diffdistill.core.times import spans
from diffdistill.errors import UserError
from diffdistill.options import TangentOptions, TangentTarget, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.average import AverageMethod, OnPolicy
from diffdistill.scaffold.method import Batch, Outcome, Turn
from diffdistill.scaffold.tangent import Point

ABOUT = About(
    paper="Boffi et al. 2025, arXiv:2505.18825; Gu et al. 2026, arXiv:2605.13724; Sabour et al. 2025, arXiv:2506.14603",
    data="real images, to place x_t, and in mode training for the direction",
    kind="trajectory",
    needs=("images",),
    equations={
        "Lagrangian self-distillation": "FlowMap.lagrangian",
        "Eulerian; AnyFlow's and AYF's targets": "FlowMap.eulerian, scaffold.average.AverageMethod.residual",
        "progressive self-distillation": "FlowMap.progressive, FlowMap.parts",
        "guidance inside, corrected": "scaffold.average.AverageMethod.direction",
        "on-policy matching (AnyFlow, stage 2)": "scaffold.average.OnPolicy, scaffold.simulation.rolled_out",
    },
)


@dataclass(frozen=True)
class Config(TangentOptions, student_lr=1e-4, student_steps=4):
    """The options of flow maps; times are fractions of the teacher's own."""

    objective: Literal["lagrangian", "eulerian", "progressive"] = option("lagrangian", "what a map of an ODE fulfils")
    path: Literal["own", "data"] = option("own", "mode training: the eulerian objective's path; own: the student's "
                                          "velocity at r = t; data: the image's and its noise's (AnyFlow)")  # fmt: skip
    split: Literal["uniform", "midpoint"] = option("uniform", "where the progressive objective parts a jump")
    spans: Literal["sorted", "length"] = option("sorted", "t and r; sorted: two uniform draws; length: t - r drawn "
                                                "logit-normally, and then where it lies (AYF)")  # fmt: skip
    length_mean: float = option(-0.8, "mean of the logit of the length, whose deviation is 1")
    equal_share: float = option(0.75, "share of samples with r = t, which teach the velocity", at_least=0, at_most=1)
    end_share: float = option(0.25, "share of samples with r = 0, of those that have r < t", at_least=0, at_most=1)
    weight_power: float = option(1.0, "p of a sample's weight 1/(error + c)^p; 0: none", at_least=0)
    weight_c: float = option(0.01, "c of a sample's weight", above=0)
    tangent_warmup: int = option(0, "steps over which the eulerian derivative's share rises; 0: none", at_least=0)
    tangent_share: float = option(1.0, "that share after the warm-up; below 1 it is biased", above=0, at_most=1)
    label_dropout: float = option(0.1, "mode training: share of a guided student's samples without their condition",
                                  at_least=0, at_most=1)  # fmt: skip
    matching_weight: float = option(0.0, "weight of the on-policy matching; 0: no such stage", at_least=0)
    matching_guidance: float | None = option(None, "its teacher's guidance; none: guidance_scale", at_least=0)
    rollout_steps: tuple[int, ...] = option((2, 4, 8, 16), "the N of the matched samples' jumps", at_least=1)
    fake_score_lr: float = option(1e-5, "AdamW's learning rate for the matching's fake score", above=0)

    warm = TangentTarget.warm


class FlowMap(AverageMethod):
    """The student, and a fake score if its samples are matched."""

    def __init__(
        self, teacher: Teacher, config: Config, *, student: Denoiser | None = None, fake_score: Denoiser | None = None
    ):
        c = config
        super().__init__(teacher, c, student)
        if c.path == "data" and (c.objective != "eulerian" or self.from_teacher):
            raise UserError("path: data is for the eulerian objective in mode training; use own")
        self.on_policy: OnPolicy | None = None
        if c.matching_weight > 0:
            scale = c.guidance_scale if c.matching_guidance is None else c.matching_guidance
            self.on_policy = OnPolicy(teacher, scale, fake_score, c.rollout_steps, c.student_level)
            self.players["fake_score"] = self.on_policy.fake_score

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        length = self.config.length_mean if self.config.spans == "length" else None
        t, r = batch.draw("student/t", lambda n, draw: torch.stack(spans(self.schedule, n, draw, length), 1)).unbind(1)
        r = torch.where(batch.uniform("student/end") < self.config.end_share, 0.0, r)
        return self.some_equal(t, r, batch)

    @torch.no_grad()
    def own(self, x: Tensor, t: Tensor, at: Point) -> Tensor:
        """b(x, t) (B, ...) without a gradient: the teacher's velocity, or the student's at r = t."""
        t = t.clamp(self.schedule.t_min, self.schedule.t_max)
        return self.teacher(x, t, at.cond).v if self.from_teacher else self.jump(x, t, t, at).v

    def lagrangian(self, at: Point) -> Tensor:
        """(B, ...) dz/dr - u(z, r) of flow matching's z = X/rho(r), with the gradient of the derivative."""
        x_r, change = self.arrival(at)
        b = self.own(x_r.detach(), at.r, at)
        gap = change - torch.where(expand(at.t - at.r, b) > 0, b, at.v)
        return expand(self.rho(at.r), b) * gap - expand(self.rho_rate(at.r), b) * (x_r - x_r.detach())

    def eulerian(self, f: Tensor, at: Point, share: float) -> Tensor:
        """(B, ...) -dX/dt over sin(t - r), where the student says f, its derivative counted by that share."""
        if self.config.path == "own" and not self.from_teacher:
            at = at._replace(v=torch.where(expand(at.t - at.r, f) > 0, self.own(at.x_t, at.t, at), at.v))
        return (1 - share) * (f - at.v) + share * self.residual(f, at)

    def parts(self, t: Tensor, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) how much of the jump from t to r each of the jumps over s is."""
        whole = torch.sin(t - r).clamp_min(1e-12)
        return torch.sin(t - s) * torch.cos(s - r) / whole, torch.sin(s - r) / whole

    @torch.no_grad()
    def progressive(self, f: Tensor, at: Point) -> Tensor:
        """(B, ...) f - F of the two jumps over s, without a gradient."""
        h = at.uniform("split") if self.config.split == "uniform" else torch.full_like(at.t, 0.5)
        s = (at.r + h * (at.t - at.r)).clamp_min(self.schedule.t_min)
        first, second = (expand(part, f) for part in self.parts(at.t, s, at.r))
        one = self.jump(at.x_t, at.t, s, at)
        two = self.jump(one.at(s), s, at.r, at)
        both = first * one.v + second * (two.v - expand(torch.sin(at.t - s), f) * at.x_t)
        return f - torch.where(expand(at.t - at.r, f) > 0, both, at.v)

    def toward_target(self, step: int, at: Point) -> Tensor:
        """(B, ...) u - u_target of the objectives whose target gets no gradient."""
        f, share = self.velocity(at, Extra(r=at.r)), self.config.tangent_share * self.config.warm(step)
        held = f.detach()
        eulerian = self.config.objective == "eulerian"
        gap = self.eulerian(held, at, share) if eulerian else self.progressive(held, at)
        return expand(self.rho(at.t), f) * (f - held + gap)

    def regression(self, step: int, at: Point) -> Outcome:
        """The square of the objective's error, over (itself + c)^p without a gradient."""
        error = self.lagrangian(at) if self.config.objective == "lagrangian" else self.toward_target(step, at)
        return self.loss_of(error)

    def second_term(self, batch: Batch) -> Outcome | None:
        if self.on_policy is None:
            return None
        matched = self.on_policy.student_loss(self.student, batch)
        return Outcome(self.config.matching_weight * matched.loss, matched.shown)

    def more_turns(self, step: int) -> Sequence[Turn]:
        return [] if self.on_policy is None else [Turn("fake_score", self.on_policy.fake_score_loss)]


METHOD = FlowMap
