"""A batch of which some rows go in one call and some in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def joined(outputs: Sequence[Sequence[Tensor]], rows: Sequence[Tensor]) -> list[Tensor]:
    """The outputs (b, ...) of shares of a batch as those of all its rows; `rows` are the indices of each share."""
    if len(outputs) == 1:
        return list(outputs[0])
    order = torch.cat(list(rows)).argsort()
    return [torch.cat(parts)[order] for parts in zip(*outputs, strict=True)]


def by_length(lengths: Tensor, compute: Callable[[Tensor | None], list[Tensor]]) -> list[Tensor]:
    """What `compute` gives (B, ...) of the rows that it is told, each time those whose lengths (B,) are equal.

    `compute` is told None for all rows. The lengths are read from the device; without values, for a plan, they are
    taken to be equal.
    """
    own = [0] if lengths.is_meta else lengths.tolist()
    kinds = sorted(set(own))
    if len(kinds) == 1:
        return compute(None)
    rows = [(lengths == kind).nonzero()[:, 0] for kind in kinds]
    return joined([compute(share) for share in rows], rows)
