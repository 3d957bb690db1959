"""Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals.

Fan et al. 2025, arXiv:2510.27684 (others' code: NVlabs/FastGen, ModelTC/LightX2V).

A student of several steps is matched phase by phase. The range of noise is parted at its levels; in its phase a step
takes noise from its level t_k down to the next, x_s with s = t_{k+1}, and not to clean data. What it made is matched
with the teacher at the noise above s alone, up to pure noise, where samples at s and at t are joined by

    x_t = (cos t/cos s) x_s + spread eps,    spread^2 = 1 - (cos t/cos s)^2.

So no step is asked for what later ones do, and each phase has a distribution and a fake score of its own. It is trained
on x_s, without knowing clean data:

    v* = (sin t/cos s) ((cos t/cos s)/spread eps - x_s)

is unbiased for the velocity of its diffused samples (`verify`), where eps and x_s themselves in the place of noise and
clean data are far off. With one step all of it is DMD2.

Deviations:
- One student, whose phases take turns, each for the steps between two of the student's. The authors train an expert for
  each phase, one phase after the other, and begin each fake score anew from the teacher.
- Every step is a phase; theirs for Wan 2.2 are of two steps each.
- Steps are deterministic. With fresh noise on a prediction of clean data x_s would tell no more than that prediction,
  and phases were plain DMD2 in parts of the noise.
- The weight of the fake score's error is (spread/sin t)^2 in v, which is the usual one where s = 0; theirs is
  1/spread^2, at most 10. The normaliser is mean|x_s - E[x_s | x_t]| by the teacher, DMD's where s = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import l1_normaliser, per_sample_mean
from diffdistill.core.prediction import Prediction, expand
from diffdistill.core.times import native_uniform
from diffdistill.options import MatchingOptions, MatchingTimes, NormaliserOptions, SimulationOptions
from diffdistill.players.sampler import DDIM, Step
from diffdistill.scaffold.matching import MatchingMethod, injected
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Fan et al. 2025, arXiv:2510.27684",
    data="nothing",
    kind="distribution",
    equations={
        "diffusion within a sub-interval": "SubInterval",
        "score matching within a sub-interval": "PhasedDMD.denoising, SubInterval.error",
        "distribution matching within a sub-interval": "PhasedDMD.matching",
        "phases": "PhasedDMD.times, PhasedDMD.reached",
    },
)


@dataclass(frozen=True)
class Config(
    MatchingOptions,
    MatchingTimes,
    NormaliserOptions,
    SimulationOptions,
    student_steps=2,
    fake_scores="per_level",
    update_ratio=5,
    weight_decay=0.01,
):
    """Phased DMD's options; times are fractions of the range above the phase's end."""


class SubInterval:
    """From the angle s on to t (B,), with `like` (B, ...) for shapes."""

    def __init__(self, s: Tensor, t: Tensor, like: Tensor):
        kept = torch.cos(t) / torch.cos(s)
        self.kept, self.spread = (expand(part, like) for part in (kept, torch.sqrt((1 - kept**2).clamp_min(0))))
        self.cos_s, self.sin_s = (expand(of(s).expand(len(t)), like) for of in (torch.cos, torch.sin))
        self.cos_t, self.sin_t = (expand(of(t), like) for of in (torch.cos, torch.sin))

    def diffuse(self, x_s: Tensor, eps: Tensor) -> Tensor:
        """x_t (B, ...)."""
        return self.kept * x_s + self.spread * eps

    def back(self, predicted: Prediction) -> Tensor:
        """E[x_s | x_t] (B, ...); x0 where s = 0.

        Tweedie's (x_t - spread^2 eps/sin(t))/kept with x_t = cos(t) x0 + sin(t) eps, finite at pure noise.
        """
        return self.cos_s * predicted.x0 + self.kept * self.sin_s**2 / self.sin_t * predicted.eps

    def error(self, predicted: Prediction, x_s: Tensor, eps: Tensor) -> Tensor:
        """(spread/sin t)(v - v*), (B, ...); both terms are finite at either end."""
        return self.spread / self.sin_t * predicted.v - (self.kept * eps - self.spread * x_s) / self.cos_s


class PhasedDMD(MatchingMethod):
    """The samples of a level are at the next one's noise, `end`, of the level that `times` was asked for last."""

    move: Step = DDIM()
    end = torch.zeros((), dtype=torch.float64)

    def ends(self, k: int) -> Tensor:
        """The angle () at which level k's phase ends; 0 of the last."""
        return self.sampler().leads(k)

    def reached(self, predicted: Prediction, k: int) -> Tensor:
        """x_s (B, ...) of the step from level k."""
        return predicted.at(self.ends(k).to(predicted.t).expand_as(predicted.t))

    def times(self, player: str, batch: Batch) -> Tensor:
        c = self.config
        self.end = self.ends(self.level(batch)).to(batch.device)
        least = float(self.schedule.fraction(self.end)) if float(self.end) else 0.0
        low, high = (c.time_low, c.time_high) if player == "student" else (0.0, 1.0)
        span = least + (1 - least) * low, least + (1 - least) * high
        return batch.draw(f"{player}/t", lambda n, draw: native_uniform(self.schedule, n, draw, *span, c.time_shift))

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """The gap of the two scores, pushed into x_s (B, ...)."""
        part = SubInterval(self.end, t, x)
        with torch.no_grad():
            x_t = part.diffuse(x, eps)
            theirs, own = (part.back(network(x_t, t, cond)) for network in (self.teacher, self.fake_score))
            gap, size = own - theirs, l1_normaliser(x, theirs)
            # E[x_s | x_t] has the score times spread^2/kept, and x_s enters x_t with kept.
            exact = (part.kept / part.spread) ** 2
            gradient = gap / expand(size, gap) if self.config.normalise else exact * gap
        loss = injected(x, gradient, self.fake_score, self.config.normalise)
        return Outcome(loss, {"gap": (per_sample_mean(gap.abs()) / size).mean()})

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """Unbiased score matching on x_s (B, ...), which get no gradient."""
        x, part = x.detach(), SubInterval(self.end, t, x)
        error = part.error(self.fake_score(part.diffuse(x, eps), t, cond), x, eps)
        return (error if self.config.fake_score_loss == "v" else part.cos_t * error).square().mean()


METHOD = PhasedDMD
