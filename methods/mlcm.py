"""MLCM: multistep latent consistency models, distilled without images; TLCM in its later form.

Xie, Liao, Deng, Chen, Lu 2024, arXiv:2406.05768 (v1 MLCM, v5 TLCM; OPPO-Mente-Lab/TLCM is inference alone).

Consistency within segments that merge stage by stage, as in `tscd`, on states of the guided teacher's own trajectories
in place of noised images: no data are needed, and the student learns where the teacher's samples pass. From noise the
teacher takes N steps x_0 .. x_N, and in each stage but the last

    loss = d(f(x_i, t_i), sg f(x_(i+1), t_(i+1))),    both at the end of the segment of step i,

f being the DDIM step to that end. What lies between segments is made consistent in the last stage, whose target is the
clean end of the same trajectory, known already:

    loss = d(f(x_i, t_i), x_N) + lambda GAN - omega reward(f(x_i, t_i)),

both at 0. A GAN (which is there in every stage, if at all) takes the trajectories' states for real. One network, or
LoRA, is then sampled in 1 to 8 steps, with fresh noise between: it is no DDIM jump, as that of
`multistep_consistency` is.

Training code was not published: the losses are read from the paper's words and from what consistency is.
Deviations:
- The N steps are DDIM's at the levels of the teacher's own sampler. Each trajectory is walked once, and `states` of its
  steps are trained on. All trajectories of a batch have scales of their own.
- Distribution matching is another method: `dmd2` with the student's folder as its teacher.
- The paper's distances and discriminators see decoded images or features of their own networks; here they are those of
  `tscd`. The preference term takes any reward that has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.options import MergingOptions, option
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.segments import Jump, MergingMethod

ABOUT = About(
    paper="Xie et al. 2024, arXiv:2406.05768",
    data="nothing but the teacher's own trajectories",
    kind="trajectory",
    equations={
        "states of the teacher's trajectories": "MLCM.walk, core.prediction.Prediction.at",
        "multistep consistency within segments": (
            "scaffold.segments.SegmentMethod.following, scaffold.segments.SegmentMethod.jumped"
        ),
        "segments that merge": "scaffold.segments.MergingMethod.segments, scaffold.segments.MergingMethod.ends",
        "consistency with the clean end": "MLCM.next, MLCM.less_noisy",
        "preference learning": "scaffold.segments.MergingMethod.reward_weight, scaffold.reward.Judge",
        "sampling in 1 to 8 steps": "scaffold.segments.MergingMethod.sampler, players.sampler.Renoise",
    },
)


@dataclass(frozen=True)
class Config(MergingOptions, solver_steps=32):
    """MLCM's options. A batch is of trajectories."""

    states: int = option(8, "steps of each trajectory that are trained on, drawn among the N", at_least=1)


class MLCM(MergingMethod):
    """The student is its own target until the last stage."""

    needs = frozenset()  # type: ignore[misc]

    @torch.no_grad()
    def walk(self, batch: Batch) -> Tensor:
        """(N + 1, B, ...) the states of the guided teacher's trajectories at the angles of the grid, noise first."""
        scales = self.config.drawn(batch.uniform("teacher/scale"))
        (x, _), angles = self.sampler().start(batch.randn("z")), self.grid.to(batch.device)
        states = [x]
        for t, s in pairwise(angles):
            states.append(self.guidance(states[-1], t.expand(batch.size), batch.cond, scales).at(s.expand(batch.size)))
        return torch.stack(states)

    def trained(self, batch: Batch) -> Batch:
        return batch.repeated(self.config.states)

    def prepared(self, step: int, batch: Batch) -> Batch:
        """The clean ends of the trajectories take the place of images."""
        self.walked = self.walk(batch).repeat_interleave(self.config.states, 1)
        return replace(self.trained(batch), x0=self.walked[-1])

    def at_angle(self, t: Tensor) -> Tensor:
        """(B, ...) the states at the angles t (B,), which are of the grid."""
        i = (t[:, None] == self.grid.to(t.device)).int().argmax(1)
        return self.walked[i, torch.arange(len(i), device=i.device)]

    def next(self, step: int, i: Tensor) -> Tensor:
        """In the last stage the clean end."""
        last = self.segments(step) == 1
        return torch.full_like(i, self.config.solver_steps) if last else i + 1

    def noised(self, batch: Batch, interval: Jump, eps: Tensor) -> Tensor:
        """The states themselves, whose noise nobody drew."""
        return self.at_angle(interval.t)

    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Jump, cond: Cond) -> Tensor:
        """Where the same trajectory passes later; the states are not kept any longer."""
        x_r = self.at_angle(interval.r)
        del self.walked
        return x_r


METHOD = MLCM
