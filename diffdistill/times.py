"""Distributions over the angle t; each returns (n,) float64 angles."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import Schedule


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, device=generator.device, dtype=torch.float64)


def native_uniform(
    schedule: Schedule, n: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform in the schedule's own time between the fractions low and high of it.

    Timesteps for DiscreteVP, the shifted sigma for LinearFlow, the index into the Karras grid for EDM.
    """
    return schedule.at_fraction(low + (high - low) * _uniform(n, generator))


def log_normal(schedule: Schedule, n: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """ln sigma ~ N(mean, std^2) with sigma = data_std tan(t) (Karras et al. 2022, table 1)."""
    sigma = torch.exp(mean + std * _normal(n, generator))
    return torch.atan(sigma / schedule.data_std)


def logit_normal(schedule: Schedule, n: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """logit of the flow time sigma/(alpha + sigma) ~ N(mean, std^2) (Esser et al. 2024, section 3.1)."""
    sigma = torch.sigmoid(mean + std * _normal(n, generator))
    return torch.atan2(sigma, (1 - sigma) * schedule.data_std)
