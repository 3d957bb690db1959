"""Several models judged alike, and whether they differ.

All are drawn from the same noise. A difference of two models is that of their bootstrap replicates, in which an image
weighs the same for both, so that what they share cancels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError
from diffdistill.eval.judge import Judge, JudgeOptions, Score, score
from diffdistill.eval.latency import latency, latency_note
from diffdistill.eval.metrics.bootstrap import interval, p_value
from diffdistill.eval.models import ModelLike, open_model
from diffdistill.eval.protocol import digest
from diffdistill.eval.report import check_writable
from diffdistill.eval.results import Evaluation, evaluation_of
from diffdistill.files import atomic_write
from diffdistill.pictures import save_png, side_by_side

GRID = 12


def compare_models(models: Sequence[ModelLike], options: JudgeOptions, out: Path) -> Evaluation:
    """Judges two models or more; writes table, differences, quality against latency, a grid, and a page."""
    if len(models) < 2:
        raise UserError(f"compare: {len(models)} model was given; give two or more")
    judge = Judge(options)
    if judge.processes.rank == 0:
        check_writable(out)
    sampling = replace(judge.sampling, strict=False)  # steps and guidance are of the teachers among them
    scores: list[Score] = []
    for source in models:
        model = open_model(source, sampling)
        # A folder of its own for whatever the images depend on, so that other options are other folders.
        settings = [model.fingerprint, model.call, judge.protocol.count, judge.protocol.seed, options.prompts]
        key = digest([*settings, judge.protocol.name, [m.fingerprint for m in judge.measures]])
        result = score(model, judge, out / "models" / f"{model.name}-{key}")
        used = [each.model for each in scores]
        where = [os.fspath(source)] if isinstance(source, str | os.PathLike) else []
        name = next(n for n in chain((model.name, *where), (f"{model.name} ({i})" for i in count(2))) if n not in used)
        timed = None if judge.processes.rank else latency(model, judge)
        scores.append(replace(result, model=name, ms_per_image=timed))
        del model  # before the next is loaded
    if judge.processes.rank > 0:
        return evaluation_of([], judge, out)
    differences = [d for other in scores[1:] for d in against(scores[0], other, judge)]
    evaluation = evaluation_of(scores, judge, out, more_notes=[latency_note(judge)], differences=differences)
    evaluation.write()
    shown = [(each.model, each.shown[:GRID]) for each in scores if each.shown is not None]
    grid = save_png(side_by_side(shown, max(1, 64 // max(judge.protocol.pixels))), out / "grid.png")
    pictures = [grid, quality_picture(scores, judge, out / "quality.png")]
    evaluation = replace(evaluation, pictures=pictures)
    evaluation.page(f"{' and '.join(each.model for each in scores)} by the protocol {judge.protocol.name}")
    return evaluation


def against(first: Score, other: Score, judge: Judge) -> list[dict[str, Any]]:
    """Rows of what the other model has more than the first, metric by metric."""
    rows = []
    for metric in judge.protocol.metrics:
        a, b = other.values.get(metric.name), first.values.get(metric.name)
        if a is None or b is None or not {metric.name} <= first.replicates.keys() & other.replicates.keys():
            continue
        difference = other.replicates[metric.name] - first.replicates[metric.name]
        low, high = interval(difference, a - b)
        rows.append(
            {
                "metric": metric.name,
                "model": other.model,
                "against": first.model,
                "difference": a - b,
                "95% from": low,
                "to": high,
                "p": p_value(difference, a - b),
            }
        )
    return rows


def quality_picture(scores: Sequence[Score], judge: Judge, path: Path) -> Path:
    """The protocol's first metric against latency, with its interval."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("compare: the picture needs matplotlib; pip install 'diffdistill[eval]'") from None
    metric = judge.protocol.metrics[0].name
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for each in scores:
        value, taken = each.values.get(metric), each.ms_per_image
        if value is None or taken is None:
            continue
        low, high = each.intervals.get(metric, (value, value))
        bars = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar([taken], [value], yerr=bars, marker="o", capsize=3, linestyle="none")
        steps = "" if each.steps is None else f", {each.steps} step{'' if each.steps == 1 else 's'}"
        axes.annotate(f"{each.model}{steps}", (taken, value), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds an image", ylabel=metric)
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.margins(x=0.4, y=0.15)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return atomic_write(path, file.getvalue())
