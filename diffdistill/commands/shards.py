"""`diffdistill pairs` and `encode`: what is made once, in shards, before a training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import diffdistill.data.encoded
import diffdistill.data.pairs
from diffdistill.config import EncodeConfig, PairsConfig
from diffdistill.environment import use_machine
from diffdistill.options import build

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import EncodeOptions, PairsOptions


def make_pairs(**options: Unpack[PairsOptions]) -> Path:
    """Make noise-image pairs of a teacher, or what is still missing of them; returns their folder, `out`.

    Options are those of `diffdistill pairs`, with underscores. Shards are written whole; those that are there and have
    their checksum are kept. Raises UserError for whatever cannot be used, a folder made with other settings for one.
    """
    config = build(PairsConfig, options)
    use_machine(config.device, config.threads)
    return diffdistill.data.pairs.make_pairs(**asdict(config))


def encode(**options: Unpack[EncodeOptions]) -> Path:
    """Encode prompts, or images with captions, or what is still missing of them; returns their folder, `out`.

    Options are those of `diffdistill encode`, with underscores. Raises UserError for whatever cannot be used.
    """
    config = build(EncodeConfig, options)
    use_machine(config.device, config.threads)
    return diffdistill.data.encoded.encode(**asdict(config))


def pairs(config: PairsConfig) -> int:
    """The command `pairs`."""
    return _made(lambda: make_pairs(**asdict(config)), "use them with: diffdistill train --pairs")


def prompts(config: EncodeConfig) -> int:
    """The command `encode`."""
    return _made(lambda: encode(**asdict(config)), "use it with: diffdistill train --prompts")


def _made(make: Callable[[], Path], use: str) -> int:
    try:
        print(f"{use} {make()}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    return 0
