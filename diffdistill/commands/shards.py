"""`diffdistill pairs` and `encode`: what is made once, in shards, before a training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import diffdistill.data.encoded
import diffdistill.data.pairs
from diffdistill.config import EncodeConfig, MachineConfig, PairsConfig
from diffdistill.data.examples import Examples
from diffdistill.environment import is_first_process, use_machine
from diffdistill.options import build
from diffdistill.players.teacher import Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import EncodeOptions, PairsOptions


def make_pairs(
    *,
    teacher: str | PathLike[str] | Teacher | None = None,
    conditions: Examples | None = None,
    **options: Unpack[PairsOptions],
) -> Path:
    """Make noise-image pairs of a teacher, or what is still missing of them; returns their folder, `out`.

    Args:
        teacher: a diffusers folder, a hub id, 'digits' (the default, embedded in the package), or a `Teacher`:
            `Teacher.around` a network of your own, or what `load_teacher` loaded.
        conditions: for a `Teacher` that takes others than class labels: an object with `__len__` and
            `get(indices) -> Example`, whose `cond` (B, ...) the network is called with. Pair i has the condition
            i modulo their number. `prompts`, a folder made by `encode`, does the same for a teacher of its family.
        options: those of `diffdistill pairs`, with underscores.

    Shards are written whole; those that are there and have their checksum are kept. Raises UserError for whatever
    cannot be used, a folder made with other settings for one.
    """
    _use_machine(options)
    return diffdistill.data.pairs.make_pairs(teacher=teacher, conditions=conditions, **options)


def encode(*, teacher: str | PathLike[str] | Teacher | None = None, **options: Unpack[EncodeOptions]) -> Path:
    """Encode prompts, or images with captions, or what is still missing of them; returns their folder, `out`.

    `teacher` is the folder or hub id of a latent diffusion pipeline, or what `load_teacher` loaded of one, whose size
    is then taken; its text encoders and autoencoder are loaded from where it came from. The options are those of
    `diffdistill encode`, with underscores. Raises UserError for whatever cannot be used, a `Teacher.around` a network
    alone for one.
    """
    _use_machine(options)
    return diffdistill.data.encoded.encode(teacher=teacher, **options)


def _use_machine(options: Mapping[str, object]) -> None:
    machine = build(MachineConfig, {name: options[name] for name in ("device", "threads") if name in options})
    use_machine(machine.device, machine.threads)


def pairs(config: PairsConfig) -> int:
    """The command `pairs`."""
    return _made(lambda: make_pairs(**asdict(config)), "use them with: diffdistill train --pairs")


def prompts(config: EncodeConfig) -> int:
    """The command `encode`."""
    return _made(lambda: encode(**asdict(config)), "use it with: diffdistill train --prompts")


def _made(make: Callable[[], Path], use: str) -> int:
    try:
        made = make()
        if is_first_process():
            print(f"{use} {made}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    return 0
