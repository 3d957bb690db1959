"""What `eval` and `compare` return, print and write: rows, notes, a report as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffdistill.environment import environment
from diffdistill.eval import html
from diffdistill.eval.judge import Judge, Score
from diffdistill.eval.metrics.moments import enough
from diffdistill.eval.protocol import Protocol
from diffdistill.eval.report import markdown_table, text_table, with_notes, write_json, write_text

DIFFERENCES = ("metric", "model", "against", "difference", "95% from", "to", "p")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model or several under a protocol. Of several processes all but the first have none."""

    scores: list[Score]
    notes: list[str]  #: what a reader must know of the numbers
    report: dict[str, Any]  #: what results.json holds
    out: Path  #: the folder with table.md, results.json and pictures
    published: list[dict[str, Any]] = field(default_factory=list)  #: rows of known models
    differences: list[dict[str, Any]] = field(default_factory=list)  #: of `compare`: what each has more than the first
    pictures: list[Path] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each model: "model", "steps", and a number for each metric."""
        return [score.row for score in self.scores]

    def tables(self) -> list[tuple[list[dict[str, Any]], list[str]]]:
        """Rows and columns of each table, with intervals below their rows and published figures at the end."""
        rows: list[dict[str, Any]] = []
        for score in self.scores:
            rows.append(score.row)
            if score.intervals:
                texts = {name: f"{low:.4g} to {high:.4g}" for name, (low, high) in score.intervals.items()}
                rows.append({"model": "  95%", "steps": None, **texts})
        names = [name for score in self.scores for name in score.row if name not in ("model", "steps", _MS)]
        timed = [_MS] if any(score.ms_per_image is not None for score in self.scores) else []
        tables = [([*rows, *self.published], ["model", "steps", *dict.fromkeys(names), *timed])]
        return [*tables, (self.differences, list(DIFFERENCES))] if self.differences else tables

    def __str__(self) -> str:
        """Tables and notes for a terminal."""
        return "\n".join([*(text_table(rows, columns) for rows, columns in self.tables()), *self.notes])

    def markdown(self) -> str:
        """Tables and notes as Markdown."""
        return with_notes([markdown_table(rows, columns) for rows, columns in self.tables()], self.notes)

    def write(self) -> None:
        """table.md and results.json."""
        write_json(self.report, self.out / "results.json")
        write_text(self.markdown(), self.out / "table.md")

    def page(self, title: str) -> Path:
        """report.html: tables, pictures, notes and environment as one page that loads nothing; returns its path."""
        drawn = "".join(html.picture(path, path.stem) for path in self.pictures)
        headings = ("Scores", "Differences")
        sections = [(name, html.table(*each)) for name, each in zip(headings, self.tables(), strict=False)]
        sections += [("Pictures", f'<div class="pictures">{drawn}</div>' if drawn else "")]
        sections += [("What to know of the numbers", html.items(self.notes))]
        sections += [("Environment", html.pairs(self.report.get("environment", {})))]
        return html.page(title, sections, self.out / "report.html")


_MS = "ms per image"


def evaluation_of(
    scores: Sequence[Score], judge: Judge, out: Path, *, more_notes: Sequence[str] = (),
    differences: Sequence[dict[str, Any]] = (), **more: Any,
) -> Evaluation:  # fmt: skip
    """Scores with what a reader must know of them; `more` goes into the report."""
    if judge.processes.rank > 0:
        return Evaluation([], [], {}, out)
    protocol = judge.protocol
    notes = [*notes_of(scores, judge), *judge.options.notes, *more_notes]
    any_timed = any(s.ms_per_image is not None for s in scores)

    def timed(each: Score) -> dict[str, Any]:
        return {_MS: each.ms_per_image} if any_timed else {}

    report: dict[str, Any] = {
        "protocol": protocol.name,
        "title": protocol.title,
        "count": protocol.count,
        "seed": protocol.seed,
        "metrics": {m.name: next(n.name for n in judge.measures if n.key == m.measure) for m in protocol.metrics},
        "reference": None if judge.reference is None else judge.reference.about,
        "rows": [{**s.row, **timed(s), "intervals": {k: list(v) for k, v in s.intervals.items()}} for s in scores],
        "published": [asdict(p) for p in protocol.published],
        "notes": notes,
        "environment": environment(),
        **more,
    }
    if differences:
        report["differences"] = list(differences)
    return Evaluation(list(scores), notes, report, out, published_rows(protocol), list(differences))


def published_rows(protocol: Protocol) -> list[dict[str, Any]]:
    """Figures of known models as rows of the table."""
    return [{"model": f"{p.model} (published)", "steps": p.steps, p.metric: p.value} for p in protocol.published]


def notes_of(scores: Sequence[Score], judge: Judge) -> list[str]:
    """What a reader must know of the numbers: images, networks, resizing and rounding, reference, bias."""
    protocol, reference = judge.protocol, judge.reference
    rounding = "8 bit" if protocol.eight_bit else "not rounded to 8 bit"
    lines = [f"{protocol.name}: {protocol.title}", f"{protocol.count} images of seed {protocol.seed}, {rounding}"]
    if protocol.resize:
        lines[-1] += f", other sizes brought to {protocol.resolution} by {protocol.resize}"
    if reference is not None:
        lines.append(f"against {reference.about}")
    for m in judge.measures:
        readers = ", ".join(metric.name for metric in protocol.metrics if metric.measure == m.key)
        lines.append(f"{readers}: {m.name}")
    for metric in protocol.metrics:
        if metric.kind == "frechet" and reference is not None and reference.lacks(metric) is None:
            width = len(reference.statistics(metric.reads).mean)
            warning = enough(min(protocol.count, reference.count), width)
            lines += [f"{metric.name}: {warning}"] if warning else []
    lines += dict.fromkeys(f"{name}: none, {why}" for score in scores for name, why in score.missing.items())
    lines += [f"published {p.metric} of {p.model}: {p.source}" for p in protocol.published]
    return lines
