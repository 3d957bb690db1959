"""Noise schedules: between a network's own time and the angle of the normal form.

In the normal form `x_t = cos(t) x0 + sin(t) eps`, with x0 divided by `data_std` and the angle
`t = atan2(sigma, alpha * data_std)` in [0, pi/2]. A schedule says, for an angle, what the network calls
that time and how its input is scaled. All tables and angles are float64.

`level` is the time in the units people use: the timestep for DiscreteVP, sigma for EDM and LinearFlow
(there sigma is the flow time in [0, 1], 1 is noise), the angle for TrigFlow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffdistill.errors import UserError


class Native(NamedTuple):
    """What a network sees at an angle; each field is float64 and has the shape of t."""

    time: Tensor  #: the time argument of the network
    alpha: Tensor  #: x_native = alpha * x0_data + sigma * eps
    sigma: Tensor
    scale: Tensor  #: network input = scale * x_t


class Schedule(Protocol):
    """The relation of a network's own time, its levels and the angles of the normal form."""

    @property
    def data_std(self) -> float:
        """The standard deviation of the data in the network's units; the normal form's x0 is divided by it."""

    @property
    def t_min(self) -> float:
        """The least noise angle that the network knows."""

    @property
    def t_max(self) -> float:
        """The greatest noise angle that the network knows."""

    def native(self, t: Tensor) -> Native:
        """What the network sees at the angles t, of any shape."""

    def angle(self, level: Tensor | float) -> Tensor:
        """The float64 angles of levels of any shape."""

    def at_fraction(self, u: Tensor) -> Tensor:
        """The angles at the fractions u of the schedule's own times; 0 is the least noise and 1 the most."""

    def fraction(self, t: Tensor) -> Tensor:
        """The inverse of `at_fraction`, without its rounding; 0 is clean data, and a student's levels are k/n."""

    def levels(self, steps: int) -> Tensor:
        """(steps,) the stock sampler's descending row of levels. Raises UserError for less than one step."""

    @property
    def init_level(self) -> float:
        """Where a one-step student reads pure noise by default: the noisiest level that a stock scheduler starts at."""

    def init_scale(self, t: float) -> float:
        """The standard deviation of x_t at the angle t when the stock scheduler draws the initial noise."""


def _f64(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _positive_steps(steps: int) -> int:
    if steps < 1:
        raise UserError(f"steps: {steps} is not a number of sampling steps; give 1 or more")
    return steps


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """DDPM's variance-preserving chain: alpha = sqrt(abar), sigma = sqrt(1 - abar), level 0..T-1."""

    alphas_cumprod: Tensor  #: (T,), decreasing
    data_std: float = 1.0
    _angles: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_config(cls, config: dict[str, Any], data_std: float = 1.0) -> DiscreteVP:
        """Build from a diffusers scheduler's config (betas, their schedule, `rescale_betas_zero_snr`).

        `snr_shift_scale` divides the chain's signal-to-noise ratio (CogVideoX). Raises UserError for a `beta_schedule`
        that diffusers does not have.
        """
        betas = _betas(config)
        alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        shift = config.get("snr_shift_scale", 1.0)
        if shift != 1:
            alphas_cumprod = alphas_cumprod / (shift + (1 - shift) * alphas_cumprod)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, data_std)

    def _table(self, device: torch.device) -> Tensor:
        # One copy a device: moving the table at every call would synchronise a GPU.
        if device not in self._angles:
            abar = self.alphas_cumprod.to(torch.float64)
            table = torch.atan2((1 - abar).sqrt(), abar.sqrt() * self.data_std)
            self._angles[device] = table.to(device)
        return self._angles[device]

    @property
    def t_min(self) -> float:
        """The angle of timestep 0."""
        return float(self._table(torch.device("cpu"))[0])

    @property
    def t_max(self) -> float:
        """The angle of timestep T - 1; pi/2 for zero terminal SNR."""
        return float(self._table(torch.device("cpu"))[-1])

    def native(self, t: Tensor) -> Native:
        """Between two timesteps the time is interpolated linearly in the angle; at a timestep it is exact."""
        table = self._table(t.device)
        # contiguous: searchsorted warns about an expanded t.
        above = torch.searchsorted(table, t.detach().contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        time = (above - 1) + ((t - low) / (high - low)).clamp(0, 1)
        cos, sin = torch.cos(t) / self.data_std, torch.sin(t)
        norm = torch.sqrt(cos**2 + sin**2)
        return Native(time, cos / norm, sin / norm, 1 / norm)

    def angle(self, level: Tensor | float) -> Tensor:
        """Between two timesteps the angle is interpolated linearly."""
        level = _f64(level)
        table = self._table(level.device)
        below = level.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[below], table[below + 1], level - below)

    def at_fraction(self, u: Tensor) -> Tensor:
        """The angle of timestep floor(u T)."""
        table = self._table(u.device)
        return table[(u * len(table)).long().clamp(0, len(table) - 1)]

    def fraction(self, t: Tensor) -> Tensor:
        """(timestep + 1)/T, so that the last timestep is 1; linear in the angle below timestep 0."""
        first = self._table(t.device)[0]
        return (torch.where(t < first, t / first, 1 + self.native(t).time)) / len(self.alphas_cumprod)

    def levels(self, steps: int) -> Tensor:
        """DDIM with trailing spacing: the first step is at the noisiest timestep."""
        count = len(self.alphas_cumprod)
        _room_for(self, _positive_steps(steps), "steps")
        # Rounded as numpy's arange(count, 0, -count / steps) rounds, which decides ties such as 937.5.
        levels = count + torch.arange(steps, dtype=torch.float64) * ((count - count / steps) - count)
        return levels.round() - 1

    @property
    def init_level(self) -> float:
        """The last timestep, T - 1."""
        return len(self.alphas_cumprod) - 1

    def init_scale(self, t: float) -> float:
        """The initial noise is N(0, I) in the network's units, so x_t is that over the scale."""
        return 1 / float(self.native(_f64(t)).scale)


@dataclass(frozen=True)
class LinearFlow:
    """Flow matching: alpha = 1 - sigma, level sigma in [0, 1], network time `time_scale * sigma`.

    `shift` moves the sampling grid and the native-uniform times, sigma' = shift sigma / (1 + (shift - 1) sigma)
    (Esser et al. 2024, arXiv:2403.03206, section 5.3.2), never the meaning of a time. `grid`: whether the pipeline
    lets its scheduler take its "own" row of levels or hands it the "given" one, 1, .., 1/n. `starts_at_one`: the
    pipeline's scheduler takes any time; otherwise (pixels) only whole ones below `train_timesteps`. `log_shift` (a, b):
    the stock pipeline shifts its row of n steps by exp(a n + b), and `shift` is that of its usual number (FLUX.2).
    """

    shift: float = 1.0
    data_std: float = 1.0
    time_scale: float = 1000.0
    train_timesteps: int = 1000
    t_min: float = 0.0
    grid: Literal["own", "given"] = "own"
    starts_at_one: bool = False
    log_shift: tuple[float, float] | None = None

    @property
    def t_max(self) -> float:
        """Pure noise, pi/2."""
        return math.pi / 2

    def native(self, t: Tensor) -> Native:
        """alpha + sigma = 1, so both are divided by the sum of cos(t)/data_std and sin(t)."""
        cos, sin = torch.cos(t) / self.data_std, torch.sin(t)
        norm = cos + sin
        return Native(self.time_scale * sin / norm, cos / norm, sin / norm, 1 / norm)

    def angle(self, level: Tensor | float) -> Tensor:
        """The angle of the flow time sigma in [0, 1]."""
        sigma = _f64(level)
        return torch.atan2(sigma, (1 - sigma) * self.data_std)

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def at_fraction(self, u: Tensor) -> Tensor:
        """The angle of the flow time u, shifted."""
        return self.angle(self._shifted(u))

    def fraction(self, t: Tensor) -> Tensor:
        """The flow time before the shift."""
        sigma = self.native(t).sigma
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def levels(self, steps: int) -> Tensor:
        """FlowMatchEulerDiscreteScheduler's: uniform between the end points of the shifted range, then shifted."""
        if self.log_shift is not None:
            slope, offset = self.log_shift
            return replace(self, shift=math.exp(slope * _positive_steps(steps) + offset), log_shift=None).levels(steps)
        if self.grid == "given":
            return self.trailing(steps)
        # The scheduler takes both ends from its already shifted training table, and shifts once more.
        ends = self._shifted(torch.tensor([1.0, 1.0 / self.train_timesteps], dtype=torch.float64))
        sigma = torch.linspace(float(ends[0]), float(ends[1]), _positive_steps(steps), dtype=torch.float64)
        return self._shifted(sigma)

    def trailing(self, steps: int) -> Tensor:
        """1, .., 1/n shifted: what is left after k of n steps is a whole step."""
        return self._shifted(torch.arange(_positive_steps(steps), 0, -1, dtype=torch.float64) / steps)

    @property
    def init_level(self) -> float:
        """The flow time 1, or the next of `train_timesteps` below it where the scheduler does not start at one."""
        return 1.0 if self.starts_at_one else 1 - 1 / self.train_timesteps

    def init_scale(self, t: float) -> float:
        """The initial noise is N(0, I) in the network's units, so x_t is that over the scale."""
        return 1 / float(self.native(_f64(t)).scale)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 (arXiv:2206.00364): alpha = 1, level sigma, network time `time_scale * ln(sigma)`.

    The network's input is c_in x_native, which is x_t itself. `unit_init`: the initial noise has the standard
    deviation sqrt(sigma^2 + 1) of diffusers' EDMEulerScheduler instead of sigma (CMStochasticIterative).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    data_std: float = 0.5
    rho: float = 7.0
    time_scale: float = 0.25
    unit_init: bool = True

    @property
    def t_min(self) -> float:
        """The angle of sigma_min."""
        return math.atan(self.sigma_min / self.data_std)

    @property
    def t_max(self) -> float:
        """The angle of sigma_max."""
        return math.atan(self.sigma_max / self.data_std)

    def native(self, t: Tensor) -> Native:
        """sigma = data_std tan(t), inside the range that the network knows; alpha is 1."""
        sigma = self.data_std * torch.tan(t.clamp(self.t_min, self.t_max))
        one = torch.ones_like(sigma)
        return Native(self.time_scale * torch.log(sigma), one, sigma, one)

    def angle(self, level: Tensor | float) -> Tensor:
        """The angle of the noise's standard deviation sigma."""
        return torch.atan(_f64(level) / self.data_std)

    def _karras(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def at_fraction(self, u: Tensor) -> Tensor:
        """The angle at the fraction u of the Karras grid, evenly spaced in sigma^(1/rho)."""
        return self.angle(self._karras(u))

    def fraction(self, t: Tensor) -> Tensor:
        """Where sigma stands in the Karras grid; 0 from its least one down."""
        low, high = (end ** (1 / self.rho) for end in (self.sigma_min, self.sigma_max))
        return (self.native(t).sigma ** (1 / self.rho) - low) / (high - low)

    def levels(self, steps: int) -> Tensor:
        """Eq. 5 of the paper."""
        return self._karras(torch.linspace(1, 0, _positive_steps(steps), dtype=torch.float64))

    @property
    def init_level(self) -> float:
        """The greatest sigma."""
        return self.sigma_max

    def init_scale(self, t: float) -> float:
        """The initial noise has the standard deviation sigma, or sqrt(sigma^2 + 1) with `unit_init`."""
        sigma = self.data_std * math.tan(t)
        return math.sqrt((sigma**2 + self.unit_init) / (sigma**2 + self.data_std**2))


@dataclass(frozen=True)
class TrigFlow:
    """The normal form itself (Lu & Song 2024, arXiv:2410.11081): level, time and angle are one."""

    data_std: float = 1.0
    t_min: float = 0.0
    t_max: float = math.pi / 2

    def native(self, t: Tensor) -> Native:
        """The angle itself, and an unscaled input."""
        return Native(t, torch.cos(t) / self.data_std, torch.sin(t), torch.ones_like(t))

    def angle(self, level: Tensor | float) -> Tensor:
        """The level itself."""
        return _f64(level)

    def at_fraction(self, u: Tensor) -> Tensor:
        """Linear in the angle."""
        return self.t_min + u * (self.t_max - self.t_min)

    def fraction(self, t: Tensor) -> Tensor:
        """The angle over the greatest one."""
        return t / self.t_max

    def levels(self, steps: int) -> Tensor:
        """Evenly spaced angles from t_max, without the zero at the end."""
        return torch.linspace(self.t_max, 0, _positive_steps(steps) + 1, dtype=torch.float64)[:-1]

    @property
    def init_level(self) -> float:
        """The greatest angle."""
        return self.t_max

    def init_scale(self, t: float) -> float:
        """Always one: the initial noise is N(0, I)."""
        return 1.0


def sampling_grid(schedule: Schedule, steps: int, start: float | None = None, *, option: str = "steps") -> Tensor:
    """(steps + 1,) the angles of `schedule.levels(steps)`, or of a student's levels from `start` down, and zero.

    Raises UserError, which begins with `option`, for more steps than there are timesteps.
    """
    _room_for(schedule, steps, option)
    levels = schedule.levels(steps) if start is None else student_levels(schedule, steps, start)
    return torch.cat([schedule.angle(levels), torch.zeros(1, dtype=torch.float64)])


def student_levels(schedule: Schedule, steps: int, start: float | None = None, *, option: str = "steps") -> Tensor:
    """(steps,) descending levels that divide the way to clean data, each one a student's starting point.

    The stock grids of EDM and flow matching end at their least noise; a few-step student would waste a pass
    there, so EDM's are those of one more step without the last, and a flow's are the trailing ones. None is noisier
    than where a stock scheduler can start.

    `start` is the first level, and the others divide the way from there as they do from the noisiest one: of the
    timesteps 0..start each n-th part (`lcm_indices`), of EDM's grid with that sigma for its greatest, of a flow's
    unshifted time, or of the angle. Raises UserError, which begins with `option`, for more steps than there are
    timesteps.
    """
    _room_for(schedule, steps, option)
    if start is not None:
        return _levels_from(schedule, steps, start)
    if isinstance(schedule, LinearFlow):
        levels = schedule.trailing(steps)
    else:
        levels = schedule.levels(steps + 1)[:-1] if isinstance(schedule, EDM) else schedule.levels(steps)
    return levels.clamp(max=schedule.init_level)


def _room_for(schedule: Schedule, steps: int, option: str) -> None:
    """UserError, which begins with that option, for more steps than there are timesteps."""
    if isinstance(schedule, DiscreteVP) and steps > (count := len(schedule.alphas_cumprod)):
        raise UserError(f"{option}: {steps} is more than the teacher's {count} timesteps; give {count} or fewer")


def check_levels(schedule: Schedule, levels: Iterable[float], name: str) -> None:
    """UserError, which begins with `name`, for a level that the schedule has not."""
    for level in levels:
        right, what = 0 < level <= schedule.init_level, f"above 0 and at most {schedule.init_level:g}"
        if isinstance(schedule, DiscreteVP):
            noisiest = len(schedule.alphas_cumprod) - 1
            right, what = level == int(level) and 0 <= level <= noisiest, f"a whole timestep from 0 to {noisiest}"
        elif isinstance(schedule, EDM):
            low, high = schedule.sigma_min, schedule.sigma_max
            right, what = low < level <= high, f"a sigma from {low} to {high}"
        elif isinstance(schedule, LinearFlow):
            right, what = 0 < level <= 1, "a flow time above 0, up to 1"
        if not right:
            raise UserError(f"{name}: {level:g} is not {what}")


def _levels_from(schedule: Schedule, steps: int, start: float) -> Tensor:
    if isinstance(schedule, DiscreteVP):
        if steps > start + 1:
            raise UserError(f"student_level: {start:g} leaves no {steps} timesteps; give {steps - 1} or more")
        levels = start - torch.tensor(lcm_indices(int(start) + 1, steps), dtype=torch.float64)
    elif isinstance(schedule, EDM):
        levels = replace(schedule, sigma_max=start).levels(steps + 1)[:-1]
    elif isinstance(schedule, LinearFlow):
        time = start / (schedule.shift - (schedule.shift - 1) * start)  # before the shift
        levels = replace(schedule, shift=1.0).trailing(steps) * time
        levels = schedule.shift * levels / (1 + (schedule.shift - 1) * levels)
    else:
        levels = start * torch.arange(_positive_steps(steps), 0, -1, dtype=torch.float64) / steps
    levels[0] = start  # to the last bit
    return levels


def lcm_indices(points: int, steps: int) -> list[int]:
    """Which of the `points` of LCM's grid its sampler of so many steps takes (Luo et al. 2023, arXiv:2310.04378)."""
    return [i * points // steps for i in range(steps)]


def student_grid(schedule: Schedule, steps: int, *, option: str = "steps") -> Tensor:
    """(steps + 1,) the angles of `student_levels(schedule, steps)`, and zero."""
    levels = student_levels(schedule, steps, option=option)
    return torch.cat([schedule.angle(levels), torch.zeros(1, dtype=torch.float64)])


def _betas(config: dict[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return _f64(config["trained_betas"])
    count = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start
    if name == "squaredcos_cap_v2":
        u = torch.arange(count + 1, dtype=torch.float64) / count
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
    raise UserError(f"beta_schedule: {name!r} is not supported; use one of {known}, or trained_betas")


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Lin et al. 2023 (arXiv:2305.08891), Algorithm 1: keep sqrt(abar_0), shift sqrt(abar_T) to zero."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
