"""The game of the methods that give guidance in one pass and leave the number of sampling steps as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import Prediction
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch, Method, Need, Outcome, Turn


class ImitatingMethod(Method):
    """One player, the student, against the guided teacher's two passes.

    It is trained where it will be used, at points of guided trajectories whose scales lie in `scales`, or, without
    `scales`, on noised images at the scale of its options. The chains of the trajectories lie in the checkpoint.
    """

    def __init__(self, teacher: Teacher, config: Any, student: Denoiser, scales: tuple[float, float] | None):
        super().__init__(teacher, config)
        self.teacher = frozen(teacher.denoiser)
        self.student = student
        self.players = {"student": student}
        self.chains: GuidedChains | None = None
        if scales is None:
            self.needs = frozenset({Need.IMAGES})
        else:
            self.chains = self.state["chains"] = GuidedChains(teacher, config.trajectory_steps, *scales)

    @abstractmethod
    def error(self, target: Prediction, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Tensor:
        """The loss of the student's pass at x_t (B, ...), t (B,), scales (B,), against the guided prediction."""

    @final
    def turns(self, step: int) -> Sequence[Turn]:
        """The student moves in every step."""
        return [Turn("student", self.on_data if self.chains is None else self.on_trajectories)]

    @final
    def on_data(self, batch: Batch) -> Outcome:
        """The loss on noised images."""
        return Outcome(self.imitation(*self.noised_images(batch), batch.cond)[0])

    @final
    def on_trajectories(self, batch: Batch) -> Outcome:
        """The loss where the chains stand; its target also moves them on."""
        assert self.chains is not None
        loss, target = self.imitation(*self.chains.points(batch, self.teacher))
        self.chains.advance(batch, target)
        return Outcome(loss)

    @final
    def imitation(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor | None = None) -> tuple[Tensor, Prediction]:
        """The loss at x_t (B, ...), t (B,), for the scales (B,) or that of the options; and the guided prediction."""
        scale = torch.full_like(t, self.config.guidance_scale) if scale is None else scale
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale)
        return self.error(target, x_t, t, cond, scale), target
