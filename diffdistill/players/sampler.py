"""How a few-step student is sampled: levels, and the step from one to the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.players.two_times import second_times


class Step(Protocol):
    """What follows a student's prediction, on the way to the next level."""

    name: ClassVar[str]  #: in a student's record
    stock: ClassVar[Mapping[str, str]]  #: the class of diffusers that takes several such steps, by kind of schedule

    def __call__(self, prediction: Prediction, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x_s (B, ...) at the angles s (B,); noise() (B, ...) is standard normal, and drawn if it is called."""


@dataclass(frozen=True)
class Renoise:
    """Fresh noise on the predicted x0 (Song et al. 2023, arXiv:2303.01469, Algorithm 1; DMD2's sampler)."""

    name: ClassVar[str] = "renoise"
    stock: ClassVar[Mapping[str, str]] = {"DiscreteVP": "LCMScheduler", "LinearFlow": "FlowMatchLCMScheduler"}

    def __call__(self, prediction: Prediction, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the angles s, of fresh noise on the predicted x0."""
        return diffuse(prediction.x0, s, noise())


@dataclass(frozen=True)
class DDIM:
    """The deterministic step, a rotation (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0)."""

    name: ClassVar[str] = "ddim"
    stock: ClassVar[Mapping[str, str]] = {
        "DiscreteVP": "DDIMScheduler",
        "EDM": "EDMEulerScheduler",
        "LinearFlow": "FlowMatchEulerDiscreteScheduler",
    }

    def __call__(self, prediction: Prediction, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the angles s, of the predicted x0 and the predicted noise; `noise` is not drawn."""
        return prediction.at(s)


STEPS: dict[str, Step] = {step.name: step for step in (Renoise(), DDIM())}


class Sampler:
    """One denoising a level, from noise at the first level; `step` leads from a level to the next.

    `levels` are timesteps or sigmas of the denoiser's schedule, descending. With one level the step does not matter.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float], step: Step = STEPS["renoise"]):
        self.denoiser = denoiser
        self.levels = tuple(float(level) for level in levels)
        self.step = step
        self.two_times = bool(second_times(getattr(denoiser, "network", denoiser)))

    def predict(self, x_t: Tensor, t: Tensor, k: int, cond: Cond) -> Prediction:
        """What the denoiser says at level k; one with two times is told where the step leads: the next level, or 0."""
        if not self.two_times:
            return self.denoiser(x_t, t, cond)
        jumps = isinstance(self.step, DDIM) and k + 1 < len(self.levels)
        r = self.denoiser.schedule.angle(self.levels[k + 1]).to(t).expand(len(t)) if jumps else torch.zeros_like(t)
        return self.denoiser(x_t, t, cond, Extra(r=r))

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) at the first level, for standard normal z (B, ...)."""
        t = self.denoiser.schedule.angle(self.levels[0])
        scale = self.denoiser.schedule.init_scale(float(t))
        return z * scale, t.to(z.device).expand(len(z))

    def input_at(self, k: int, z: Tensor, cond: Cond, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) that level k reads, after the levels before it; noise(j) (B, ...) is added for level j."""
        x, t = self.start(z)
        for j in range(1, k + 1):
            s = self.denoiser.schedule.angle(self.levels[j]).to(x.device).expand(len(x))
            x = self.step(self.predict(x, t, j - 1, cond), s, lambda j=j: noise(j))  # type: ignore[misc]
            t = s
        return x, t

    def one_step(self, z: Tensor, cond: Cond) -> Tensor:
        """x0 (B, ...) of unit variance after the first level; gradients flow."""
        x_t, t = self.start(z)
        return self.predict(x_t, t, len(self.levels), cond).x0

    @torch.no_grad()
    def __call__(self, shape: Sequence[int], cond: Cond, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples (B, *shape) in the data's own units; sample i draws from generators[i] alone."""
        weight = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers()))

        def noise(j: int) -> Tensor:
            drawn = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
            return torch.stack(drawn).to(weight)

        x, t = self.input_at(len(self.levels) - 1, noise(0), cond, noise)
        return self.predict(x, t, len(self.levels), cond).x0 * self.denoiser.schedule.data_std


def one_step_sampler(student: Denoiser, level: float | None) -> Sampler:
    """The sampler of a one-step student that reads pure noise at `level`; None: at its schedule's `init_level`."""
    return Sampler(student, [student.schedule.init_level if level is None else level])
