"""The order of samples is a function of seed, step and rank, in which each epoch visits every sample once."""

import pytest
import torch

from diffdistill.data.batches import batch_indices
from diffdistill.errors import UserError


def row(n: int, batch: int, steps: int, **how: int) -> list[int]:
    return torch.cat([batch_indices(n, batch, step, **{"seed": 0, **how}) for step in range(steps)]).tolist()


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 10), (7, 1), (12, 4)])
def test_each_epoch_visits_every_sample_once(n: int, batch: int) -> None:
    seen = row(n, batch, 3 * n)
    epochs = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
    assert len(epochs) == 3 * batch and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_seed_and_step() -> None:
    forward = [batch_indices(50, 8, step, seed=3).tolist() for step in range(30)]
    assert forward == [batch_indices(50, 8, step, seed=3).tolist() for step in reversed(range(30))][::-1]
    assert forward[0] != batch_indices(50, 8, 0, seed=4).tolist()
    torch.manual_seed(99)  # a caller's use of the global generator changes nothing
    assert forward[29] == batch_indices(50, 8, 29, seed=3).tolist()


def test_ranks_share_what_one_rank_would_see() -> None:
    for step in range(20):
        ranks = [batch_indices(17, 4, step, seed=1, rank=rank, world_size=2) for rank in range(2)]
        assert torch.cat(ranks).equal(batch_indices(17, 8, step, seed=1))


def test_a_batch_is_the_callers_own() -> None:
    first = batch_indices(10, 4, 0, seed=0)
    kept = first.clone()
    first.zero_()
    assert first.dtype == torch.int64 and batch_indices(10, 4, 0, seed=0).equal(kept)


def test_batch_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"4096 is larger than the data \(1797 samples\); use at most 1797"):
        batch_indices(1797, 4096, 0, seed=0)
    with pytest.raises(UserError, match="use at most 449"):
        batch_indices(1797, 512, 0, seed=0, world_size=4)
    with pytest.raises(UserError, match="0"):
        batch_indices(1797, 0, 0, seed=0)
