"""Distillation-DPO: Diffusion Distillation with Direct Preference Optimization.

Zhao et al. 2025, "Diffusion Distillation With Direct Preference Optimization For Efficient 3D LiDAR Scene Completion"
(code: happyw1nd/DistillationDPO).

A student, of one step too, is tuned on a reward while it is matched with its teacher, so that it keeps its steps. Of
two samples of one condition, from different noise, the reward says the better. Two fake scores learn them apart, one
the better and one the worse samples, and each side is matched by its own:

    w_better KL(q_better || p)  +  w_worse KL(q_worse || p),        p the teacher's distribution

with DMD's gradient for each. With equal weights that is matching alone. Where the worse counts more, its samples are to
be as good as the teacher's, and so the student as a whole becomes better: for Gaussians it rests where it is
(w_worse - w_better) times as far beyond the teacher as the better samples are beyond the mean (`verify`).

`--teacher` is the many-step teacher, whose score is read at all noise, and `--start` the distilled student.

Deviations:
- The authors' weights are 1 and -1: the better samples are drawn to the teacher and the worse pushed away from it. On
  Gaussians that has no fixed point and moves all samples towards the worse, wherever the student is, as `verify` shows;
  it is the preset `published`. Their released loss has no gradient at all, since it multiplies the gap of the scores by
  x_t - x, in which the sample cancels.
- Both samples have fresh noise (theirs: one noise, once times 1.1); images are not point clouds. Ties are by chance.
- Normaliser, times, guidance and several steps by backward simulation are DMD2's; optimizers are AdamW, not SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.times import native_uniform
from diffdistill.options import MatchingOptions, MatchingTimes, NormaliserOptions, StudentLevels, option
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.matching import dmd_loss, fake_score_loss
from diffdistill.scaffold.method import Batch, Method, Need, Optimizer, Outcome, Turn
from diffdistill.scaffold.simulation import drawn_level

ABOUT = About(
    paper="Zhao et al. 2025, Distillation-DPO",
    data="a reward of the student's own samples",
    kind="preference",
    needs=("reward",),
    equations={
        "pairs of the student's samples": "DistillationDPO.pair",
        "two scores, of the better and the worse (code: auxDiffBetter, auxDiffWorse)": "DistillationDPO.score_turn",
        "the student's loss (code: distil_loss)": "DistillationDPO.student_turn, scaffold.matching.dmd_loss",
    },
)


@dataclass(frozen=True)
class Config(MatchingOptions, MatchingTimes, NormaliserOptions, StudentLevels, weight_decay=0.01):
    """Its options."""

    student_steps: int = option(1, "sampling steps, evenly spaced from student_level down", at_least=1)
    better_weight: float = option(0.25, "weight of the matching of the better of two samples")
    worse_weight: float = option(
        0.75, "weight of the matching of the worse; what it exceeds the other by is preference"
    )


class DistillationDPO(Method):
    """The student moves first in every `update_ratio`-th step, then both scores, on the same pairs."""

    needs = frozenset({Need.REWARD})

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config)
        self.teacher = guided(frozen(teacher.denoiser), config.guidance_scale)
        self.student = players.get("student") or teacher.player("student")
        self.scores = {role: players.get(role) or teacher.player(role) for role in ("better", "worse")}
        self.players = {"student": self.student, **self.scores}
        self.weights = {"better": config.better_weight, "worse": config.worse_weight}

    def optimizer(self, player: str) -> Optimizer:
        """AdamW with a rate for the student and one for both scores."""
        c = self.config
        return Optimizer(c.student_lr if player == "student" else c.fake_score_lr, (c.beta1, 0.999), c.weight_decay)

    def sampler(self) -> Sampler:
        """One step, or several with fresh noise between."""
        return Sampler(self.student, self.levels_in())

    def turns(self, step: int) -> Sequence[Turn]:
        drawn: dict[int, dict[str, Tensor]] = {}
        scores = [Turn(role, partial(self.score_turn, drawn, role)) for role in self.scores]
        if step % self.config.update_ratio:
            return scores
        return [Turn("student", partial(self.student_turn, drawn)), *scores]

    def pair(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The better and the worse sample (B, ...) under each condition, and the rewards (B,) of both."""
        for player in (self.student, *self.scores.values()):
            player.eval()  # in one of two networks dropout would be noise in their difference
        sampler, both = self.sampler(), []
        k = drawn_level(len(sampler.levels), batch) if len(sampler.levels) > 1 else 0
        for name in ("a", "b"):
            with torch.no_grad():
                x_t, t = sampler.input_at(k, batch.randn(f"{name} z"), batch.cond, partial(_noise, batch, name))
            both.append(self.student(x_t, t, batch.cond).x0)
        one, other = (self.scored(x, batch) for x in both)
        first = (one >= other).reshape(-1, *[1] * (both[0].ndim - 1))
        pair = {"better": torch.where(first, both[0], both[1]), "worse": torch.where(first, both[1], both[0])}
        return pair, torch.maximum(one, other), torch.minimum(one, other)

    def student_turn(self, drawn: dict[int, dict[str, Tensor]], batch: Batch) -> Outcome:
        """Both samples are matched with the teacher, each by its own score and weight, with one noise."""
        pair, high, low = self.pair(batch)
        drawn[batch.first] = {role: x.detach() for role, x in pair.items()}
        c, eps = self.config, batch.randn("student/eps")
        t = self.times("student", batch, c.time_low, c.time_high)
        loss, shown = eps.new_zeros(()), {"reward": (high + low).mean() / 2, "reward gap": (high - low).mean()}
        for role, x in pair.items():
            matched = dmd_loss(x, t, eps, batch.cond, self.teacher, self.scores[role], c.normalise)
            loss, shown = loss + self.weights[role] * matched.loss, shown | {f"{role} gap": matched.shown["gap"]}
        return Outcome(loss, shown)

    def score_turn(self, drawn: dict[int, dict[str, Tensor]], role: str, batch: Batch) -> Outcome:
        """A score learns its side of the pairs that `drawn` holds, or of new ones."""
        if batch.first not in drawn:
            with torch.no_grad():
                drawn[batch.first] = self.pair(batch)[0]
        t, eps = self.times(role, batch, 0.0, 1.0), batch.randn(f"{role}/eps")
        loss = fake_score_loss(
            self.scores[role], drawn[batch.first][role], t, eps, batch.cond, self.config.fake_score_loss
        )
        return Outcome(loss, {"denoising": loss})

    def times(self, player: str, batch: Batch, low: float, high: float) -> Tensor:
        """(B,) the angles of a player's loss."""
        shift = self.config.time_shift
        return batch.draw(f"{player}/t", lambda n, draw: native_uniform(self.schedule, n, draw, low, high, shift))


def _noise(batch: Batch, name: str, j: int) -> Tensor:
    return batch.randn(f"{name} z {j}")


METHOD = DistillationDPO
