"""Means and covariances that come in batches, against torch's two passes."""

import math

import pytest
import torch
from torch import Tensor

from diffdistill.eval.metrics import moments as sizes
from diffdistill.eval.metrics.moments import Moments, Statistics, statistics
from tests.eval.feature_sets import features


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


def assert_statistics(actual: Statistics, x: Tensor, tolerance: float = 1e-13) -> None:
    """Against torch's two passes, relative to the largest variance."""
    expected = torch.cov(x.double().T)
    assert actual.n == len(x)
    torch.testing.assert_close(actual.mean, x.double().mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(actual.cov, expected, rtol=0, atol=tolerance * expected.max().item())
    assert torch.equal(actual.cov, actual.cov.T)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [(1,), (3, 8), (10,), (64,), (25, 1)])
def test_moments_are_two_passes_and_do_not_show_the_batches(sizes: tuple[int, ...]) -> None:
    x = features(64, 7, 0, shift=3)
    batched = streamed(x, *sizes).statistics()
    assert_statistics(batched, x)
    whole = statistics(x)
    assert torch.equal(batched.cov, whole.cov) and torch.equal(batched.mean, whole.mean)


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
