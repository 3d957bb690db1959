"""The Fréchet distance against scipy, torchmetrics and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffdistill.eval.metrics.frechet import frechet_at_infinity, frechet_distance, root, small_sample_bias
from diffdistill.eval.metrics.moments import enough, statistics
from tests.eval.feature_sets import Flatten, features, gaussian, spectrum


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
    distances = torch.tensor([frechet_distance(statistics(x), true) for x in sets])
    expected = small_sample_bias(true._replace(n=n))
    assert expected == pytest.approx(distances.mean().item(), rel=0.04)
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
