"""The game of the continuous-time consistency models: sCM's target, and a weight of each time that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import expand
from diffdistill.players.adaptive_weight import AdaptiveWeight
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Optimizer, Outcome, Turn
from diffdistill.scaffold.tangent import Point, TangentMethod, normalised


class ContinuousMethod(TangentMethod):
    """f, the student's x0, is to be the same along a path (Lu & Song 2024, arXiv:2410.11081).

    With F- the value of the student's velocity F, which gets no gradient, and v the path's direction,

        g = -cos(t)^2 (F- - v) - r cos(t) sin(t) (x_t + dF-/dt),    target = F- + g/(|g| + c).

    A method says `times` and `regression`, and builds `weight`, w, which learns where it is one of the players.
    """

    weight: AdaptiveWeight

    def __init__(self, teacher: Teacher, config: Any, student: Denoiser | None):
        super().__init__(teacher, config, student)
        # Those (B,) of the student's last turn, without a gradient, and their angles, by their place in the step.
        self.errors: dict[int, tuple[Tensor, Tensor]] = {}

    def tangent(self, f: Tensor, at: Point, r: float) -> Tensor:
        """g (B, ...) where the student says f, not normalised: cos(t) df/dt at r = 1."""
        cos, speed = torch.cos(at.t), torch.cos(at.t) * torch.sin(at.t)
        rising = expand(speed, f) * at.x_t + self.derivative(at, speed, at.extra)
        return -expand(cos**2, f) * (f - at.v) - r * rising

    def target(self, f: Tensor, at: Point, r: float) -> Tensor:
        """F- + g/(|g| + c) (B, ...) where the student says f, without a gradient."""
        held = f.detach()
        return held + normalised(self.tangent(held, at, r), self.config.norm, self.config.norm_c)

    def weighed(self, error: Tensor, at: Point) -> Outcome:
        """The mean of e^(-w) error, for errors (B,) there, which the weight's turn learns from."""
        self.errors[at.place] = error.detach(), at.t
        learned = torch.exp(-self.weight(at.t)).detach() if "weight" in self.players else 1.0
        return Outcome((learned * error).mean(), {"error": error.mean()})

    def more_turns(self, step: int) -> Sequence[Turn]:
        """The adaptive weight's."""
        return [Turn("weight", self.weight_turn)] if "weight" in self.players else []

    def weight_turn(self, batch: Batch) -> Outcome:
        """The adaptive weight on the errors of the student's turn: e^(-w) error + w."""
        error, t = self.errors[batch.first]
        w = self.weight(t)
        return Outcome((torch.exp(-w) * error + w).mean())

    def optimizer(self, player: str) -> Optimizer:
        """The adaptive weight does not decay."""
        own = super().optimizer(player)
        return own._replace(weight_decay=0.0) if player == "weight" else own
