"""Randomness as a function of what it is for.

Every random number of a training is drawn from a generator seeded by (seed, step, purpose), for all samples of the
step at once, of which a process or a part of a batch takes its own. A resumed run draws what the uninterrupted run
would have drawn, and a checkpoint needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMAGES_PER_SEED = 1_000_000


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed, the same on every machine, for the parts joined by '/' (BLAKE2b)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `seed_for(*parts)`."""
    import torch

    return torch.Generator(device).manual_seed(seed_for(*parts))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators start from the seed inside the block, and are as before after it.

    Dropout draws from them: two passes of a network under the same seed drop the same units.
    """
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image, so that image i of a seed does not depend on the batch it is in.

    Image i of seed s uses `torch.Generator().manual_seed(1_000_000 * s + i)`, which a user of stock
    diffusers can write down; seed 0 is EDM's protocol (seeds 0, 1, 2, ...).
    """
    import torch

    return [torch.Generator().manual_seed(IMAGES_PER_SEED * seed + i) for i in indices]
