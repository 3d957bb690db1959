"""Metrics against independent computations: scipy, torchmetrics, naive loops, cases with a known answer."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.eval.metrics import moments as sizes
from diffdistill.eval.metrics.bootstrap import bootstrap_frechet, bootstrap_mean, bootstrap_weights, interval, p_value
from diffdistill.eval.metrics.frechet import frechet_at_infinity, frechet_distance, root, small_sample_bias
from diffdistill.eval.metrics.kernel import cmmd, kernel_distance, kid
from diffdistill.eval.metrics.manifold import density_coverage, precision_recall
from diffdistill.eval.metrics.moments import Moments, Statistics, enough, statistics
from diffdistill.eval.metrics.scores import class_agreement, inception_score, vendi_of, vendi_score


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


def spectrum(values: Tensor, seed: int, far: float = 0.0) -> Statistics:
    """A covariance of given eigenvalues; the axes depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    width = len(values)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return gaussian(torch.full((width,), far), axes * values @ axes.T)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven columns: blocks of ten rows and panels of three columns."""
    monkeypatch.setattr(sizes, "BLOCK", 70)
    monkeypatch.setattr(sizes, "PANEL", 3)


def streamed(x: Tensor, *sizes: int) -> Moments:
    """The rows in batches of the sizes, in turn."""
    moments, at, k = Moments(x.shape[1]), 0, 0
    while at < len(x):
        moments.update(x[at : at + sizes[k % len(sizes)]])
        at, k = at + sizes[k % len(sizes)], k + 1
    return moments


def assert_statistics(found: Statistics, x: Tensor, tolerance: float = 1e-13) -> None:
    """Against torch's two passes, relative to the largest variance."""
    expected = torch.cov(x.double().T)
    assert found.n == len(x)
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.cov, expected, rtol=0, atol=tolerance * expected.max().item())
    assert torch.equal(found.cov, found.cov.T)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [(1,), (3, 8), (10,), (64,), (25, 1)])
def test_moments_are_two_passes_and_do_not_show_the_batches(sizes: tuple[int, ...]) -> None:
    x = features(64, 7, 0, shift=3)
    found = streamed(x, *sizes).statistics()
    assert_statistics(found, x)
    whole = statistics(x)
    assert torch.equal(found.cov, whole.cov) and torch.equal(found.mean, whole.mean)


@pytest.mark.usefixtures("small_blocks")
def test_moments_can_be_read_in_between() -> None:
    x = features(35, 7, 0)
    moments = streamed(x[:13], 4)
    assert_statistics(moments.statistics(), x[:13])
    moments.update(x[13:])
    assert moments.n == 35
    assert torch.equal(moments.statistics().cov, statistics(x).cov)


@pytest.mark.usefixtures("small_blocks")
def test_moments_keep_their_digits_whatever_comes_first() -> None:
    """Far from the origin, or a first block that is one point: one pass over raw sums loses all digits here."""
    x = features(60, 7, 0)
    far = statistics(x + 2.0**20).cov
    torch.testing.assert_close(far, torch.cov(x.T), rtol=0, atol=1e-9)
    raw = (x + 2.0**20).T @ (x + 2.0**20)
    mean = (x + 2.0**20).mean(0)
    assert ((raw - 60 * torch.outer(mean, mean)) / 59 - far).abs().max() > 1e-5
    assert_statistics(
        statistics(torch.cat([x[:1].repeat(11, 1) + 1000, x])), torch.cat([x[:1].repeat(11, 1) + 1000, x])
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cut", [0, 1, 10, 33, 60])
def test_moments_merge(cut: int) -> None:
    x = features(60, 7, 0, shift=5)
    x[cut:] += 4
    first, second = Moments(7), Moments(7)
    if cut:
        first.update(x[:cut])
    if cut < 60:
        second.update(x[cut:])
    first.merge(second)
    assert_statistics(first.statistics(), x)
    assert second.n == 60 - cut
    first.update(x[:15])
    assert_statistics(first.statistics(), torch.cat([x, x[:15]]))


def test_moments_hold_no_more_than_at_the_start() -> None:
    def held(moments: Moments) -> int:
        return sum(v.untyped_storage().nbytes() for v in vars(moments).values() if isinstance(v, Tensor))

    moments = Moments(8)
    before = held(moments)
    for _ in range(5):
        moments.update(torch.randn(sizes.BLOCK // 16, 8))
    assert held(moments) == before
    assert moments.n == 5 * sizes.BLOCK // 16


def test_moments_refuse_a_batch_whole() -> None:
    x = features(10, 4, 1)
    moments = Moments(4)
    moments.update(x)
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[3, 2] = value
        with pytest.raises(ValueError, match="not finite"):
            moments.update(bad)
    for wrong in (x[0], x.long(), x[:0]):
        with pytest.raises(ValueError, match="want"):
            moments.update(wrong)
    with pytest.raises(ValueError, match="width"):
        moments.update(x[:, :3])
    with pytest.raises(ValueError, match="width"):
        moments.merge(Moments(3))
    with pytest.raises(ValueError, match="width"):
        Moments(0)
    with pytest.raises(ValueError, match="2 samples"):
        Moments(4).statistics()
    assert torch.equal(moments.statistics().cov, statistics(x).cov)


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("reverse", [False, True])
def test_frechet_of_shared_axes_in_closed_form(condition: float, reverse: bool) -> None:
    """Sum of (differences of standard deviations)^2, however far the variances lie apart."""
    a = torch.logspace(0, -math.log10(condition), 48, dtype=torch.float64)
    b = (a * 1.7).flip(0) if reverse else a * 1.7
    p, q = spectrum(a, 0), spectrum(b, 0)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    # The covariances themselves are rounded: a variance v that is off by 1e-16 has a root off by 1e-16 / sqrt(v).
    assert frechet_distance(p, q) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(q, p, root(p)) == pytest.approx(expected, rel=1e-9)


def test_frechet_takes_the_slow_way_where_the_fast_one_is_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: called.append(1) or svdvals(x))
    mild = torch.logspace(0, -2, 32, dtype=torch.float64)
    frechet_distance(spectrum(mild, 0), spectrum(mild, 1))
    assert not called
    steep = torch.logspace(0, -13, 32, dtype=torch.float64)
    frechet_distance(spectrum(steep, 0), spectrum(steep, 1))
    frechet_distance(spectrum(mild, 0), spectrum(mild, 0))  # no distance, so no digits of it either
    frechet_distance(statistics(features(30, 32, 0)), spectrum(mild, 1))
    assert len(called) == 3


def test_a_root_is_one_and_leaves_the_null_space_out() -> None:
    for n in (20, 200):
        s = statistics(features(n, 32, 1))
        r = root(s)
        torch.testing.assert_close(r @ r.T, s.cov, rtol=0, atol=1e-13)
        assert r.shape == (32, min(32, n - 1))
    for seed in range(10):  # by the chance of rounding Cholesky often gets through
        x = features(200, 8, seed)
        assert root(statistics(torch.cat([x, x[:, :3] + x[:, 3:6]], 1))).shape == (11, 8)


def test_small_sample_bias_is_what_samples_show() -> None:
    """Samples against the distribution they come from: the mean distance is all bias."""
    width, n = 12, 600
    variances = torch.logspace(0, -1, width, dtype=torch.float64)
    true = gaussian(torch.zeros(width), torch.diag(variances))
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(200, n, width, generator=generator, dtype=torch.float64) * variances.sqrt()
    found = torch.tensor([frechet_distance(statistics(x), true) for x in sets])
    expected = small_sample_bias(true._replace(n=n))
    assert expected == pytest.approx(found.mean().item(), rel=0.04)
    assert small_sample_bias(statistics(sets[0])) == pytest.approx(expected, rel=0.1)
    one = gaussian(torch.zeros(4), 2 * torch.eye(4))  # D l / n + D (D + 1) l / 4 n
    assert small_sample_bias(one) == pytest.approx(2 * (4 + 5) / 1000, rel=1e-12)
    with pytest.raises(ValueError, match="2 samples"):
        small_sample_bias(one._replace(n=1))


def test_the_distance_at_infinity_has_less_bias() -> None:
    width, n = 16, 1000
    true, shift = gaussian(torch.zeros(width), torch.eye(width)), 0.3
    expected = width * shift**2
    generator = torch.Generator().manual_seed(1)
    sets = [torch.randn(n, width, generator=generator, dtype=torch.float64) + shift for _ in range(10)]
    finite = np.mean([frechet_distance(statistics(x), true) for x in sets]) - expected
    infinite = np.mean([frechet_at_infinity(x, true) for x in sets]) - expected
    assert finite == pytest.approx(small_sample_bias(true), rel=0.5)
    assert abs(infinite) < finite / 3
    assert frechet_at_infinity(sets[0], true, 1) == frechet_at_infinity(sets[0], true, 1)
    assert frechet_at_infinity(sets[0], true, 1) != frechet_at_infinity(sets[0], true, 2)
    with pytest.raises(ValueError, match="at least 64"):
        frechet_at_infinity(sets[0][:63], true)
    with pytest.raises(ValueError, match="points"):
        frechet_at_infinity(sets[0], true, points=1)


def test_too_few_images_are_said_to_be() -> None:
    assert "singular" in (enough(2048, 2048) or "")
    assert "10,000" in (enough(9_999, 64) or "") and "singular" not in (enough(9_999, 64) or "")
    assert enough(10_000, 2048) is None
    assert "\n" not in (enough(5, 64) or "") + (enough(500, 64) or "")


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
    found = kid(torch.from_numpy(x), torch.from_numpy(y), subsets=7, size=20, seed=2020)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-11)
    assert kid(torch.from_numpy(x), torch.from_numpy(y), subsets=7, size=20, seed=1) != found


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


def test_bootstrap_weights_are_a_function_of_seed_and_replicate() -> None:
    w = bootstrap_weights(500, 3, 4)
    assert w.sum() == 500 and w.shape == (500,)
    assert torch.equal(w, bootstrap_weights(500, 3, 4))
    assert not torch.equal(w, bootstrap_weights(500, 3, 5)) and not torch.equal(w, bootstrap_weights(500, 4, 4))
    assert (w == 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.08)


@pytest.mark.parametrize("n", [30, 100])
def test_bootstrap_frechet_is_that_of_the_repeated_rows(n: int) -> None:
    x, y = features(n, 20, 1, shift=50), statistics(features(90, 20, 2, shift=50.3))
    found = bootstrap_frechet(x, y, 4, seed=5)
    for replicate in range(4):
        drawn = x.repeat_interleave(bootstrap_weights(n, 5, replicate), 0)
        assert len(drawn) == n
        assert found[replicate].item() == pytest.approx(frechet_distance(statistics(drawn), y), rel=1e-9)
    assert torch.equal(bootstrap_frechet(x, y, 2, seed=5), found[:2])
    torch.testing.assert_close(bootstrap_frechet(x.float(), y, 4, seed=5), found, rtol=1e-4, atol=0)


def test_bootstrap_mean_is_that_of_the_repeated_values() -> None:
    x = features(1, 80, 1)[0]
    x[7] = math.nan
    found = bootstrap_mean(x, 3, seed=2)
    for replicate in range(3):
        drawn = x.repeat_interleave(bootstrap_weights(80, 2, replicate))
        assert found[replicate].item() == pytest.approx(drawn.nanmean().item(), rel=1e-12)
    for wrong in (x[None], x[:0], x[7:8], torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError):
            bootstrap_mean(wrong)


def test_intervals_are_as_wide_as_the_spread_of_fresh_samples() -> None:
    """Means of a normal, whose interval is known, and a Fréchet distance against fresh sets."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(bootstrap_mean(x, 500))
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * x.std().item() / 20, rel=0.1)
    reference = gaussian(torch.zeros(6), torch.eye(6))
    generator = torch.Generator().manual_seed(1)
    sets = torch.randn(200, 300, 6, generator=generator, dtype=torch.float64) + 0.3
    fresh = torch.tensor([frechet_distance(statistics(s), reference) for s in sets])
    found = bootstrap_frechet(sets[0], reference, 200)
    assert found.std().item() == pytest.approx(fresh.std().item(), rel=0.2)


def test_an_interval_lies_around_what_was_measured() -> None:
    """Twice the bias: without moving them all replicates lie above the measured distance."""
    x, reference = features(60, 24, 1), gaussian(torch.zeros(24), torch.eye(24))
    measured = frechet_distance(statistics(x), reference)
    found = bootstrap_frechet(x, reference, 50)
    assert interval(found)[0] > measured
    low, high = interval(found, around=measured)
    assert low < measured < high
    assert high - low == pytest.approx(np.subtract(*interval(found)[::-1]), rel=1e-9)


def test_intervals_are_quantiles() -> None:
    values = torch.arange(201.0).flip(0)
    assert interval(values) == pytest.approx((5, 195))
    assert interval(values, level=0.5) == pytest.approx((50, 150))
    assert interval(values, around=0) == pytest.approx((-95, 95))
    for wrong in (values[:1], values[None], torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="values"):
            interval(wrong)
        with pytest.raises(ValueError, match="values"):
            p_value(wrong)
    with pytest.raises(ValueError, match="level"):
        interval(values, level=1)


def test_p_values_count_the_rarer_side() -> None:
    values = torch.cat([torch.full((3,), -1.0), torch.full((96,), 1.0)])
    assert p_value(values) == pytest.approx(2 * 4 / 100)
    assert p_value(-values) == p_value(values)
    assert p_value(torch.ones(99)) == pytest.approx(2 / 100)
    assert p_value(torch.zeros(99)) == 1
    assert p_value(values, around=0) > 0.05


def test_paired_replicates_see_a_difference_that_unpaired_ones_do_not() -> None:
    reference = gaussian(torch.zeros(4), torch.eye(4))
    x = features(200, 4, 1)
    worse = x + 0.02
    first, second = (bootstrap_frechet(z, reference, 100, seed=0) for z in (worse, x))
    other = bootstrap_frechet(x, reference, 100, seed=1)
    assert (first - second).std() < (first - other).std() / 5
    same = bootstrap_frechet(x, reference, 100, seed=0) - second
    assert p_value(same) == 1 and interval(same) == (0, 0)
