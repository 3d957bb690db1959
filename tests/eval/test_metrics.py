"""Metrics against independent computations: torchmetrics, naive loops, cases with a known answer."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.eval.metrics import moments as sizes
from diffdistill.eval.metrics.bootstrap import bootstrap_frechet
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.kernel import cmmd, kernel_distance, kid
from diffdistill.eval.metrics.manifold import density_coverage, precision_recall
from diffdistill.eval.metrics.moments import Moments, statistics
from diffdistill.eval.metrics.scores import class_agreement, inception_score, vendi_of, vendi_score
from tests.eval.feature_sets import Flatten, features


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
    others = (density_coverage(x, y), cmmd(x, y), vendi_score(x), bootstrap_frechet(x, statistics(y), 2))
    for name, size in (("PAIRS_AT_ONCE", 100), ("BLOCK", 70), ("PANEL", 4)):
        monkeypatch.setattr(sizes, name, size)
    torch.testing.assert_close(statistics(x).cov, whole[0].cov, rtol=0, atol=1e-13)
    assert density_coverage(x, y) == others[0]
    assert cmmd(x, y) == pytest.approx(others[1], abs=1e-10)
    assert vendi_score(x) == pytest.approx(others[2], rel=1e-12)
    torch.testing.assert_close(bootstrap_frechet(x, statistics(y), 2), others[3], rtol=1e-9, atol=0)
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


def naive_density_coverage(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    radii = [sorted(np.linalg.norm(r - o) for j, o in enumerate(real) if j != i)[k - 1] for i, r in enumerate(real)]
    inside = [[np.linalg.norm(f - r) <= radius for r, radius in zip(real, radii, strict=True)] for f in fake]
    return np.sum(inside) / (k * len(fake)), np.any(inside, 0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_are_the_naive_loops(k: int) -> None:
    real, fake = features(40, 4, 1), features(25, 4, 2, shift=0.4)
    assert density_coverage(real, fake, k) == pytest.approx(naive_density_coverage(real.numpy(), fake.numpy(), k))
    assert density_coverage(real.float(), fake, k) == pytest.approx(density_coverage(real, fake, k), abs=0.01)


def test_density_and_coverage_where_they_are_known() -> None:
    x = features(60, 3, 1)
    assert density_coverage(x, x + 1000) == (0, 0)
    # Each real is in its own ball and, as a fake, in those of the k points on average that have it as a neighbour.
    assert density_coverage(x, x.clone(), 5) == pytest.approx((6 / 5, 1))
    # On a line, real 0, 1, 3, 6: the balls for k = 1 are [-1, 1], [0, 2], [1, 5], [3, 9].
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    assert density_coverage(real, torch.tensor([[0.5]]), 1) == (2, 0.5)
    assert density_coverage(real, torch.tensor([[1.0], [-1.001]]), 1) == (1.5, 0.75)
    # An outlier among the reals makes all fakes near it precise, and covers one ball only.
    with_outlier = torch.cat([x, x[:1] + 50])
    fake = x[:1] + 45 + 0.01 * features(30, 3, 2)
    assert precision_recall(with_outlier, fake).precision == 1
    assert density_coverage(with_outlier, fake) == pytest.approx((1 / 5, 1 / 61))
    assert density_coverage(x, x[:1], 5).coverage < 1  # one fake is enough to ask


def test_inception_score_is_the_formula() -> None:
    logits = features(47, 6, 1) * 3
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 47 // 10 : (i + 1) * 47 // 10]
        scores.append(np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert inception_score(logits.float()) == pytest.approx(inception_score(logits), rel=1e-5)


def test_inception_score_lies_between_one_and_the_classes() -> None:
    assert inception_score(torch.zeros(20, 5)) == pytest.approx((1, 0), abs=1e-12)
    sure = 2000.0 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure) == pytest.approx((5, 0), rel=1e-12)
    in_order = sure[sure.argmax(1).argsort()]
    assert inception_score(in_order, 5) == pytest.approx((1, 0), rel=1e-12)  # nothing is shuffled
    assert inception_score(in_order, 1) == pytest.approx((5, 0), rel=1e-12)
    with pytest.raises(ValueError, match="splits"):
        inception_score(sure, 0)
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(sure[:9])


def test_kid_is_the_mean_over_subsets_drawn_as_torch_fidelity_draws_them() -> None:
    x, y = features(40, 6, 1).numpy(), features(33, 6, 2, shift=0.3).numpy()
    random, values = np.random.RandomState(2020), []
    for _ in range(7):
        a, b = (z[random.choice(len(z), 20, replace=False)] for z in (x, y))
        aa, bb, ab = ((u @ v.T / 6 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        off = ~np.eye(20, dtype=bool)
        values.append(aa[off].mean() + bb[off].mean() - 2 * ab.mean())
    result = kid(torch.from_numpy(x), torch.from_numpy(y), subsets=7, size=20, seed=2020)
    assert result == pytest.approx((np.mean(values), np.std(values)), rel=1e-11)
    assert kid(torch.from_numpy(x), torch.from_numpy(y), subsets=7, size=20, seed=1) != result


def test_kid_of_all_pairs_is_the_kernel_distance() -> None:
    x, y = features(30, 6, 1), features(30, 6, 2, shift=0.3)
    assert kid(x, y, subsets=3, size=30) == pytest.approx((kernel_distance(x, y), 0), abs=1e-13)
    mean, std = kid(features(200, 6, 1), features(200, 6, 2, shift=0.3), subsets=50, size=50)
    whole = kernel_distance(features(200, 6, 1), features(200, 6, 2, shift=0.3))
    assert abs(mean - whole) < 3 * std / 50**0.5
    with pytest.raises(ValueError, match="at least 31"):
        kid(x, y, size=31)
    with pytest.raises(ValueError, match="subset"):
        kid(x, y, subsets=0, size=10)


def test_cmmd_is_the_formula() -> None:
    x, y = features(14, 8, 1), features(11, 8, 2, shift=0.5)
    a, b = (F.normalize(z, dim=1).numpy() for z in (x, y))

    def mean_kernel(u: np.ndarray, v: np.ndarray) -> float:
        return np.mean([[np.exp(-np.sum((i - j) ** 2) / (2 * 10**2)) for j in v] for i in u])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert expected > 0.1
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(7 * x, y.float()) == pytest.approx(expected, rel=1e-5)
    assert cmmd(x, x.clone()) == pytest.approx(0, abs=1e-10)
    one, other = torch.eye(8)[:1], torch.eye(8)[1:2]  # |a - b|^2 = 2
    assert cmmd(one, other) == pytest.approx(1000 * (2 - 2 * math.exp(-1 / 100)), rel=1e-12)
    with pytest.raises(ValueError, match="zero"):
        cmmd(x, torch.zeros(3, 8))


def test_vendi_counts_what_is_different() -> None:
    one = features(1, 16, 0)
    assert vendi_score(one) == pytest.approx(1, rel=1e-12)
    assert vendi_score(one * torch.arange(1, 31, dtype=torch.float64)[:, None]) == pytest.approx(1, rel=1e-9)
    axes = torch.linalg.qr(features(16, 16, 1)).Q
    assert vendi_score(axes[:9] * 3) == pytest.approx(9, rel=1e-12)
    assert vendi_score(axes.repeat(5, 1)) == pytest.approx(16, rel=1e-12)
    # Two directions, three to one.
    assert vendi_score(axes[[0, 0, 0, 1]]) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    with pytest.raises(ValueError, match="zero"):
        vendi_score(torch.zeros(3, 2))


@pytest.mark.parametrize(("n", "width"), [(12, 40), (40, 12), (20, 20)])
def test_vendi_is_that_of_all_cosines(n: int, width: int) -> None:
    x = features(n, width, 3, shift=0.2)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    values = scipy.linalg.eigvalsh(unit @ unit.T / n)
    values = values[values > 1e-15]
    expected = np.exp(-np.sum(values * np.log(values)))
    assert vendi_score(x) == pytest.approx(expected, rel=1e-9)
    moments = Moments(width)
    for batch in F.normalize(x, dim=1).split(7):
        moments.update(batch)
    assert vendi_of(moments.statistics()) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="length 1"):
        vendi_of(statistics(x))
