"""`diffdistill speed`: models timed against their teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.config import SpeedConfig
from diffdistill.environment import use_machine
from diffdistill.eval.models import ModelLike
from diffdistill.eval.speed import SpeedTable, time_models
from diffdistill.eval.timing import SpeedOptions
from diffdistill.options import build
from diffdistill.players.teacher import Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import SpeedOptions as SpeedKeywords


def speed(models: ModelLike | Sequence[ModelLike], **options: Unpack[SpeedKeywords]) -> SpeedTable:
    """Time one model or several against their teacher: latency, throughput, network passes, memory.

    Each model is a run, a folder of runs, a model's folder or hub id, or a loaded teacher or student of pixels. The
    options are those of `diffdistill speed`, with underscores. The table is written into `out`. Raises UserError for
    whatever cannot be timed.
    """
    several = _several(models)
    names = [os.fspath(model) if isinstance(model, str | os.PathLike) else "loaded" for model in several]
    return _time(build(SpeedConfig, {**options, "models": names}), several)


def _several(models: ModelLike | Sequence[ModelLike]) -> Sequence[ModelLike]:
    if isinstance(models, str | os.PathLike | Teacher):
        return [models]
    is_student = isinstance(models, tuple) and len(models) == 2 and isinstance(models[1], Teacher)
    return [models] if is_student else models  # type: ignore[list-item, return-value]


def _time(config: SpeedConfig, models: Sequence[ModelLike]) -> SpeedTable:
    options = SpeedOptions(
        batch_sizes=config.batch_sizes,
        resolutions=config.resolutions or (None,),
        teacher=config.teacher,
        teacher_steps=config.teacher_steps,
        guidance_scale=config.guidance_scale,
        attention=config.attention,
        compiled=config.compile,
        repeats=config.repeats,
        dtype=config.dtype,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        device=use_machine(config.device, config.threads),
    )
    return time_models(models, options, Path(config.out))


def run(config: SpeedConfig) -> None:
    """The command: prints the table, and where it is."""
    table = _time(config, config.models)
    print(table)
    print(f"table: {table.out / 'speed.md'}, {table.out / 'speed.json'}")
