"""The Fréchet distance, its extrapolation to infinitely many images, and its bias.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6; Chong and Forsyth 2020 (arXiv:1911.07023), section 3.
"""

import numpy as np
import torch
from torch import Tensor

from diffdistill.eval.metrics.moments import Moments, Statistics, block_rows, check
from diffdistill.rng import generator


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
    check(features, at_least=max(20, 4 * features.shape[-1]))
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    n, width = features.shape
    sizes = np.linspace(max(n // 10, 2 * width), n, points).astype(int)
    reference_root, distances = root(reference), []
    for size in sizes.tolist():
        chosen = torch.randperm(n, generator=generator("cpu", seed, "subset", size))[:size].to(features.device)
        moments = Moments(width, features.device)
        for indices in chosen.split(block_rows(width)):
            moments.update(features[indices])
        distances.append(frechet_distance(moments.statistics(), reference, reference_root))
    _, at_infinity = np.polyfit(1 / sizes, distances, 1)
    return float(at_infinity)
