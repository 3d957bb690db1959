"""Intervals and p-values by resampling images (Efron and Tibshirani 1993, chapters 13 and 16)."""

import torch
from torch import Tensor

from diffdistill.data.progress import slow
from diffdistill.eval.metrics.frechet import frechet_distance, root
from diffdistill.eval.metrics.moments import Statistics, _row_mean, add_products, block_rows, check, padded, symmetric
from diffdistill.rng import generator


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
    check(features, at_least=2)
    n, width = features.shape
    centre = _row_mean(features)
    reference_root, distances = root(reference), []
    for replicate in slow(range(replicates), replicates, "replicate"):
        weights = bootstrap_weights(n, seed, replicate).to(features.device)
        total = torch.zeros_like(centre)
        products = padded(width, width, features.device).zero_()
        rows = block_rows(width)
        for block, weight in zip(features.split(rows), weights.split(rows), strict=True):
            drawn = weight > 0  # two thirds
            root_weight = weight[drawn].double().sqrt()[:, None]
            x = (block[drawn].double() - centre) * root_weight
            total += (x * root_weight).sum(0)
            add_products(products, x)
        shift = total / n
        cov = (symmetric(products) - n * torch.outer(shift, shift)) / (n - 1)
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
    moved = _moved(values, around)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = moved.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def p_value(differences: Tensor, around: float | None = None) -> float:
    """Two-sided: twice the share of bootstrap `differences (R,)` on the rarer side of 0, at least 2 / (R + 1).

    The difference itself counts as one replicate on that side, so that it is never 0. `around` as in `interval`.
    """
    moved = _moved(differences, around)
    rarer = min(int((moved <= 0).sum()), int((moved >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (len(moved) + 1))


def _moved(values: Tensor, around: float | None) -> Tensor:
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"want at least 2 finite values (R,), got {tuple(values.shape)}")
    values = values.double().cpu()
    return values if around is None else values - values.mean() + around
