"""Metrics against independent computations: scipy, torchmetrics, naive loops, cases with a known answer."""

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from diffdistill.eval import metrics
from diffdistill.eval.metrics import (
    Statistics,
    class_agreement,
    frechet_distance,
    kernel_distance,
    precision_recall,
    statistics,
)


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


def test_statistics_are_those_of_torch() -> None:
    x = features(50, 7, 0, shift=3)
    n, mean, cov = statistics(x)
    assert n == 50
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(cov, torch.cov(x.T), rtol=0, atol=1e-13)


def test_statistics_keep_their_digits_far_from_the_origin() -> None:
    x = features(50, 7, 0)
    far = x + 2.0**20
    torch.testing.assert_close(statistics(far).cov, torch.cov((far - 2.0**20).T), rtol=0, atol=1e-12)


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Diagonal covariances: sum of (difference of means)^2 + (difference of standard deviations)^2."""
    p = gaussian(torch.tensor([0.0, 1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    q = gaussian(torch.tensor([3.0, 1.0, 0.0]), torch.diag(torch.tensor([9.0, 1.0, 16.0])))
    assert frechet_distance(p, q) == pytest.approx(9 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2 + 4**2, abs=1e-12)


def test_frechet_is_scipys() -> None:
    x, y = features(300, 16, 1), features(200, 16, 2, shift=0.3)
    p, q = statistics(x), statistics(y)
    root = scipy.linalg.sqrtm(p.cov.numpy() @ q.cov.numpy()).real
    expected = (p.mean - q.mean).square().sum() + p.cov.trace() + q.cov.trace() - 2 * root.trace()
    assert frechet_distance(p, q) == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 300), (300, 20), (64, 65)])
def test_frechet_is_exact_where_samples_are_fewer_than_features(n: int, m: int) -> None:
    """From the features themselves: tr (S_x S_y)^{1/2} is the nuclear norm of X Y' over sqrt((n-1)(m-1))."""
    x, y = features(n, 64, 1), features(m, 64, 2, shift=0.3)
    a, b = (z - z.mean(0) for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt((n - 1) * (m - 1))
    spread = a.square().sum() / (n - 1) + b.square().sum() / (m - 1)
    expected = ((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * cross).item()
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, abs=1e-9)


def test_frechet_is_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = features(120, 12, 3), features(100, 12, 4, shift=0.2)
    fid = FrechetInceptionDistance(feature=Flatten(12)).set_dtype(torch.float64)
    fid.update(x[:, :, None, None], real=True)
    fid.update(y[:, :, None, None], real=False)
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(fid.compute().item(), rel=1e-9)


def test_frechet_is_a_distance() -> None:
    p, q = statistics(features(40, 8, 1)), statistics(features(40, 8, 2))
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), abs=1e-12)
    assert frechet_distance(p, q) > 0.1
    assert 0 <= frechet_distance(p, p) < 1e-12


def test_frechet_of_points_that_are_all_one() -> None:
    """A collapsed generator has no covariance at all."""
    x, y = torch.zeros(5, 3), torch.full((5, 3), 2.0)
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(12, abs=1e-12)


def test_kernel_distance_is_the_naive_double_loop() -> None:
    x, y = features(9, 4, 1), features(7, 4, 2, shift=0.5)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 4 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    within_y = sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    between = sum(kernel(a, b) for a in x for b in y) / (9 * 7)
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, abs=1e-12)


def test_kernel_distance_is_torchmetrics_on_one_subset_of_all() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = features(60, 12, 3), features(60, 12, 4, shift=0.2)
    kid = KernelInceptionDistance(feature=Flatten(12), subsets=1, subset_size=60).set_dtype(torch.float64)
    kid.update(x[:, :, None, None], real=True)
    kid.update(y[:, :, None, None], real=False)
    assert kernel_distance(x, y) == pytest.approx(kid.compute()[0].item(), rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """Two sets from one distribution: zero on average, which the biased estimate is not (1.6)."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 10, 8, generator=generator) for _ in range(100)]
    values = torch.tensor([kernel_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.std() / math.sqrt(len(values)) < 0.05


def test_identical_sets_have_full_precision_and_recall() -> None:
    """Each point lies in its own ball; duplicates make the balls points, and still do."""
    x = features(40, 5, 1, shift=100)
    assert precision_recall(x, x.clone()) == (1, 1)
    assert precision_recall(x[:1].repeat(10, 1), x[:1].repeat(8, 1)) == (1, 1)


def test_disjoint_sets_have_none() -> None:
    x = features(40, 5, 1)
    assert precision_recall(x, x + 1000) == (0, 0)


def test_a_dropped_mode_costs_recall_and_not_precision() -> None:
    modes = torch.cat([features(40, 3, 1), features(60, 3, 2, shift=100)])
    assert precision_recall(modes, modes[:40]) == (1, 0.4)
    assert precision_recall(modes[:40], modes) == (0.4, 1)


def test_radius_reaches_the_kth_other_point_and_includes_it() -> None:
    """On a line, real 0, 1, 3, 6: radii for k = 1 are 1, 1, 2, 3 and the manifold is [-1, 9]."""
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    fake = torch.tensor([[-1.0], [9.0], [-1.001], [9.001]])
    assert precision_recall(real, fake, k=1).precision == 0.5
    # For k = 2 the radii are 3, 2, 3, 5 and it is [-3, 11].
    assert precision_recall(real, fake * 3, k=2).precision == 0.25


def test_rounding_does_not_push_a_point_off_its_ball() -> None:
    """Each fake is as far from the nearest real as that one from its neighbour, 0.7, which rounds."""
    real = 1000 + 0.7 * torch.arange(1, 20, dtype=torch.float64)[:, None]
    fake = 1000 + 0.7 * torch.tensor([[0.0], [20.0]], dtype=torch.float64)
    assert precision_recall(real, fake, k=1).precision == 1
    assert precision_recall(real, fake + torch.tensor([[-1e-4], [1e-4]]), k=1).precision == 0


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(50, 6, 1), features(41, 6, 2)
    whole = (statistics(x), kernel_distance(x, y), precision_recall(x, y))
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 100)
    torch.testing.assert_close(statistics(x).cov, whole[0].cov, rtol=0, atol=1e-13)
    assert kernel_distance(x, y) == pytest.approx(whole[1], abs=1e-12)
    assert precision_recall(x, y) == whole[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_inputs_are_computed_in_float64(dtype: torch.dtype) -> None:
    x, y = features(30, 6, 1).to(dtype), features(30, 6, 2).to(dtype)
    assert statistics(x).mean.dtype == statistics(x).cov.dtype == torch.float64
    assert torch.equal(statistics(x).cov, statistics(x.double()).cov)
    assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())
    assert precision_recall(x, y) == precision_recall(x.double(), y.double())


def test_class_agreement_counts() -> None:
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert class_agreement(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_what_cannot_be_measured_is_refused() -> None:
    x = features(10, 4, 1)
    bad = x.clone()
    bad[3, 2] = math.nan
    for wrong in (x[:1], x[0], bad, x.long()):
        with pytest.raises(ValueError):
            statistics(wrong)
        with pytest.raises(ValueError):
            kernel_distance(x, wrong)
    for metric in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="width"):
            metric(x, x[:, :3])
    with pytest.raises(ValueError, match="width"):
        frechet_distance(statistics(x), statistics(x[:, :3]))
    with pytest.raises(ValueError, match="2 samples"):
        frechet_distance(statistics(x), statistics(x)._replace(n=1))
    with pytest.raises(ValueError, match="at least 6"):
        precision_recall(x, x[:5], k=5)
    with pytest.raises(ValueError, match="k must"):
        precision_recall(x, x, k=0)
    with pytest.raises(ValueError):
        class_agreement(torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ValueError):
        class_agreement(torch.zeros(0, 2), torch.zeros(0))
