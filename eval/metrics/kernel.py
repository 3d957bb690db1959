"""Distances of kernels' means: KID, with subsets and without, and CMMD.

Binkowski et al. 2018 (arXiv:1801.01401), section 4; Jayasumana et al. 2024 (arXiv:2401.09603), section 4.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.progress import slow
from diffdistill.eval.metrics.moments import MeanStd, check, row_blocks

# Images in a subset of published KIDs.
KID_SIZE = 1000


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of `x (N, D)` and `y (M, D)` with KID's kernel k(a, b) = (a.b / D + 1)^3.

    Over all pairs where KID averages random subsets: same expectation, no seed. Being unbiased,
    it can be negative.
    """
    check(x, y, at_least=2)
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
    check(x, y, at_least=size)
    random = np.random.RandomState(seed)
    values = []
    for _ in slow(range(subsets), subsets, "subset"):
        chosen = [torch.from_numpy(random.choice(len(z), size, replace=False)).to(z.device) for z in (x, y)]
        values.append(kernel_distance(x[chosen[0]], y[chosen[1]]))
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def cmmd(x: Tensor, y: Tensor) -> float:
    """CMMD of embeddings `x (N, D)` and `y (M, D)`, which are scaled to length 1 here: 1000 MMD^2, at least 0.

    The kernel is exp(-|a - b|^2 / (2 sigma^2)), sigma = 10. As in the authors' code the estimate is the biased one,
    self-pairs included. Raises ValueError if an embedding is zero.
    """
    x, y = unit(x, at_least=1), unit(y, at_least=1)
    check(x, y, at_least=1)

    def kernel(products: Tensor) -> Tensor:
        return ((products - 1) / 10**2).exp()

    n, m = len(x), len(y)
    within = _within_sum(x, kernel) / n**2 + _within_sum(y, kernel) / m**2
    return max(0.0, 1000 * (within - 2 * _kernel_sum(x, y, kernel) / (n * m)).item())


def _cubic(width: int) -> Callable[[Tensor], Tensor]:
    return lambda products: (products / width + 1).pow(3)


def _kernel_sum(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of kernel(a.b) over all pairs, self-pairs included."""
    y = y.double()
    return torch.stack([kernel(block @ y.T).sum() for block in row_blocks(x, y)]).sum()


def _within_sum(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of all pairs of one set, each of which is computed once, but for those inside a block of rows."""
    x, done, sums = x.double(), 0, []
    for block in row_blocks(x, x):
        k = len(block)
        values = kernel(block @ x[done:].T)
        sums.append(2 * values.sum() - values[:, :k].sum())
        done += k
    return torch.stack(sums).sum()


def _self_sum(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    return kernel(x.double().square().sum(1)).sum()


def unit(features: Tensor, at_least: int) -> Tensor:
    """The features scaled to length 1, float64."""
    check(features, at_least=at_least)
    x = features.double()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not lengths.all():
        raise ValueError("a feature is zero and has no direction")
    return x / lengths
