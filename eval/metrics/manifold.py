"""Precision, recall, density and coverage from the balls around a set's points.

Kynkaanniemi et al. 2019 (arXiv:1904.06991), eqs. 1 and 2; Naeem et al. 2020 (arXiv:2002.09797), eqs. 3 and 4.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.eval.metrics.moments import check, row_blocks


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, at least 0 and about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall of `fake (M, D)` against `real (N, D)`.

    A set's manifold is the union of the closed balls around its points that reach their k-th
    nearest *other* point of the set (a point is not its own neighbour; an exact duplicate is one).
    Precision is the share of fakes in the real manifold, recall of reals in the fake one.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check(real, fake, at_least=k + 1)
    return PrecisionRecall(_Balls(real, k).share_inside(fake), _Balls(fake, k).share_inside(real))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage of `fake (M, D)` against `real (N, D)`, with the balls of `precision_recall`.

    Density is the number of real balls that a fake lies in, on average, over k; coverage the share of real
    balls with a fake inside. Balls are closed, as in the paper; the authors' code leaves the boundary out.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check(real, at_least=k + 1)
    check(real, fake, at_least=1)
    balls = _Balls(real, k)
    count, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for inside in balls.inside(fake):
        count += int(inside.sum())
        covered |= inside.any(0)
    return DensityCoverage(count / (k * len(fake)), covered.double().mean().item())


class _Balls:
    """The closed balls around the points of a set that reach their k-th nearest other point."""

    def __init__(self, support: Tensor, k: int) -> None:
        support = support.double()
        self.centre = support.mean(0)  # small norms keep the cancellation in |x|^2 + |y|^2 - 2 x.y small
        self.support = support - self.centre
        rows = row_blocks(self.support, self.support)
        # The k + 1 smallest of a row hold the point itself, at distance 0.
        squared_radii = torch.cat([_squared_distances(x, self.support).kthvalue(k + 1).values for x in rows])
        # Rounding must not push a point off the closed ball it bounds, nor out of a ball of radius 0.
        self.reach = squared_radii + 1e-12 * self.support.square().sum(1).max()

    def inside(self, points: Tensor) -> Iterator[Tensor]:
        """(rows of `points`, balls) bool, block by block: whether a point lies in a ball."""
        for x in row_blocks(points, self.support):
            yield _squared_distances(x - self.centre, self.support) <= self.reach

    def share_inside(self, points: Tensor) -> float:
        """Share of `points` within at least one ball."""
        return torch.cat([inside.any(1) for inside in self.inside(points)]).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
