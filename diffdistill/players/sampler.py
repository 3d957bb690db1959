"""How a few-step student is sampled: levels, and the step from one to the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.core.schedule import DiscreteVP, Schedule
from diffdistill.players.lora import LoraNetwork
from diffdistill.players.two_times import (
    Change,
    changes_to_one_time,
    low_rank_changes,
    second_times,
    with_one_time,
)


class Step(Protocol):
    """What follows a student's prediction, on the way to the next level."""

    stock: ClassVar[Mapping[str, str]]  #: the class of diffusers that takes several such steps, by kind of schedule

    @property
    def name(self) -> str:
        """In a student's record."""

    def leads(self, schedule: Schedule, level: float) -> Tensor:
        """The angle () to which a prediction is followed on the way to a level; from there on noise is fresh."""

    def __call__(self, prediction: Prediction, r: Tensor, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x_s (B, ...) at the angles s (B,), by way of `leads`, r (B,); noise() (B, ...) is drawn if it is called."""

    def spread(self, r: Tensor, s: Tensor) -> Tensor:
        """(B,) the standard deviation of the fresh noise in x_s."""


@dataclass(frozen=True)
class Renoise:
    """Fresh noise on the predicted x0 (Song et al. 2023, arXiv:2303.01469, Algorithm 1; DMD2's sampler)."""

    name: ClassVar[str] = "renoise"
    stock: ClassVar[Mapping[str, str]] = {"DiscreteVP": "LCMScheduler", "LinearFlow": "FlowMatchLCMScheduler"}

    def leads(self, schedule: Schedule, level: float) -> Tensor:
        """0, which is clean data."""
        return torch.zeros((), dtype=torch.float64)

    def __call__(self, prediction: Prediction, r: Tensor, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the angles s, of fresh noise on the predicted x0."""
        return diffuse(prediction.x0, s, noise())

    def spread(self, r: Tensor, s: Tensor) -> Tensor:
        """sin(s)."""
        return torch.sin(s)


@dataclass(frozen=True)
class DDIM:
    """The deterministic step, a rotation (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0)."""

    name: ClassVar[str] = "ddim"
    stock: ClassVar[Mapping[str, str]] = {
        "DiscreteVP": "DDIMScheduler",
        "EDM": "EDMEulerScheduler",
        "LinearFlow": "FlowMatchEulerDiscreteScheduler",
    }

    def leads(self, schedule: Schedule, level: float) -> Tensor:
        """The level's own angle."""
        return schedule.angle(level)

    def __call__(self, prediction: Prediction, r: Tensor, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the angles s, of the predicted x0 and the predicted noise; `noise` is not drawn."""
        return prediction.at(s)

    def spread(self, r: Tensor, s: Tensor) -> Tensor:
        """0: there is no fresh noise."""
        return torch.zeros_like(s)


@dataclass(frozen=True)
class Gamma:
    """Past the level to less noise, and back to it by fresh noise.

    It goes to sqrt(1 - gamma^2) times the level's sigma (Kim et al. 2023, arXiv:2310.02279, gamma-sampling), or on
    discrete timesteps to (1 - gamma) times the timestep, rounded down, as a stock scheduler does (Zheng et al. 2024,
    arXiv:2402.19159, Algorithm 4); timestep 0 is clean data then. With gamma 0 either is `DDIM`, with 1 `Renoise`.
    """

    gamma: float
    stock: ClassVar[Mapping[str, str]] = {"DiscreteVP": "TCDScheduler"}

    @property
    def name(self) -> str:
        """As `step_named` reads it."""
        return f"gamma {self.gamma}"

    def leads(self, schedule: Schedule, level: float) -> Tensor:
        """The angle of the lesser noise."""
        if isinstance(schedule, DiscreteVP):
            # In the precision in which diffusers rounds.
            time = torch.floor((1 - self.gamma) * torch.tensor(int(level)))
            return schedule.angle(time) if time > 0 else torch.zeros((), dtype=torch.float64)
        return torch.atan(math.sqrt(1 - self.gamma**2) * torch.tan(schedule.angle(level)))

    def __call__(self, prediction: Prediction, r: Tensor, s: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """x at the angles s, by the deterministic step to r; in sigma's coordinates the variances add."""
        x_r = prediction.at(r)
        kept = torch.cos(s) / torch.cos(r)
        return expand(kept, x_r) * x_r + expand(torch.sqrt(1 - kept**2), x_r) * noise()

    def spread(self, r: Tensor, s: Tensor) -> Tensor:
        """Of what the deterministic step leaves out."""
        return torch.sqrt(1 - (torch.cos(s) / torch.cos(r)) ** 2)


STEPS: dict[str, Step] = {step.name: step for step in (Renoise(), DDIM())}


def step_named(name: str) -> Step | None:
    """The step of a student's record: one of `STEPS`, or "gamma" and its number; None where there is none such."""
    kind, _, number = name.partition(" ")
    try:
        return STEPS.get(name) or (gamma_step(float(number)) if kind == "gamma" and 0 < float(number) < 1 else None)
    except ValueError:
        return None


def gamma_step(gamma: float) -> Step:
    """The step of that share of fresh noise, 0 to 1."""
    return {0.0: STEPS["ddim"], 1.0: STEPS["renoise"]}.get(gamma) or Gamma(gamma)


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
        return self.denoiser(x_t, t, cond, Extra(r=self.leads(k).to(t).expand(len(t))))

    def leads(self, k: int) -> Tensor:
        """The angle () to which level k's prediction is followed; 0 from the last level on."""
        if k + 1 < len(self.levels):
            return self.step.leads(self.denoiser.schedule, self.levels[k + 1])
        return torch.zeros((), dtype=torch.float64)

    def network(self, shape: Sequence[int], cond: Cond) -> nn.Module:
        """The student's network; one of two times is one of a single time where its jumps are of several lengths.

        A copy then, at this sampler's levels; of a LoRA player always one that can be exported alone. `cond` (n, ...)
        are any conditions, one for each of the n levels.
        """
        network: nn.Module = self.denoiser.network
        if not self.two_times or (self.equal_jumps and not isinstance(network, LoraNetwork)):
            return network
        at = self._jumps(shape, cond)
        if isinstance(network, LoraNetwork):
            return network.with_changes(low_rank_changes(self.denoiser, *at), folds_inputs=self.equal_jumps)
        return with_one_time(self.denoiser, *at)

    @property
    def equal_jumps(self) -> bool:
        """Whether all steps jump equally far in the schedule's own time.

        Those of a flow in pixels do not: its first level is a thousandth below 1.
        """
        if len(self.levels) == 1 or not isinstance(self.step, DDIM):
            return len(self.levels) == 1
        schedule = self.denoiser.schedule
        angles = torch.stack([*(schedule.angle(level) for level in self.levels), torch.zeros((), dtype=torch.float64)])
        gaps = schedule.fraction(angles).diff()
        return bool((gaps - gaps[0]).abs().max() < 1e-6)

    def changes(self, shape: Sequence[int], cond: Cond) -> dict[str, Change]:
        """By layer, what `network` of a student of two times has changed where its embedding takes the gap."""
        return changes_to_one_time(self.denoiser, *self._jumps(shape, cond), self.equal_jumps)

    def _jumps(self, shape: Sequence[int], cond: Cond) -> tuple[Tensor, Tensor, Tensor, Cond]:
        weight = next(self.denoiser.network.parameters())
        t = torch.stack([self.denoiser.schedule.angle(level) for level in self.levels]).to(weight.device)
        r = torch.stack([self.leads(k) for k in range(len(self.levels))]).to(weight.device)
        return weight.new_zeros(len(t), *shape), t, r, cond

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) at the first level, for standard normal z (B, ...)."""
        t = self.denoiser.schedule.angle(self.levels[0])
        scale = self.denoiser.schedule.init_scale(float(t))
        return z * scale, t.to(z.device).expand(len(z))

    def input_at(self, k: int, z: Tensor, cond: Cond, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) that level k reads, after the levels before it; noise(j) (B, ...) is added for level j."""
        x, t = self.start(z)
        for j in range(1, k + 1):
            x, t = self.moved(x, t, j, cond, lambda j=j: noise(j))  # type: ignore[misc]
        return x, t

    def moved(self, x: Tensor, t: Tensor, j: int, cond: Cond, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """x_s (B, ...) and s (B,) that level j reads, from what the level before it read, x (B, ...) at t (B,)."""
        s = self.denoiser.schedule.angle(self.levels[j]).to(x.device).expand(len(x))
        r = self.leads(j - 1).to(s).expand(len(x))
        return self.step(self.predict(x, t, j - 1, cond), r, s, noise), s

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
