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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.rng import generator

# Entries of the largest pairwise matrix held at once: 128 MiB in float64.
PAIRS_AT_ONCE = 2**24
# Entries of the block of features that is added to a covariance at once: 16 MiB in float64.
BLOCK = 2**21
# Columns whose products with all later ones are computed at once: what lies below the diagonal is waste.
PANEL = 256
# Fewest images of published Fréchet distances: the rest is said to be too few.
PUBLISHED = 10_000
# Images in a subset of published KIDs.
KID_SIZE = 1000


class Statistics(NamedTuple):
    """Mean and unbiased covariance of `n` features, float64."""

    n: int
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, at least 0 and about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


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
        self._products = _padded(width, width, device).zero_()  # upper triangle of the centred sum of x x'
        self._rows = _padded(_block_rows(width), width, device)  # not merged yet
        self._filled = 0

    @property
    def n(self) -> int:
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
        return Statistics(n, mean, _symmetric(products).div_(n - 1))

    def _state(self) -> tuple[int, Tensor, Tensor]:
        """Copies of the sums with the rows that wait in them."""
        products = _padded(self.width, self.width, self._mean.device).copy_(self._products)
        if not self._filled:
            return self._n, self._mean, products
        n, mean = _merge_rows(self._n, self._mean, products, self._rows[: self._filled].clone())
        return n, mean, products


def statistics(features: Tensor) -> Statistics:
    """Statistics of `features (N, D)`, N >= 2."""
    _check(features, at_least=2)
    moments = Moments(features.shape[1], features.device)
    moments.update(features)
    return moments.statistics()


def frechet_distance(p: Statistics, q: Statistics, q_root: Tensor | None = None) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in squared feature units.

    |m_p - m_q|^2 + tr(S_p + S_q - 2 (S_p S_q)^{1/2}). With roots S = R R' the last trace is the sum of the square
    roots of the eigenvalues of R_q' S_p R_q, and also of the singular values of R_p' R_q. The former is several
    times as fast, but squared: a small singular value may lose half of its digits. So where the estimated error is
    above 1e-9 of the distance, the latter is computed: 1e-12 of the traces, also where n <= D.

    q_root: what `root(q)` gave, for many distances to one q.
    """
    if p.mean.shape != q.mean.shape or p.cov.shape != q.cov.shape:
        raise ValueError(f"statistics of different width: {tuple(p.mean.shape)} and {tuple(q.mean.shape)}")
    if min(p.n, q.n) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {p.n} and {q.n}")
    s_p, r_q = p.cov.double(), root(q) if q_root is None else q_root
    shift = (p.mean.double() - q.mean.double()).square().sum()
    spread = shift + s_p.trace() + q.cov.double().trace()
    if min(p.n, q.n) > len(s_p) == r_q.shape[1]:
        values = torch.linalg.eigvalsh(r_q.T @ s_p @ r_q)
        distance = (spread - 2 * values.clamp_min(0).sqrt().sum()).item()
        # Each eigenvalue is off by a rounding error of the largest, its root by that over twice the root. The
        # errors are as good as independent; measured, the sum is off by 1/30 of this or less.
        off = torch.finfo(values.dtype).eps * values.max() * values.clamp_min(0).reciprocal().sum().sqrt()
        if off <= 1e-9 * distance:
            return distance
    return max(0.0, (spread - 2 * torch.linalg.svdvals(root(p).T @ r_q).sum()).item())


def root(statistics: Statistics) -> Tensor:
    """R (D, rank) with R R' = the covariance: its Cholesky factor, or by symmetric eigendecomposition if singular.

    There the null space is left out (the bound is that of `torch.linalg.matrix_rank`): its eigenvalues are
    rounding errors of either sign, and their square roots are not small.
    """
    cov = statistics.cov.double()
    width, eps = len(cov), torch.finfo(torch.float64).eps
    if statistics.n > width:
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not failed and factor.diagonal().square().min() > cov.diagonal().max() * width * eps:
            return factor
    variances, axes = torch.linalg.eigh(cov)
    kept = variances > variances.max() * width * eps
    return axes[:, kept] * variances[kept].sqrt()


def small_sample_bias(statistics: Statistics) -> float:
    """How much too large a Fréchet distance is on average, because `statistics` come from n samples.

    To the first order in 1/n, for Gaussian features whose distribution is nearly that of the other set:
    (1/n) (tr S + 1/2 sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j)) with the eigenvalues l of S. The first part is the
    mean's; the second, the covariance's, is D / 4 times as large if all l are equal. (The square root expanded to
    the second order in the Wishart error of S.) Too small where n is not several times D. The other set's own n
    adds its own.
    """
    if statistics.n < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {statistics.n}")
    values = torch.linalg.eigvalsh(statistics.cov.double()).clamp_min(0)
    sums = values[:, None] + values
    pairs = (values[:, None] * values / sums.clamp_min(torch.finfo(torch.float64).tiny)).sum() + values.sum() / 2
    return ((values.sum() + pairs / 2) / statistics.n).item()


def frechet_at_infinity(features: Tensor, reference: Statistics, seed: int = 0, points: int = 15) -> float:
    """The Fréchet distance that infinitely many samples like `features (N, D)` would have: FID_infinity.

    A straight line through the distances of random subsets against 1 / size, read off at 0. Sizes are `points` equal
    steps from N / 10 to N, as the paper's 5,000 to 50,000, but at least 2 D, below which the line bends. It can be
    negative, and it does not take away what the reference's own number of samples adds. Raises ValueError
    if points < 2 or N < 4 D.
    """
    _check(features, at_least=max(20, 4 * features.shape[-1]))
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    n, width = features.shape
    sizes = np.linspace(max(n // 10, 2 * width), n, points).astype(int)
    reference_root, distances = root(reference), []
    for size in sizes.tolist():
        chosen = torch.randperm(n, generator=generator("cpu", seed, "subset", size))[:size].to(features.device)
        moments = Moments(width, features.device)
        for indices in chosen.split(_block_rows(width)):
            moments.update(features[indices])
        distances.append(frechet_distance(moments.statistics(), reference, reference_root))
    _, at_infinity = np.polyfit(1 / sizes, distances, 1)
    return float(at_infinity)


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


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of `x (N, D)` and `y (M, D)` with KID's kernel k(a, b) = (a.b / D + 1)^3.

    Over all pairs where KID averages random subsets: same expectation, no seed. Being unbiased,
    it can be negative.
    """
    _check(x, y, at_least=2)
    n, m = len(x), len(y)
    kernel = _cubic(x.shape[1])
    within_x = (_within_sum(x, kernel) - _self_sum(x, kernel)) / (n * (n - 1))
    within_y = (_within_sum(y, kernel) - _self_sum(y, kernel)) / (m * (m - 1))
    return (within_x + within_y - 2 * _kernel_sum(x, y, kernel) / (n * m)).item()


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int = KID_SIZE, seed: int = 0) -> MeanStd:
    """KID as it is published: mean and deviation of `kernel_distance` over random subsets of `size` of each set.

    Subsets are drawn without replacement by NumPy's RandomState(seed), x before y, as torch-fidelity draws them
    (its seed is 2020): the same features give its figures. Raises ValueError if a set is smaller than `size`.
    """
    if subsets < 1 or size < 2:
        raise ValueError(f"want at least 1 subset of at least 2, got {subsets} of {size}")
    _check(x, y, at_least=size)
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen = [torch.from_numpy(random.choice(len(z), size, replace=False)).to(z.device) for z in (x, y)]
        values.append(kernel_distance(x[chosen[0]], y[chosen[1]]))
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def cmmd(x: Tensor, y: Tensor) -> float:
    """CMMD of embeddings `x (N, D)` and `y (M, D)`, which are scaled to length 1 here: 1000 MMD^2, at least 0.

    The kernel is exp(-|a - b|^2 / (2 sigma^2)), sigma = 10. As in the authors' code the estimate is the biased one,
    self-pairs included. Raises ValueError if an embedding is zero.
    """
    x, y = _unit(x, at_least=1), _unit(y, at_least=1)
    _check(x, y, at_least=1)

    def kernel(products: Tensor) -> Tensor:
        return ((products - 1) / 10**2).exp()

    n, m = len(x), len(y)
    within = _within_sum(x, kernel) / n**2 + _within_sum(y, kernel) / m**2
    return max(0.0, 1000 * (within - 2 * _kernel_sum(x, y, kernel) / (n * m)).item())


def inception_score(logits: Tensor, splits: int = 10) -> MeanStd:
    """exp(E KL(p(y|x) | p(y))) of `logits (N, K)`, over `splits` parts in the order given.

    Part i is rows i N / splits to (i + 1) N / splits, as torch-fidelity and the original code cut them. Nothing is
    shuffled (torch-fidelity does by default), so images sorted by class make it too small. Raises ValueError
    if splits < 1 or N < splits.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    _check(logits, at_least=splits)
    n, scores = len(logits), []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        p = log_p.exp()
        # A class that no image has any probability of would be 0 times infinity.
        log_marginal = p.mean(0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append((p * (log_p - log_marginal)).sum(1).mean().exp().item())
    return MeanStd(float(np.mean(scores)), float(np.std(scores)))


def vendi_score(features: Tensor) -> float:
    """How many different samples there are in effect: 1 if all `features (N, D)` are parallel, N if orthogonal.

    exp of the entropy of the eigenvalues of K / N, K the cosines of all pairs; those of the D x D second moment
    are the same. Raises ValueError if a feature is zero.
    """
    x = _unit(features, at_least=1)
    n, width = x.shape
    products = _padded(min(n, width), min(n, width), x.device).zero_()
    _add_products(products, x.T if n < width else x)
    return _effective_number(_symmetric(products))


def vendi_of(statistics: Statistics) -> float:
    """The same from the statistics of features that were scaled to length 1, as `Moments` gathers them.

    Raises ValueError if they were not.
    """
    n, mean, cov = statistics.n, statistics.mean.double(), statistics.cov.double()
    second = cov * ((n - 1) / n) + torch.outer(mean, mean)
    if abs(second.trace().item() - 1) > 1e-5:
        raise ValueError(f"want features of length 1, got a mean square length of {second.trace().item():.6g}")
    return _effective_number(second)


def bootstrap_weights(n: int, seed: int, replicate: int) -> Tensor:
    """How often each of `n` samples is drawn when n are drawn with replacement: (n,) int64, on the CPU.

    A function of its arguments, so that two models on the same noise are resampled together.
    """
    if n < 1:
        raise ValueError(f"want at least 1 sample, got {n}")
    drawn = torch.randint(n, (n,), generator=generator("cpu", seed, "bootstrap", replicate))
    return drawn.bincount(minlength=n)


def bootstrap_frechet(features: Tensor, reference: Statistics, replicates: int = 200, seed: int = 0) -> Tensor:
    """(replicates,) float64 Fréchet distances of `features (N, D)` resampled with `bootstrap_weights`.

    The reference stays as it is. Resampling adds the small-sample bias a second time: see `interval`. For a
    paired difference of two models subtract the results of two calls with one seed.
    """
    _check(features, at_least=2)
    n, width = features.shape
    centre = _row_mean(features)
    reference_root, distances = root(reference), []
    for replicate in range(replicates):
        weights = bootstrap_weights(n, seed, replicate).to(features.device)
        total = torch.zeros_like(centre)
        products = _padded(width, width, features.device).zero_()
        rows = _block_rows(width)
        for block, weight in zip(features.split(rows), weights.split(rows), strict=True):
            drawn = weight > 0  # two thirds
            root_weight = weight[drawn].double().sqrt()[:, None]
            x = (block[drawn].double() - centre) * root_weight
            total += (x * root_weight).sum(0)
            _add_products(products, x)
        shift = total / n
        cov = (_symmetric(products) - n * torch.outer(shift, shift)) / (n - 1)
        distances.append(frechet_distance(Statistics(n, centre + shift, cov), reference, reference_root))
    return torch.tensor(distances, dtype=torch.float64)


def bootstrap_mean(values: Tensor, replicates: int = 200, seed: int = 0) -> Tensor:
    """(replicates,) float64 means of `values (N,)` resampled with `bootstrap_weights`; NaN is a missing value.

    Raises ValueError on another shape, infinity, or if nothing is there. A replicate without any value is NaN.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"want values (N,), got {tuple(values.shape)}")
    known = ~values.isnan()
    filled = values.double().where(known, 0).cpu()
    if not known.any() or not filled.isfinite().all():
        raise ValueError("values are not finite")
    present = known.double().cpu()
    means = []
    for replicate in range(replicates):
        weights = bootstrap_weights(len(values), seed, replicate).double()
        means.append(weights @ filled / (weights @ present))
    return torch.stack(means) if means else filled.new_empty(0)


def interval(values: Tensor, around: float | None = None, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap replicates `values (R,)`, R >= 2: quantiles, with linear interpolation.

    around: what was measured. The replicates are first moved so that their mean lies there: a bootstrapped Fréchet
    distance is on average too large by its small-sample bias, as the measured one already is, and without this
    the interval may leave the measured one out.
    """
    moved = _around(values, around)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = moved.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def p_value(differences: Tensor, around: float | None = None) -> float:
    """Two-sided: twice the share of bootstrap `differences (R,)` on the rarer side of 0, at least 2 / (R + 1).

    The difference itself counts as one replicate on that side, so that it is never 0. `around` as in `interval`.
    """
    moved = _around(differences, around)
    rarer = min(int((moved <= 0).sum()), int((moved >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (len(moved) + 1))


def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall of `fake (M, D)` against `real (N, D)`.

    A set's manifold is the union of the closed balls around its points that reach their k-th
    nearest *other* point of the set (a point is not its own neighbour; an exact duplicate is one).
    Precision is the share of fakes in the real manifold, recall of reals in the fake one.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check(real, fake, at_least=k + 1)
    return PrecisionRecall(_Balls(real, k).share_inside(fake), _Balls(fake, k).share_inside(real))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage of `fake (M, D)` against `real (N, D)`, with the balls of `precision_recall`.

    Density is the number of real balls that a fake lies in, on average, over k; coverage the share of real
    balls with a fake inside. Balls are closed, as in the paper; the authors' code leaves the boundary out.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check(real, at_least=k + 1)
    _check(real, fake, at_least=1)
    balls = _Balls(real, k)
    count, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for inside in balls.inside(fake):
        count += int(inside.sum())
        covered |= inside.any(0)
    return DensityCoverage(count / (k * len(fake)), covered.double().mean().item())


def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of `logits (N, K)` whose largest entry is at `labels (N,)`.

    Raises ValueError if the shapes do not fit or N = 0.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"want logits (N, K), labels (N,): {tuple(logits.shape)}, {tuple(labels.shape)}")
    return (logits.argmax(1) == labels).double().mean().item()


def _padded(rows: int, columns: int, device: torch.device | str) -> Tensor:
    """(rows, columns) float64, uninitialised. Rows a power of two apart would share few cache lines: 1.2 x the time."""
    return torch.empty(rows, columns + 8, dtype=torch.float64, device=device)[:, :columns]


def _block_rows(width: int) -> int:
    return max(1, BLOCK // width)


def _add_products(total: Tensor, x: Tensor) -> None:
    """Adds x' x to the upper triangle of `total (D, D)`, in half the time of all of it."""
    for i in range(0, len(total), PANEL):
        total[i : i + PANEL, i:].addmm_(x[:, i : i + PANEL].T, x[:, i:])


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


def _merge_rows(n: int, mean: Tensor, products: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """Count and mean with the rows `x (K, D)`; adds to `products`, and overwrites x.

    Of K rows with the mean m + d, the centred products grow by sum (x - m)(x - m)' - K^2 / (n + K) d d'. That is the
    sum of (x - m - c d)(...)' with c = 1 - sqrt(n / (n + K)), one subtraction and nothing that cancels.
    """
    k = len(x)
    step = x.mean(0) - mean
    x -= mean + (1 - math.sqrt(n / (n + k))) * step
    _add_products(products, x)
    return n + k, mean + step * (k / (n + k))


def _row_mean(features: Tensor) -> Tensor:
    blocks = features.split(_block_rows(features.shape[1]))
    return torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0) / len(features)


def _cubic(width: int) -> Callable[[Tensor], Tensor]:
    return lambda products: (products / width + 1).pow(3)


def _kernel_sum(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of kernel(a.b) over all pairs, self-pairs included."""
    y = y.double()
    return torch.stack([kernel(block @ y.T).sum() for block in _row_blocks(x, y)]).sum()


def _within_sum(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of all pairs of one set, each of which is computed once, but for those inside a block of rows."""
    x, done, sums = x.double(), 0, []
    for block in _row_blocks(x, x):
        k = len(block)
        values = kernel(block @ x[done:].T)
        sums.append(2 * values.sum() - values[:, :k].sum())
        done += k
    return torch.stack(sums).sum()


def _self_sum(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    return kernel(x.double().square().sum(1)).sum()


def _unit(features: Tensor, at_least: int) -> Tensor:
    """The features scaled to length 1, float64."""
    _check(features, at_least=at_least)
    x = features.double()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not lengths.all():
        raise ValueError("a feature is zero and has no direction")
    return x / lengths


def _effective_number(weights: Tensor) -> float:
    """exp of the entropy of a positive semidefinite matrix, scaled to trace 1."""
    values = torch.linalg.eigvalsh(weights).clamp_min(0)
    return torch.special.entr(values / values.sum()).sum().exp().item()


def _around(values: Tensor, around: float | None) -> Tensor:
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"want at least 2 finite values (R,), got {tuple(values.shape)}")
    values = values.double().cpu()
    return values if around is None else values - values.mean() + around


class _Balls:
    """The closed balls around the points of a set that reach their k-th nearest other point."""

    def __init__(self, support: Tensor, k: int) -> None:
        support = support.double()
        self.centre = support.mean(0)  # small norms keep the cancellation in |x|^2 + |y|^2 - 2 x.y small
        self.support = support - self.centre
        rows = _row_blocks(self.support, self.support)
        # The k + 1 smallest of a row hold the point itself, at distance 0.
        squared_radii = torch.cat([_squared_distances(x, self.support).kthvalue(k + 1).values for x in rows])
        # Rounding must not push a point off the closed ball it bounds, nor out of a ball of radius 0.
        self.reach = squared_radii + 1e-12 * self.support.square().sum(1).max()

    def inside(self, points: Tensor) -> Iterator[Tensor]:
        """(rows of `points`, balls) bool, block by block: whether a point lies in a ball."""
        for x in _row_blocks(points, self.support):
            yield _squared_distances(x - self.centre, self.support) <= self.reach

    def share_inside(self, points: Tensor) -> float:
        """Share of `points` within at least one ball."""
        return torch.cat([inside.any(1) for inside in self.inside(points)]).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T


def _row_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of `x` in float64, each small enough to be paired with all of `y`."""
    return (block.double() for block in x.split(max(1, PAIRS_AT_ONCE // len(y))))


def _check(*sets: Tensor, at_least: int) -> None:
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
