"""Bootstrap replicates, intervals and p-values."""

import math

import numpy as np
import pytest
import torch

from diffdistill.eval.metrics.bootstrap import bootstrap_frechet, bootstrap_mean, bootstrap_weights, interval, p_value
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.moments import statistics
from tests.eval.feature_sets import features, gaussian


def test_bootstrap_weights_are_a_function_of_seed_and_replicate() -> None:
    w = bootstrap_weights(500, 3, 4)
    assert w.sum() == 500 and w.shape == (500,)
    assert torch.equal(w, bootstrap_weights(500, 3, 4))
    assert not torch.equal(w, bootstrap_weights(500, 3, 5)) and not torch.equal(w, bootstrap_weights(500, 4, 4))
    assert (w == 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.08)


@pytest.mark.parametrize("n", [30, 100])
def test_bootstrap_frechet_is_that_of_the_repeated_rows(n: int) -> None:
    x, y = features(n, 20, 1, shift=50), statistics(features(90, 20, 2, shift=50.3))
    replicates = bootstrap_frechet(x, y, 4, seed=5)
    for replicate in range(4):
        drawn = x.repeat_interleave(bootstrap_weights(n, 5, replicate), 0)
        assert len(drawn) == n
        assert replicates[replicate].item() == pytest.approx(frechet_distance(statistics(drawn), y), rel=1e-9)
    assert torch.equal(bootstrap_frechet(x, y, 2, seed=5), replicates[:2])
    torch.testing.assert_close(bootstrap_frechet(x.float(), y, 4, seed=5), replicates, rtol=1e-4, atol=0)


def test_bootstrap_mean_is_that_of_the_repeated_values() -> None:
    x = features(1, 80, 1)[0]
    x[7] = math.nan
    replicates = bootstrap_mean(x, 3, seed=2)
    for replicate in range(3):
        drawn = x.repeat_interleave(bootstrap_weights(80, 2, replicate))
        assert replicates[replicate].item() == pytest.approx(drawn.nanmean().item(), rel=1e-12)
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
    replicates = bootstrap_frechet(sets[0], reference, 200)
    assert replicates.std().item() == pytest.approx(fresh.std().item(), rel=0.2)


def test_an_interval_lies_around_what_was_measured() -> None:
    """Twice the bias: without moving them all replicates lie above the measured distance."""
    x, reference = features(60, 24, 1), gaussian(torch.zeros(24), torch.eye(24))
    measured = frechet_distance(statistics(x), reference)
    replicates = bootstrap_frechet(x, reference, 50)
    assert interval(replicates)[0] > measured
    low, high = interval(replicates, around=measured)
    assert low < measured < high
    assert high - low == pytest.approx(np.subtract(*interval(replicates)[::-1]), rel=1e-9)


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
