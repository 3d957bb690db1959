"""How long images take, of students and other models against their teacher.

End to end, from prompts or classes and noise to images in the host's memory, text encoding and decoding included. The
models take turns, a draw each, so that a machine whose load drifts is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.core.attention_choice import check_attention
from diffdistill.environment import environment
from diffdistill.eval.models import ModelLike, check_dtype
from diffdistill.eval.report import check_writable, markdown_table, text_table, with_notes, write_json, write_text
from diffdistill.eval.subjects import check_resolution, load_subject, plan_models
from diffdistill.eval.timing import WARM_UP, SpeedOptions, Subject, TimedRun, measure_runs, percentile
from diffdistill.families import attention_of

COLUMNS = (
    *("model", "run", "steps", "passes", "batch", "pixels", "p50 ms", "p90 ms", "p99 ms", "images/s"),
    *("speed-up", "peak MB", "compile s"),
)


@dataclass(frozen=True)
class SpeedTable:
    """Times of models: a row for each at each batch size and resolution, eager and compiled."""

    rows: list[dict[str, Any]]
    columns: list[str]
    notes: list[str]
    out: Path  #: the folder with speed.md and speed.json

    def __str__(self) -> str:
        """Table and notes for a terminal."""
        return "\n".join([text_table(self.rows, self.columns), *self.notes])


def time_models(models: Sequence[ModelLike], options: SpeedOptions, out: Path) -> SpeedTable:
    """Times the models and their teachers, and writes speed.md and speed.json."""
    check_dtype(options.dtype, options.device)
    check_attention(options.attention, options.device, getattr(torch, options.dtype))
    plans = plan_models(models, options)
    for plan in plans:
        for resolution in options.resolutions:
            check_resolution(plan, resolution)
    check_writable(out)
    subjects = [load_subject(plan, options) for plan in plans]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(attention_of(subject.parts, options.attention))
        for batch in options.batch_sizes:
            for resolution in options.resolutions:
                rows += _rows(measure_runs(subjects, batch, resolution, options), batch)
    notes = _notes(subjects, options)
    report = {
        "device": options.device.type,
        "dtype": options.dtype,
        "attention": options.attention,
        "seed": options.seed,
        "repeats": options.repeats,
        "warm_up": WARM_UP,
        "environment": environment(),
        "notes": notes,
        "columns": COLUMNS,
        "rows": rows,
    }
    write_json(report, out / "speed.json")
    columns = [c for c in COLUMNS if c != "compile s" or options.compiled]
    write_text(with_notes([markdown_table(rows, columns)], notes), out / "speed.md")
    return SpeedTable(rows, columns, notes, out)


def _rows(runs: Sequence[TimedRun], batch: int) -> list[dict[str, Any]]:
    """A row for each run; its speed-up is over the teacher's run of the same kind."""
    median = {(r.place, r.compiled is None): percentile(r.seconds, 0.5) for r in runs if r.seconds}
    passes = {r.place: r.passes for r in runs if r.compiled is None}
    rows = []
    for run in runs:
        row: dict[str, Any] = {
            "model": run.subject.name,
            "run": "eager" if run.compiled is None else "compiled",
            "steps": run.subject.steps,
            "passes": _plain(passes[run.place]),
            "batch": batch,
            "pixels": run.pixels,
        }
        if run.seconds:
            for q in (50, 90, 99):
                row[f"p{q} ms"] = 1000 * percentile(run.seconds, q / 100) / batch
            row["images/s"] = batch * len(run.seconds) / sum(run.seconds)
            teacher = (
                median.get((run.subject.against, run.compiled is None)) if run.subject.against is not None else None
            )
            row["speed-up"] = None if teacher is None else teacher / percentile(run.seconds, 0.5)
        row |= {"peak MB": run.peak_mb, "compile s": run.compile_seconds, "seconds a batch": run.seconds}
        rows.append(row)
    return rows


def _plain(passes: float | None) -> float | int | None:
    return int(passes) if passes is not None and passes == int(passes) else passes


def _notes(subjects: Sequence[Subject], options: SpeedOptions) -> list[str]:
    machine = environment()
    teachers = [f"{s.name}, {s.steps} steps" for i, s in enumerate(subjects) if s.against == i]
    where = machine["gpu"] if options.device.type == "cuda" else f"CPU, {machine['cpu_threads']} threads"
    notes = [
        f"{where}, {machine['platform']}, torch {machine['torch']}, diffusers {machine['diffusers']}, "
        f"{options.dtype}, attention {options.attention}, commit {machine['commit']}",
        "end to end: from prompts or classes and noise to images in the host's memory, text encoding and decoding "
        "included",
        f"ms: a batch's time by its images; nearest-rank percentiles of {options.repeats} draws after {WARM_UP} to "
        "warm up, the models in turn" + ("; p99 of fewer than 100 is the slowest" if options.repeats < 100 else ""),
        "passes: of the denoising network for an image; guidance makes two of one",
    ]
    if teachers:
        notes.append(f"speed-up: p50 against that of its teacher ({'; '.join(teachers)}), same batch and kind of run")
    if options.device.type == "cuda":
        notes.append("peak MB: of GPU memory, the model's weights and the most that a draw adds")
    else:
        notes.append("peak MB: measured on GPUs only")
    if options.compiled:
        notes.append(
            "compile s: the first draw less the next, with torch's cache on disk as it was; none for a model that runs "
            "what was compiled for one of the same architecture"
        )
    return notes
