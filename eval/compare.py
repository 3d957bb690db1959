"""`diffdistill compare A B C --protocol NAME`: several models judged alike, and whether they differ.

All are drawn from the same noise. A difference of two models is that of their bootstrap replicates, in which an image
weighs the same for both, so that what they share cancels.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.eval.metrics.bootstrap import interval, p_value
from diffdistill.eval.models import Model, open_model
from diffdistill.eval.protocol import digest
from diffdistill.eval.report import check_writable, markdown_table, text_table, with_notes, write_json, write_text
from diffdistill.eval.scoring import Asked, Score, Setting, notes, report_columns, report_of, report_rows, score
from diffdistill.files import atomic_write
from diffdistill.pictures import save_png, side_by_side

TIMED = 5
GRID = 12
DIFFERENCES = ("metric", "model", "against", "difference", "95% from", "to", "p")


def compare(folders: Sequence[str], asked: Asked, out: str) -> dict[str, Any] | None:
    """Prints and writes table, differences, quality against latency, and a grid; returns the report."""
    if len(folders) < 2:
        raise UserError(f"compare: {len(folders)} model was given; give two or more")
    setting, into = Setting(asked), Path(out)
    if setting.processes.rank == 0:
        check_writable(into)
    wanted = replace(setting.wanted, strict=False)  # steps and guidance are of the teachers among them
    scores: list[Score] = []
    milliseconds: list[float | None] = []
    for folder in folders:
        model = open_model(folder, wanted)
        # A folder of its own for whatever the images depend on, so that other options are other folders.
        known = digest([model.fingerprint, model.call, asked.protocol.count, asked.protocol.seed, asked.prompts])
        found = score(model, setting, into / "models" / f"{model.name}-{known}")
        used = [each.model for each in scores]
        name = next(n for n in chain((found.model, folder), (f"{folder} ({i})" for i in count(2))) if n not in used)
        scores.append(replace(found, model=name))
        milliseconds.append(None if setting.processes.rank else latency(model, setting))
        del model  # before the next is loaded
    if setting.processes.rank > 0:
        return None
    differences = [d for found in scores[1:] for d in against(scores[0], found, setting)]
    rows, columns = report_rows(scores, asked.protocol), report_columns(scores)
    for found, taken in zip(scores, milliseconds, strict=True):
        next(row for row in rows if row["model"] == found.model)["ms per image"] = taken
    columns.append("ms per image")
    report = report_of(scores, setting)
    for row, taken in zip(report["rows"], milliseconds, strict=True):
        row["ms per image"] = taken
    write_json(report | {"differences": differences}, into / "results.json")
    tables = [markdown_table(rows, columns), markdown_table(differences, DIFFERENCES)]
    told = [*notes(scores, setting), _latency_note(setting)]
    write_text(with_notes(tables, told), into / "table.md")
    print(text_table(rows, columns))
    if differences:
        print(text_table(differences, DIFFERENCES))
    print("\n".join(told))
    shown = [(found.model, found.shown[:GRID]) for found in scores if found.shown is not None]
    grid = save_png(side_by_side(shown, max(1, 64 // asked.protocol.resolution)), into / "grid.png")
    print(f"pictures: {grid}, {quality_picture(scores, milliseconds, setting, into / 'quality.png')}")
    print(f"table:    {into / 'table.md'}, {into / 'results.json'}")
    return report


def latency(model: Model, setting: Setting) -> float | None:
    """Milliseconds an image of the protocol's batch, drawn end to end; the median of some, after one to warm up."""
    if model.conditions == "images":
        return None
    protocol = setting.protocol
    indices = range(min(protocol.batch, protocol.count))
    given = setting.given(setting.labels(model), indices)
    seconds = []
    with torch.inference_mode():
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            model.draw(indices, protocol.seed, *given)
            seconds.append(time.perf_counter() - started)  # the images have come to the CPU: nothing is pending
    return 1000 * statistics.median(seconds[1:]) / len(indices)


def _latency_note(setting: Setting) -> str:
    batch = min(setting.protocol.batch, setting.protocol.count)
    return f"ms per image: median of {TIMED} batches of {batch} on {setting.device.type}, text and decoding included"


def against(first: Score, other: Score, setting: Setting) -> list[dict[str, Any]]:
    """Rows of what the other model has more than the first, metric by metric."""
    rows = []
    for metric in setting.protocol.metrics:
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


def quality_picture(
    scores: Sequence[Score], milliseconds: Sequence[float | None], setting: Setting, path: Path
) -> Path:
    """The protocol's first metric against latency, with its interval."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("compare: the picture needs matplotlib; pip install 'diffdistill[eval]'") from None
    metric = setting.protocol.metrics[0].name
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for found, taken in zip(scores, milliseconds, strict=True):
        value = found.values.get(metric)
        if value is None or taken is None:
            continue
        low, high = found.intervals.get(metric, (value, value))
        bars = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar([taken], [value], yerr=bars, marker="o", capsize=3, linestyle="none")
        steps = "" if found.steps is None else f", {found.steps} step{'' if found.steps == 1 else 's'}"
        axes.annotate(f"{found.model}{steps}", (taken, value), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds an image", ylabel=metric)
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.margins(x=0.4, y=0.15)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return atomic_write(path, file.getvalue())
