"""Aspect-ratio buckets: sizes of about one area, into which images of any ratio are put, and batches of one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.options import Sides
from diffdistill.rng import generator

WIDEST = 4
"""The greatest ratio of two sides, as of SDXL's buckets (Podell et al. 2023, arXiv:2307.01952, appendix I)."""
_GRAIN = 32  #: pixels, of which every family takes multiples


def bucket_sizes(size: Sides) -> list[Sides]:
    """`size`, and others of no more than its area, up to WIDEST times as long as wide or as wide as long.

    Their sides are multiples of about a sixteenth of the side of that square: of 64 pixels at 1024, where they are
    among SDXL's. For each shorter side there is one, as long as the area allows.
    """
    area = size[0] * size[1]
    step = max(1, round(math.sqrt(area) / 16 / _GRAIN)) * _GRAIN
    sizes = set()
    for short in range(step, math.isqrt(area) + 1, step):
        long = area // short // step * step
        if short <= long <= WIDEST * short:
            sizes |= {(long, short), (short, long)}
    others = sizes - {size}
    return [size, *sorted(others, key=lambda other: (distance(other, size), other))]


def distance(size: Sides, other: Sides) -> float:
    """How far two ratios of height and width are from each other: 0 if they are the same, else the log of their own."""
    return abs(math.log(size[0] * other[1] / (size[1] * other[0])))


def in_buckets(images: Sequence[Sides], sizes: Sequence[Sides]) -> dict[Sides, list[int]]:
    """The images of each size that is the nearest to some of them by its ratio, in the order of `sizes`."""
    held: dict[Sides, list[int]] = {size: [] for size in sizes}
    for i, image in enumerate(images):
        held[min(sizes, key=lambda size: distance(image, size))].append(i)
    return {size: rows for size, rows in held.items() if rows}


def bucket_batch(
    counts: Sequence[int], batch_size: int, step: int, *, seed: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Which samples this rank sees at this step: int64 (batch_size,), all ranks' of one bucket.

    `counts` are the samples of each bucket; indices run through the first, then the second, and so on. In an epoch each
    bucket gives the batches that it has whole, all in one shuffled row; what is left over is another part of it in
    each epoch. A function of the arguments alone, and R ranks see what one sees with R times the batch. Raises
    UserError where no bucket has a batch.
    """
    whole = batch_size * world_size
    batches = [count // whole for count in counts]
    if batch_size < 1 or not any(batches):
        raise UserError(
            f"batch_size: the steps take {whole} samples of one bucket, and the largest has {max(counts)}; "
            "take fewer, or encode without --buckets"
        )
    epoch, place = divmod(step, sum(batches))
    k, bucket = int(_order(sum(batches), seed, epoch, -1)[place]), 0
    while k >= batches[bucket]:
        k, bucket = k - batches[bucket], bucket + 1
    first = k * whole + rank * batch_size
    return _order(counts[bucket], seed, epoch, bucket)[first : first + batch_size] + sum(counts[:bucket])


@lru_cache(maxsize=128)  # of one epoch, the row of each bucket: as much as one row of all samples
def _order(n: int, seed: int, epoch: int, bucket: int) -> Tensor:
    return torch.randperm(n, generator=generator("cpu", seed, epoch, f"order of bucket {bucket}"))
