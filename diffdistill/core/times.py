"""Distributions over the angle t, and a grid of it; each returns (n,) float64 angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdistill.core.schedule import Schedule


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, device=generator.device, dtype=torch.float64)


def native_uniform(
    schedule: Schedule, n: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Uniform in the schedule's own time between the fractions low and high of it.

    Timesteps for DiscreteVP, the shifted sigma for LinearFlow, the index into the Karras grid for EDM. A shift s puts
    s u/(1 + (s - 1) u) in the place of a uniform u (Esser et al. 2024, arXiv:2403.03206, eq. 23).
    """
    u = _uniform(n, generator)
    return schedule.at_fraction(low + (high - low) * (shift * u / (1 + (shift - 1) * u)))


def u_shaped(schedule: Schedule, n: int, generator: torch.Generator, a: float) -> Tensor:
    """The flow time, or the schedule's own, with the density of e^(a u) and its mirror image, a half each; 0: uniform.

    More often near both ends (Lee et al. 2024, arXiv:2405.20320, section 4.1).
    """
    u = _uniform(n, generator)
    if a > 0:
        u = torch.log1p(u * math.expm1(a)) / a
        u = torch.where(_uniform(n, generator) < 0.5, u, 1 - u)
    return schedule.at_fraction(u)


def log_normal(schedule: Schedule, n: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """ln sigma ~ N(mean, std^2) with sigma = data_std tan(t) (Karras et al. 2022, table 1)."""
    sigma = torch.exp(mean + std * _normal(n, generator))
    return torch.atan(sigma / schedule.data_std)


def edm_log_normal(schedule: Schedule, n: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """EDM's ln sigma ~ N(mean, std^2) at its data_std of 0.5, whatever the schedule's: the same angles for all.

    Clamped to the angles that the schedule knows.
    """
    sigma = torch.exp(mean + std * _normal(n, generator))
    return _edm_angle(schedule, sigma)


def edm_karras(schedule: Schedule, n: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Uniform between the fractions low and high of EDM's grid, sigma from 0.002 to 80 with rho = 7 at data_std 0.5.

    Fraction 0 is sigma = 0.002; the angles are the same for all schedules, clamped to those that this one knows.
    """
    return edm_karras_angle(schedule, low + (high - low) * _uniform(n, generator))


def edm_karras_angle(schedule: Schedule, u: Tensor) -> Tensor:
    """The angles at the fractions u (n,) of that grid."""
    first, last = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return _edm_angle(schedule, (first + u * (last - first)) ** 7)


def _edm_angle(schedule: Schedule, sigma: Tensor) -> Tensor:
    return torch.atan(sigma / 0.5).clamp(schedule.t_min, schedule.t_max)


def logit_normal(schedule: Schedule, n: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """logit of the flow time sigma/(alpha + sigma) ~ N(mean, std^2) (Esser et al. 2024, section 3.1)."""
    sigma = torch.sigmoid(mean + std * _normal(n, generator))
    return torch.atan2(sigma, (1 - sigma) * schedule.data_std)


def spans(schedule: Schedule, n: int, generator: torch.Generator, length: float | None = None) -> tuple[Tensor, Tensor]:
    """t and r <= t (n,), uniform in the schedule's own time on the triangle r < t (Boffi et al. 2025).

    With `length`, the logit of t - r is N(length, 1), and then r is uniform where it fits (Sabour et al. 2025,
    arXiv:2506.14603).
    """
    one, other = _uniform(n, generator), _uniform(n, generator)
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    if length is not None:
        apart = torch.sigmoid(length + _normal(n, generator))
        low = (1 - apart) * one
        high = low + apart
    return schedule.at_fraction(high), schedule.at_fraction(low)


def karras_grid(schedule: Schedule, n: int, top: float, rho: float = 7.0) -> Tensor:
    """Descending, evenly spaced in tan(t)^(1/rho): the grid of consistency models (Karras et al. 2022, eq. 5).

    From the angle `top` to the schedule's cleanest, and within EDM's own range (sigma 80 to 0.002 at
    data_std 0.5) where those are pure noise or pure data, for which tan(t) is infinite or zero.
    """
    low = schedule.t_min or math.atan(0.002 / 0.5)
    high = min(top, math.atan(80.0 / 0.5))
    first, last = (math.tan(t) ** (1 / rho) for t in (high, low))
    grid = torch.atan(torch.linspace(first, last, n, dtype=torch.float64) ** rho)
    grid[0], grid[-1] = high, low  # to the last bit: a method asks whether it is at an end
    return grid


def grid_points_at(k: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, from s0 to s1 + 1; constant after K = total
    (Song et al. 2023, arXiv:2303.01469, appendix C)."""
    return math.ceil(math.sqrt(min(k / total, 1) * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
