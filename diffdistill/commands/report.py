"""`diffdistill report`: a run as one HTML page that loads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from diffdistill.commands.watch import warnings_of
from diffdistill.config import ReportConfig, run_options
from diffdistill.errors import UserError, first_line
from diffdistill.eval import html
from diffdistill.files import json_object
from diffdistill.options import build
from diffdistill.training.metrics import metrics_lines

FRAMES = 24
"""Sample grids in a page, at most: the first, the last, and others spread evenly between them."""
GRIDS_BYTES = 3_000_000
"""What grids may take together; there are fewer of those that are large."""

_ABOUT = ("seconds_per_step", "peak_memory_mb")
_FIRST = ("judge/", "look/", "student/", "fake_score/")  # the order of the groups of curves


def report(run: str | PathLike[str], out: str | PathLike[str] | None = None) -> Path:
    """Write one HTML page of a run, by default RUN/report.html; returns its path.

    It has the curves of metrics.jsonl, the sample grids over time, the teacher beside the student on the same noise
    where the run has them, warnings, evaluation, options, environment, and how the student is loaded. It stands alone:
    nothing is loaded from anywhere. A run that is still trained has what there is so far. Raises UserError for a folder
    that is no run, and for a file of it that cannot be read.
    """
    return _report(build(ReportConfig, {"run": run, "out": out}))


def run(config: ReportConfig) -> None:
    """The command: says where the page is."""
    print(f"report: {_report(config)}")


def _report(config: ReportConfig) -> Path:
    folder = Path(config.run)
    options = run_options(folder)
    out = Path(config.out) if config.out else folder / "report.html"
    if out.is_dir():
        raise UserError(f"out: {str(out)!r} is a folder; name a file, such as {out / 'report.html'}")
    metrics = folder / "metrics.jsonl"
    lines = [values for _, values in metrics_lines(metrics)] if metrics.is_file() else []
    return html.page(
        f"{folder.resolve().name}: {_what(options)}", _sections(folder, options, lines), out, _lead(options, lines)
    )


def _what(options: Mapping[str, Any]) -> str:
    """Method and teacher, or of a teacher's training its data."""
    if "method" in options:
        return f"{options['method']}, distilled from {options.get('teacher')}"
    return f"a teacher of {options.get('data')}"


def _lead(options: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return '<p class="soft">There is no line in its metrics.jsonl yet.</p>'
    said = [f"step {lines[-1]['step']} of {options.get('steps')}"]
    timed = [line for line in lines if all(_is_number(line.get(name)) for name in _ABOUT)]
    if timed:
        said += [f"{timed[-1]['seconds_per_step']:.3g} s a step", f"{timed[-1]['peak_memory_mb']:.0f} MiB at most"]
    return f'<p class="soft">{html.text(", ".join(said))}</p>'


def _sections(run: Path, options: Mapping[str, Any], lines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    yield "Warnings", html.items(warnings_of(run, lines), "warning")
    yield "Samples", _samples(run)
    yield from _evaluations(run)
    yield "Curves", _curves(lines)
    yield "Last values", html.pairs({k: f"{v:.5g}" for k, v in _last(lines).items()})
    yield "How to load the student", _loading(run, options)
    yield "Options", html.pairs({name: "–" if value is None else value for name, value in options.items()})
    yield "Environment", html.pairs(_object(run / "environment.json"))
    yield "What it reads", html.pairs(_flat(_object(run / "inputs.json")))


def _samples(run: Path) -> str:
    """The grids with a slider, and the teacher's samples from the same noise below them."""
    folder = run / "samples"
    grids = sorted(folder.glob("step-*.png"))
    chosen = _spread(grids)
    shown = html.frames([(f"step {int(re.sub(r'[^0-9]', '', path.stem) or 0)}", path) for path in chosen], "Step")
    if len(chosen) < len(grids):
        shown += f'<p class="soft">{len(chosen)} of {len(grids)} grids; all are in {html.text(folder)}</p>'
    if (folder / "teacher.png").is_file():
        shown += html.picture(folder / "teacher.png", "the teacher from one noise: one pass above, several below")
    return shown


def _spread(grids: Sequence[Path]) -> list[Path]:
    """So many of the grids, the first and the last among them, as a page has room for."""
    each = max((min(path.stat().st_size, html.PICTURE_BYTES) for path in grids), default=1)
    room = max(2, min(FRAMES, GRIDS_BYTES // max(1, each)))
    if len(grids) <= room:
        return list(grids)
    return [grids[k * (len(grids) - 1) // (room - 1)] for k in range(room)]


def _evaluations(run: Path) -> Iterator[tuple[str, str]]:
    """Each evaluation in the run's folder: its table, its notes, teacher and student from the same noise."""
    for file in sorted((run / "eval").rglob("results.json"))[:8]:
        results = _object(file)
        rows = results.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"run: {file} has no rows; judge the run again with `diffdistill eval {run}`")
        columns = dict.fromkeys(name for row in rows for name in row if name != "intervals")
        notes = results.get("notes")
        body = html.table(rows, list(columns)) + html.items(map(str, notes if isinstance(notes, list) else ()))
        comparison = file.parent / "comparison.png"
        if comparison.is_file():
            body = html.picture(comparison, "rows from the same noise") + body
        yield f"Evaluation: {results.get('protocol')}", body


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    by_name: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if "/" in name and name != "judge/best step" and _is_number(value):
                by_name.setdefault(name, []).append((line["step"], value))

    def order(name: str) -> int:
        return next((i for i, group in enumerate(_FIRST) if name.startswith(group)), len(_FIRST))

    return html.curves({name: by_name[name] for name in sorted(by_name, key=order)})


def _last(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {k: v for line in lines for k, v in line.items() if _is_number(v)}


def _loading(run: Path, options: Mapping[str, Any]) -> str:
    """The lines of the student's card, with its folder."""
    if "method" not in options:
        return html.code(f"diffdistill train --teacher {run / 'teacher'}")
    card = run / "student" / "README.md"
    if not card.is_file():
        return html.code(f"diffdistill export {run}") + '<p class="soft">It has no student yet; this saves one.</p>'
    blocks = re.findall(
        r"^```python\n(.*?)^```", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL | re.MULTILINE
    )
    folder = str(run / "student")
    return "".join(html.code(block.replace('"FOLDER"', repr(folder))) for block in blocks)


def _object(path: Path) -> dict[str, Any]:
    """A JSON file of the run; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        return json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"run: {path} cannot be read ({first_line(error)}); remove it or make it anew") from None


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, object]:
    """A mapping with the mappings inside it written out, names joined by dots."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
