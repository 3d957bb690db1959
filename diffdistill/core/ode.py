"""Solvers of the probability-flow ODE in the normal form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.core.prediction import Prediction, expand
from diffdistill.core.schedule import Schedule, sampling_grid

Denoise = Callable[[Tensor, Tensor, Cond], Prediction]
Step = Callable[[Denoise, Tensor, Tensor, Tensor, Cond], Tensor]

# Heun averages eps, which has a pole at pure noise; EDM's own range ends at tan(t) = 160.
_EPS_FORM_UNTIL = math.atan(200.0)


def ddim_step(denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """The rotation x_s = cos(t-s) x_t - sin(t-s) v (Song et al. 2021, arXiv:2010.02502, eq. 12, eta = 0).

    It is Euler's method in sigma/alpha, so it is also the Euler step of EDM and of flow matching.
    """
    return denoise(x_t, t, cond).at(s)


def heun_step(
    denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, eps_until: float = _EPS_FORM_UNTIL
) -> Tensor:
    """Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) without churn: eps averaged over both ends.

    A step to s = 0 is Euler's, as there. Close to pure noise, where that form has a pole, x0 is averaged
    instead, which is of second order too; `eps_until` is the angle from which on it is.
    """
    first = denoise(x_t, t, cond)
    second = denoise(first.at(s), s, cond)
    noisy = t > eps_until
    last = expand(s, x_t) == 0
    x0 = torch.where(last, first.x0, torch.lerp(first.x0, second.x0, 0.5))
    eps = torch.where(last, first.eps, torch.lerp(first.eps, second.eps, 0.5))
    y = torch.where(expand(noisy, x_t) > 0, x0, eps)
    return Prediction(x_t, t, y, noisy.to(t.dtype), (~noisy).to(t.dtype)).at(s)


def heun_x0_step(denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Heun's step with x0 averaged at every level, for long steps: it stays between what the two passes say.

    Where tan falls by a factor q, averaged eps counts the second x0 (q - 1)/2 times, and takes the first off again.
    """
    return heun_step(denoise, x_t, t, s, cond, eps_until=0.0)


def solve(step: Step, denoise: Denoise, x: Tensor, grid: Tensor, cond: Cond) -> Tensor:
    """Carry x (B, ...) from the angle grid[0] to grid[-1] through the descending angles of grid (n+1,)."""
    grid = grid.to(x.device)
    for t, s in pairwise(grid):
        x = step(denoise, x, t.expand(len(x)), s.expand(len(x)), cond)
    return x


def sample_ode(step: Step, denoise: Denoise, schedule: Schedule, z: Tensor, steps: int, cond: Cond) -> Tensor:
    """x0 (B, ...) of unit variance that `steps` steps on the schedule's own grid make of standard normal z (B, ...)."""
    grid = sampling_grid(schedule, steps)
    return solve(step, denoise, z * schedule.init_scale(float(grid[0])), grid, cond)


def inverse_ddim(x_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(B, ...) the x0 with which the DDIM step from x_t at t lands on x_s at s (Salimans & Ho 2022, arXiv:2202.00512).

    In double precision inside: it is a difference of nearby terms over a small angle.
    """
    high, low = x_t.double(), x_s.double()
    x0 = (expand(torch.sin(t), high) * low - expand(torch.sin(s), high) * high) / expand(torch.sin(t - s), high)
    return x0.to(x_t)


def addim_step(pred: Prediction, s: Tensor, x_var: Tensor) -> Tensor:
    """(B, ...) adjusted DDIM to the angle s (Heek et al. 2024, arXiv:2403.06807, eq. 14).

    The noise is lengthened by what the variance x_var (B,) of an element of x0 given x_t adds to x_s; DDIM
    itself, which goes on with the mean of x0, leaves that out. With x_var = 0 it is DDIM.
    """
    eps = pred.eps
    added = (torch.sin(pred.t - s) / torch.sin(pred.t)) ** 2 * x_var
    longer = torch.sqrt(torch.sin(s) ** 2 + added / eps.flatten(1).square().mean(1))
    return pred.at(s) + expand(longer - torch.sin(s), eps) * eps


def ddim_eta_step(pred: Prediction, s: Tensor, eta: float, z: Tensor) -> Tensor:
    """(B, ...) the DDIM step to the angles s (B,) with a share of its noise exchanged for z (B, ...).

    Of z there is eta sin(s)/sin(t) sqrt(1 - cos(t)^2/cos(s)^2), eq. 16 of Song et al. 2021 (arXiv:2010.02502): eta = 1
    is DDPM's step, 0 the ODE's. At s = 0 there is no noise.
    """
    t = pred.t
    moved = torch.sqrt((1 - (torch.cos(t) / torch.cos(s)) ** 2).clamp_min(0))
    n = eta * torch.sin(s) / torch.sin(t) * moved
    kept = torch.sqrt((torch.sin(s) ** 2 - n**2).clamp_min(0))
    return pred.at(s) + expand(kept - torch.sin(s), z) * pred.eps + expand(n, z) * z
