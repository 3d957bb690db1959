"""What the exact checks share of guided DDIM steps on Gaussians, where each step is affine."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.core.schedule import student_grid
from diffdistill.exact.analytic import class_gaussians_teacher


class GuidedClass:
    """A class and "no class" of one variance: guidance is affine there. 64 points, each with its own scale in [1, 5].

    Angles are those of 8 steps, `grid` (9,); `x_t` (64, 2) and `scale` (64,) are points and scales.
    """

    means, std = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
    n = 64

    def __init__(self) -> None:
        self.teacher, draw = class_gaussians_teacher(self.means, self.std), torch.Generator().manual_seed(0)
        self.grid = student_grid(self.teacher.denoiser.schedule, 8)
        self.x_t = torch.randn(self.n, 2, generator=draw, dtype=torch.float64)
        self.scale = 1 + 4 * torch.rand(self.n, generator=draw, dtype=torch.float64)
        self.cond = {"class_labels": torch.zeros(self.n).long()}
        # Guided, the class is a Gaussian of this mean.
        self.aim = self.means[1] + self.scale[:, None] * (self.means[0] - self.means[1])

    def gain(self, t: Tensor) -> Tensor:
        """rho in x0 = m + rho (x_t - cos(t) m)."""
        return torch.cos(t) * self.std**2 / (torch.cos(t) ** 2 * self.std**2 + torch.sin(t) ** 2)

    def landed(self, first: int, last: int, stride: int = 1) -> Tensor:
        """Where guided DDIM steps over the grid end: each is affine, with the factor k about the mean."""
        x = self.x_t
        for t, s in pairwise(self.grid[first : last + 1 : stride]):
            k = torch.cos(s) * self.gain(t) + torch.sin(s) * (1 - torch.cos(t) * self.gain(t)) / torch.sin(t)
            x = torch.cos(s) * self.aim + k * (x - torch.cos(t) * self.aim)
        return x

    def target(self, first: int, last: int) -> Tensor:
        """The x0 (64, 2) whose one step over the grid lands where all of its guided steps do."""
        t, s = self.grid[first], self.grid[last]
        return (torch.sin(t) * self.landed(first, last) - torch.sin(s) * self.x_t) / torch.sin(t - s)
