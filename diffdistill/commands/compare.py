"""`diffdistill compare`: several models judged by one protocol, and whether they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.commands.judging import judge_options
from diffdistill.config import CompareConfig
from diffdistill.errors import UserError
from diffdistill.eval.compare import compare_models
from diffdistill.eval.models import ModelLike
from diffdistill.eval.results import Evaluation
from diffdistill.options import build

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import CompareOptions


def compare(models: Sequence[ModelLike], **options: Unpack[CompareOptions]) -> Evaluation:
    """Judge two models or more by one protocol, from the same noise; `differences` says what each has more.

    Each model is a run, a model's folder or hub id, a folder of images, or a loaded teacher or student. The options
    are those of `diffdistill compare`, with underscores. Tables and pictures are written into `out`. Raises UserError
    for whatever cannot be judged.
    """
    if isinstance(models, str | os.PathLike):
        raise UserError(f"models: {os.fspath(models)!r} is one; give a list of two or more")
    names = [os.fspath(model) if isinstance(model, str | os.PathLike) else "loaded" for model in models]
    config = build(CompareConfig, {**options, "models": names})
    return _compare(config, models)


def _compare(config: CompareConfig, models: Sequence[ModelLike]) -> Evaluation:
    if not models:
        raise UserError("compare: no model was given; give two or more")
    return compare_models(models, judge_options(config, models[0]), Path(config.out))


def run(config: CompareConfig) -> None:
    """The command: prints the tables, and where they and the pictures are."""
    comparison = _compare(config, config.models)
    if not comparison.scores:  # of another process than the first
        return
    print(comparison)
    print(f"pictures: {', '.join(map(str, comparison.pictures))}")
    print(f"table:    {comparison.out / 'table.md'}, {comparison.out / 'results.json'}")
    print(f"report:   {comparison.out / 'report.html'}")
