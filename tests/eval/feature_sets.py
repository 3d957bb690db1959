"""Sets of features, and Gaussians with known statistics, for tests of metrics."""

import torch
from torch import Tensor, nn

from diffdistill.eval.metrics.moments import Statistics


def features(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated float64 features (n, width) of unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix / width**0.5 + shift


def gaussian(mean: Tensor, cov: Tensor) -> Statistics:
    return Statistics(1000, mean.double(), cov.double())


class Flatten(nn.Module):
    """What torchmetrics takes for a feature network: (N, D, 1, 1) to (N, D)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def spectrum(values: Tensor, seed: int, far: float = 0.0) -> Statistics:
    """A covariance of given eigenvalues; the axes depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    width = len(values)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return gaussian(torch.full((width,), far), axes * values @ axes.T)
