"""TBCM: Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs.

Tang, Zhang, Zhu, Xiang, Yang, Yu, Liu, Wang 2025, arXiv:2511.20410 (code: hustvl/TBCM).

sCM (arXiv:2410.11081) needs images to place x_t. Here x_t are states of the teacher's own trajectories, from noise down
by its guided steps: no image is needed, and the student learns where the teacher's samples pass. Each step of training
walks one trajectory for each condition, through `states` times, one drawn in each cell of a shifted flow's row; all
states but the noise make the batch. With F- the student's velocity without a gradient, v the teacher's, guided by the
scale that is drawn and given to the student, which the walk has computed anyway,

    g = -cos(t)^2 (F- - v) - r cos(t) sin(t) (x_t + dF-/dt),    g <- g/(|g| + c),
    loss = e^(-w(t))/tan(t) |F - F- - g|^2 + w(t).

r rises from 0 to 1, and in the authors' settings falls to 0.75 at last, where the minimum is another: at r = 1 it is
the map of the teacher's ODE, at r = 0 the posterior mean, and between them samples spread less (for data of deviation
0.5 by 17% at 0.75). `final_share` is 1 here.

Deviations:
- Each sample has times of its own. Scales are uniform between guidance_min and guidance_max, where theirs are 4, 4.5
  and 5.
- The angles are those of a flow of unit-variance data, whatever the teacher; those that it does not know, or above
  where the student's sampler starts, are moved to the nearest that it does.
- Samples that are nearly black are not left out. CAME is AdamW, and w is a small network of its own, as in `scm`.
- A flow teacher needs no conversion: F is the velocity of the normal form of any network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.schedule import LinearFlow
from diffdistill.options import AdaptiveWeightRate, ScaleRange, TangentNorm, TangentOptions, option
from diffdistill.players.adaptive_weight import AdaptiveWeight
from diffdistill.players.scale_input import DrawnGuidance, scale_player, scale_taken
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for
from diffdistill.scaffold.continuous import ContinuousMethod
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.tangent import Point

ABOUT = About(
    paper="Tang et al. 2025, arXiv:2511.20410",
    data="nothing but the teacher's own trajectories",
    kind="trajectory",
    equations={
        "states of the teacher's trajectories": "TBCM.walk, core.prediction.Prediction.at",
        "their times": "TBCM.times, core.schedule.LinearFlow",
        "sCM's g, warm-up and calm-down, normalisation": (
            "scaffold.continuous.ContinuousMethod.target, scaffold.continuous.ContinuousMethod.tangent, TBCM.share, "
            "options.TangentNorm.warm, scaffold.tangent.normalised"
        ),
        "sCM's loss with the adaptive weight": (
            "TBCM.regression, scaffold.continuous.ContinuousMethod.weighed, players.adaptive_weight.AdaptiveWeight"
        ),
        "the guidance scale as an input": "players.scale_input.guidance_input",
    },
)


@dataclass(frozen=True)
class Config(
    ScaleRange, TangentOptions, TangentNorm, AdaptiveWeightRate, guidance_max=1.0, tangent_warmup=4000, norm="l2"
):
    """TBCM's options; the mode is distillation. A batch is of trajectories."""

    states: int = option(16, "times of a trajectory, of which all but the first are trained", at_least=2)
    route_shift: float = option(2.5, "the shift of the flow's row between whose times they are drawn", above=0)
    final_share: float = option(1.0, "r at last; below 1 the student's samples spread less", at_least=0, at_most=1)
    calm_start: int = option(15000, "the training step from which r goes to final_share", at_least=0)
    calm_steps: int = option(2000, "training steps in which it does", at_least=1)


class TBCM(ContinuousMethod):
    """f is the student's x0; players: student, and the adaptive weight."""

    needs = frozenset()  # type: ignore[misc]
    untaught = "tbcm follows its teacher's own trajectories"

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student or scale_player(teacher, config))
        self.guidance = DrawnGuidance(teacher.denoiser, config, "guidance")
        self.players["weight"] = self.weight = AdaptiveWeight()
        row = LinearFlow(shift=config.route_shift)
        self.top = float(self.schedule.angle(self.levels[0]))
        self.cells = row.angle(row.levels(config.states)).clamp(self.schedule.t_min, self.top)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Descending angles (states, B), the sampler's first and one in each cell; and 0."""
        cells = self.cells.to(batch.device)[:, None]

        def angles(n: int, draw: torch.Generator) -> Tensor:
            u = torch.rand(len(cells) - 1, n, generator=draw, device=draw.device, dtype=torch.float64)
            return torch.lerp(cells[1:], cells[:-1], u).T

        t = batch.draw("student/t", angles).T
        return torch.cat([torch.full_like(t[:1], self.top), t]), torch.zeros(len(cells), batch.size).to(t)

    @torch.no_grad()
    def walk(self, batch: Batch) -> Point:
        """The states of all trajectories but their noise, (states - 1) B of them, and the teacher's direction there."""
        (t, r), (x, _), states = self.times(batch), self.sampler().start(batch.randn("z")), []
        scales = self.config.drawn(batch.uniform("student/scale"))  # one for each trajectory
        prediction = self.guidance(x, t[0], batch.cond, scales)
        for s in t[1:]:
            x = prediction.at(s)
            prediction = self.guidance(x, s, batch.cond, scales)
            states.append((x, prediction.v))
        n, seed = len(states), seed_for(*batch.key, "student/dropout")
        cond: Cond = {name: torch.cat([value] * n) for name, value in batch.cond.items()}
        x_t, v = (torch.cat(part) for part in zip(*states, strict=True))
        extra = scale_taken(self.config, scales.repeat(n))
        return Point(x_t, t[1:].flatten(), v, r[1:].flatten(), cond, seed, extra, batch)

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """From noise along the teacher's trajectories to the loss."""
        return self.regression(step, self.walk(batch))

    def share(self, step: int) -> float:
        """r at that training step."""
        own = self.config
        calm = min(max(step - own.calm_start, 0) / own.calm_steps, 1.0)
        return own.warm(step) * (1 - calm) + own.final_share * calm

    def regression(self, step: int, at: Point) -> Outcome:
        """The squared error against F- + g, weighted by time and by what the adaptive weight says."""
        f = self.velocity(at, at.extra)
        error = per_sample_mean((f - self.target(f, at, self.share(step))).square())
        return self.weighed(error / torch.tan(at.t).to(f), at)

    def weight_turn(self, batch: Batch) -> Outcome:
        """The same loss with w asked twice: one pass rounds the gradient otherwise, and changes a run."""
        error, t = self.errors[batch.first]
        return Outcome((torch.exp(-self.weight(t)) * error + self.weight(t)).mean())


METHOD = TBCM
