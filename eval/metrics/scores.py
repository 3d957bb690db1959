"""What one set of images says alone: Inception score, Vendi score, class agreement, diversity.

Salimans et al. 2016 (arXiv:1606.03498), section 4; Friedman and Dieng 2022 (arXiv:2210.02410), definition 3.1.
"""

import numpy as np
import torch
from torch import Tensor

from diffdistill.eval.metrics.kernel import unit
from diffdistill.eval.metrics.moments import MeanStd, Statistics, add_products, check, padded, symmetric


def inception_score(logits: Tensor, splits: int = 10) -> MeanStd:
    """exp(E KL(p(y|x) | p(y))) of `logits (N, K)`, over `splits` parts in the order given.

    Part i is rows i N / splits to (i + 1) N / splits, as torch-fidelity and the original code cut them. Nothing is
    shuffled (torch-fidelity does by default), so images sorted by class make it too small. Raises ValueError
    if splits < 1 or N < splits.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    check(logits, at_least=splits)
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
    x = unit(features, at_least=1)
    n, width = x.shape
    products = padded(min(n, width), min(n, width), x.device).zero_()
    add_products(products, x.T if n < width else x)
    return _effective_number(symmetric(products))


def vendi_of(statistics: Statistics) -> float:
    """The same from the statistics of features that were scaled to length 1, as `Moments` gathers them.

    Raises ValueError if they were not.
    """
    n, mean, cov = statistics.n, statistics.mean.double(), statistics.cov.double()
    second = cov * ((n - 1) / n) + torch.outer(mean, mean)
    if abs(second.trace().item() - 1) > 1e-5:
        raise ValueError(f"want features of length 1, got a mean square length of {second.trace().item():.6g}")
    return _effective_number(second)


def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of `logits (N, K)` whose largest entry is at `labels (N,)`.

    Raises ValueError if the shapes do not fit or N = 0.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"want logits (N, K), labels (N,): {tuple(logits.shape)}, {tuple(labels.shape)}")
    return (logits.argmax(1) == labels).double().mean().item()


def diversity(features: Tensor, labels: Tensor | None = None) -> float:
    """Mean Euclidean distance of two of the `features (N, D)`; with `labels (N,)` of one class, averaged over classes.

    Raises ValueError if a class, or the whole set, has fewer than two.
    """
    groups = [features] if labels is None else [features[labels == c] for c in labels.unique()]
    for group in groups:
        check(group, at_least=2)
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def _effective_number(weights: Tensor) -> float:
    """exp of the entropy of a positive semidefinite matrix, scaled to trace 1."""
    values = torch.linalg.eigvalsh(weights).clamp_min(0)
    return torch.special.entr(values / values.sum()).sum().exp().item()
