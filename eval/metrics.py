"""Distances between two sets of features, in float64.

A feature is a row: `features (N, D)`, in whatever unit the feature network has. Every function is
pure and deterministic, takes any floating dtype, computes in float64 on the input's device, and
raises ValueError on sets that are not (N, D), not finite, too small, or of different D.

- `frechet_distance`: Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
- `kernel_distance`: Binkowski et al. 2018 (arXiv:1801.01401), KID without its subsets.
- `precision_recall`: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eqs. 1 and 2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of the largest pairwise matrix held at once: 128 MiB in float64.
PAIRS_AT_ONCE = 2**24


class Statistics(NamedTuple):
    """Mean and unbiased covariance of `n` features, float64."""

    n: int
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    recall: float


def statistics(features: Tensor) -> Statistics:
    """Statistics of `features (N, D)`, N >= 2, in two passes (one pass loses digits to cancellation)."""
    _check(features, at_least=2)
    n, width = features.shape
    blocks = features.split(max(1, PAIRS_AT_ONCE // width))
    mean = sum(block.double().sum(0) for block in blocks) / n
    centred = (block.double() - mean for block in blocks)
    return Statistics(n, mean, sum(block.T @ block for block in centred) / (n - 1))


def frechet_distance(p: Statistics, q: Statistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in squared feature units.

    |m_p - m_q|^2 + tr(S_p + S_q - 2 (S_p^{1/2} S_q S_p^{1/2})^{1/2}). The last trace is the sum of
    the singular values of R_p' R_q for any roots S = R R'. That product is not squared, so its small
    singular values keep their digits: the usual eigenvalues of S_p^{1/2} S_q S_p^{1/2} lose half of
    them, 1e-6 of the distance where n <= D, against 1e-12 here.
    """
    if p.mean.shape != q.mean.shape or p.cov.shape != q.cov.shape:
        raise ValueError(f"statistics of different width: {tuple(p.mean.shape)} and {tuple(q.mean.shape)}")
    if min(p.n, q.n) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {p.n} and {q.n}")
    s_p, s_q = p.cov.double(), q.cov.double()
    cross = torch.linalg.svdvals(_root(s_p).T @ _root(s_q)).sum()
    shift = (p.mean.double() - q.mean.double()).square().sum()
    return max(0.0, (shift + s_p.trace() + s_q.trace() - 2 * cross).item())


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of `x (N, D)` and `y (M, D)` with KID's kernel k(a, b) = (a.b / D + 1)^3.

    Over all pairs where KID averages random subsets: same expectation, no seed. Being unbiased,
    it can be negative.
    """
    _check(x, y, at_least=2)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_self(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_self(y)) / (m * (m - 1))
    return (within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall of `fake (M, D)` against `real (N, D)`.

    A set's manifold is the union of the closed balls around its points that reach their k-th
    nearest *other* point of the set (a point is not its own neighbour; an exact duplicate is one).
    Precision is the share of fakes in the real manifold, recall of reals in the fake one.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check(real, fake, at_least=k + 1)
    return PrecisionRecall(_share_inside(fake, real, k), _share_inside(real, fake, k))


def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of `logits (N, K)` whose largest entry is at `labels (N,)`.

    Raises ValueError if the shapes do not fit or N = 0.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"want logits (N, K), labels (N,): {tuple(logits.shape)}, {tuple(labels.shape)}")
    return (logits.argmax(1) == labels).double().mean().item()


def _root(cov: Tensor) -> Tensor:
    """R (D, rank) with R R' = cov, by symmetric eigendecomposition.

    The null space is left out (the bound is that of `torch.linalg.matrix_rank`): its eigenvalues are
    rounding errors of either sign, and their square roots are not small.
    """
    variances, axes = torch.linalg.eigh(cov)
    kept = variances > variances.max() * len(variances) * torch.finfo(cov.dtype).eps
    return axes[:, kept] * variances[kept].sqrt()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of k over all pairs, self-pairs included."""
    y = y.double()
    return torch.stack([(block @ y.T / x.shape[1] + 1).pow(3).sum() for block in _row_blocks(x, y)]).sum()


def _kernel_self(x: Tensor) -> Tensor:
    return (x.double().square().mean(1) + 1).pow(3).sum()


def _share_inside(points: Tensor, support: Tensor, k: int) -> float:
    """Share of `points` within at least one k-nearest-neighbour ball of `support`."""
    centre = support.double().mean(0)  # small norms keep the cancellation in |x|^2 + |y|^2 - 2 x.y small
    support = support.double() - centre
    # Rounding must not push a point off the closed ball it bounds, nor out of a ball of radius 0.
    slack = 1e-12 * support.square().sum(1).max()
    # The k + 1 smallest of a row hold the point itself, at distance 0.
    rows = _row_blocks(support, support)
    squared_radii = torch.cat([_squared_distances(x, support).kthvalue(k + 1).values for x in rows])
    rows = _row_blocks(points, support)
    inside = [(_squared_distances(x - centre, support) <= squared_radii + slack).any(1) for x in rows]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T


def _row_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of `x` in float64, each small enough to be paired with all of `y`."""
    return (block.double() for block in x.split(max(1, PAIRS_AT_ONCE // len(y))))


def _check(*sets: Tensor, at_least: int) -> None:
    for features in sets:
        if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
            raise ValueError(f"want floating features (N, D), got {features.dtype} {tuple(features.shape)}")
        if len(features) < at_least:
            raise ValueError(f"want at least {at_least} samples, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError("features are not finite")
    if len({features.shape[1] for features in sets}) > 1:
        raise ValueError(f"features of different width: {[f.shape[1] for f in sets]}")
