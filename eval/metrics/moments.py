"""Distances between two sets of features, and what one set says alone, in float64.

A feature is a row: `features (N, D)`, in whatever unit the feature network has. Every function is
pure and deterministic, takes any floating dtype, computes in float64 on the input's device, and
raises ValueError on sets that are not (N, D), not finite, too small, or of different D.

- `frechet_distance`: Heusel et al. 2017 (arXiv:1706.08500), eq. 6; `frechet_at_infinity`: Chong and
  Forsyth 2020 (arXiv:1911.07023), section 3.
- `kid`, `kernel_distance`: Binkowski et al. 2018 (arXiv:1801.01401), section 4, with its subsets and without.
- `precision_recall`: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eqs. 1 and 2.
- `density_coverage`: Naeem et al. 2020 (arXiv:2002.09797), eqs. 3 and 4.
- `inception_score`: Salimans et al. 2016 (arXiv:1606.03498), section 4.
- `cmmd`: Jayasumana et al. 2024 (arXiv:2401.09603), section 4, with the authors' code.
- `vendi_score`: Friedman and Dieng 2022 (arXiv:2210.02410), definition 3.1.
- `bootstrap_frechet`, `bootstrap_mean`, `interval`, `p_value`: Efron and Tibshirani 1993, chapters 13 and 16.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.progress import slow

# Entries of the largest pairwise matrix held at once: 128 MiB in float64.
PAIRS_AT_ONCE = 2**24
# Entries of the block of features that is added to a covariance at once: 16 MiB in float64.
BLOCK = 2**21
# Columns whose products with all later ones are computed at once: what lies below the diagonal is waste.
PANEL = 256
# Fewest images of published Fréchet distances: the rest is said to be too few.
PUBLISHED = 10_000


class Statistics(NamedTuple):
    """Mean and unbiased covariance of `n` features, float64."""

    n: int
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)


class MeanStd(NamedTuple):
    """Over splits or subsets; the standard deviation divides by their number."""

    mean: float
    std: float


class Moments:
    """Statistics of features (B, D) that come in batches, in memory that does not grow with their number.

    Blocks of BLOCK entries are merged by Chan, Golub and LeVeque 1983 (eq. 1.5), so nothing cancels wherever the
    origin lies: the result is that of two passes to 1e-12 of it. It depends on the order of the rows, in the last
    bits, and not on how they were cut into batches.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Raises ValueError if width < 1."""
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width
        self._n = 0  # of the merged blocks, as are mean and products
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = padded(width, width, device).zero_()  # upper triangle of the centred sum of x x'
        self._rows = padded(block_rows(width), width, device)  # not merged yet
        self._filled = 0

    @property
    def n(self) -> int:
        """Rows so far."""
        return self._n + self._filled

    def update(self, features: Tensor) -> None:
        """Adds `features (B, D)`. Raises ValueError, and adds none, if they are not so or not finite."""
        _check_shape(features, at_least=1)
        if features.shape[1] != self.width:
            raise ValueError(f"features of different width: {[self.width, features.shape[1]]}")
        rest = features.detach()
        if not rest.sum(dtype=torch.float64).isfinite():  # several times as fast as asking every entry
            raise ValueError("features are not finite")
        while len(rest):
            taken = rest[: len(self._rows) - self._filled]
            self._rows[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if self._filled == len(self._rows):
                self._n, self._mean = _merge_rows(self._n, self._mean, self._products, self._rows)
                self._filled = 0

    def merge(self, other: "Moments") -> None:
        """Adds what `other` has seen, which stays as it is. Raises ValueError on another width."""
        if other.width != self.width:
            raise ValueError(f"features of different width: {[self.width, other.width]}")
        if other.n == 0:
            return
        n, mean, products = self._state()
        m, other_mean, other_products = other._state()
        step = other_mean.to(mean.device) - mean
        products += other_products.to(mean.device)
        products += torch.outer(step, step) * (n * m / (n + m))
        self._n, self._mean, self._products, self._filled = n + m, mean + step * (m / (n + m)), products, 0

    def statistics(self) -> Statistics:
        """Of all rows so far; more may follow. Raises ValueError on fewer than 2."""
        if self.n < 2:
            raise ValueError(f"want at least 2 samples, got {self.n}")
        n, mean, products = self._state()
        return Statistics(n, mean, symmetric(products).div_(n - 1))

    def _state(self) -> tuple[int, Tensor, Tensor]:
        """Copies of the sums with the rows that wait in them."""
        products = padded(self.width, self.width, self._mean.device).copy_(self._products)
        if not self._filled:
            return self._n, self._mean, products
        n, mean = _merge_rows(self._n, self._mean, products, self._rows[: self._filled].clone())
        return n, mean, products


def statistics(features: Tensor) -> Statistics:
    """Statistics of `features (N, D)`, N >= 2."""
    check(features, at_least=2)
    moments = Moments(features.shape[1], features.device)
    moments.update(features)
    return moments.statistics()


def enough(n: int, width: int) -> str | None:
    """A line that warns of a Fréchet distance from `n` samples of `width` features, or None."""
    if n <= width:
        return (
            f"{n:,} images are too few for {width:,} features: the covariance is singular and the Fréchet "
            "distance far too large; compare it with none from another number of images"
        )
    if n < PUBLISHED:
        return (
            f"{n:,} images are few: published Fréchet distances take {PUBLISHED:,} to 50,000, and fewer make "
            "it larger; compare it with none from another number of images"
        )
    return None


def padded(rows: int, columns: int, device: torch.device | str) -> Tensor:
    """(rows, columns) float64, uninitialised. Rows a power of two apart would share few cache lines: 1.2 x the time."""
    return torch.empty(rows, columns + 8, dtype=torch.float64, device=device)[:, :columns]


def block_rows(width: int) -> int:
    """Rows of the block that is added to a covariance at once."""
    return max(1, BLOCK // width)


def add_products(total: Tensor, x: Tensor) -> None:
    """Adds x' x to the upper triangle of `total (D, D)`, in half the time of all of it."""
    for i in range(0, len(total), PANEL):
        total[i : i + PANEL, i:].addmm_(x[:, i : i + PANEL].T, x[:, i:])


def symmetric(upper: Tensor) -> Tensor:
    """The matrix of an upper triangle."""
    return upper.triu() + upper.triu(1).T


def _merge_rows(n: int, mean: Tensor, products: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """Count and mean with the rows `x (K, D)`; adds to `products`, and overwrites x.

    Of K rows with the mean m + d, the centred products grow by sum (x - m)(x - m)' - K^2 / (n + K) d d'. That is the
    sum of (x - m - c d)(...)' with c = 1 - sqrt(n / (n + K)), one subtraction and nothing that cancels.
    """
    k = len(x)
    step = x.mean(0) - mean
    x -= mean + (1 - math.sqrt(n / (n + k))) * step
    add_products(products, x)
    return n + k, mean + step * (k / (n + k))


def _row_mean(features: Tensor) -> Tensor:
    blocks = features.split(block_rows(features.shape[1]))
    return torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0) / len(features)


def row_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of `x` in float64, each small enough to be paired with all of `y`."""
    blocks = x.split(max(1, PAIRS_AT_ONCE // len(y)))
    return (block.double() for block in slow(blocks, len(x), "row"))


def check(*sets: Tensor, at_least: int) -> None:
    """ValueError unless the sets are finite features (N, D) of one width with so many rows."""
    for features in sets:
        _check_shape(features, at_least)
        if not features.isfinite().all():
            raise ValueError("features are not finite")
    if len({features.shape[1] for features in sets}) > 1:
        raise ValueError(f"features of different width: {[f.shape[1] for f in sets]}")


def _check_shape(features: Tensor, at_least: int) -> None:
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(f"want floating features (N, D), got {features.dtype} {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"want at least {at_least} samples, got {len(features)}")
