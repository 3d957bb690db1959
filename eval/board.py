"""The table and the pictures of a scoreboard."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from diffdistill.catalogue import describe_method, method_names
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval import html
from diffdistill.eval.report import markdown_table, write_json, write_text
from diffdistill.files import atomic_write
from diffdistill.pictures import save_png, side_by_side

COLUMNS = (
    *("method", "steps", "frechet distance", "+-", "kernel distance x1000", "precision", "recall"),
    *("class agreement %", "diversity", "training s", "peak MB", "passes", "least", "seeds"),
)


def averaged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and number of steps: means over training seeds and noise, deviation over the former.

    The teacher has no training seed; its deviation is over noise.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        same = groups.setdefault((result["method"], result["steps"]), [])
        if (result["seed"], result["noise"]) not in [(r["seed"], r["noise"]) for r in same]:
            same.append(result)
    rows = []
    for (method, steps), same in groups.items():
        by = "noise" if same[0]["seed"] is None else "seed"
        kinds = sorted({r[by] for r in same})
        row: dict[str, Any] = {"method": method, "steps": steps, "seeds": len(kinds)}
        for column in COLUMNS:
            numbers = [r[column] for r in same if isinstance(r.get(column), (int, float))]
            if column not in row and numbers:
                row[column] = fmean(numbers)
        distances = [fmean(r["frechet distance"] for r in same if r[by] == kind) for kind in kinds]
        row["+-"] = stdev(distances) if len(distances) > 1 else None
        rows.append(row)
    return in_order(rows)


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a board: the teachers' first, then by steps, then by distance."""
    return sorted(rows, key=lambda r: (not r["method"].startswith("teacher"), r["steps"], r["frechet distance"]))


def write_board(
    suite: str, results: Sequence[dict[str, Any]], pictures: dict[str, Tensor], budget: int, compared: str, out: Path
) -> list[dict[str, Any]]:
    """board.json, board.md, quality.png, samples.png and report.html; `compared` says with which images."""
    rows = averaged(results)
    report: dict[str, Any] = {"suite": suite, "budget": budget, "compared": compared, "environment": environment()}
    report |= {"columns": COLUMNS, "rows": rows, "results": list(results)}
    write_json(report, out / "board.json")
    write_text(f"{markdown_table(rows, COLUMNS)}\n{compared}\n", out / "board.md")
    if pictures:
        save_png(side_by_side(list(pictures.items()), scale=4), out / "samples.png")
    quality_picture(rows, out / "quality.png")
    drawn = [html.picture(out / "quality.png", "Fréchet distance by sampling steps")]
    if pictures:
        drawn.append(html.picture(out / "samples.png", "the same noise for all"))
    sections = [
        ("Board", html.table(rows, COLUMNS) + html.items([compared, f"at most {budget} network passes a training"])),
        ("Pictures", f'<div class="pictures">{"".join(drawn)}</div>'),
        ("Environment", html.pairs(report["environment"])),
    ]
    html.page(f"Scoreboard of the suite {suite}", sections, out / "report.html")
    return rows


def quality_picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Fréchet distance against steps, both logarithmic: a line a method, a panel for eight of one kind, one teacher."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("bench: the picture needs matplotlib; pip install 'diffdistill[eval]'") from None
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        points.setdefault(row["method"], []).append((row["steps"], row["frechet distance"]))
    teachers = [name for name in points if name.startswith("teacher")]
    shown = panels([name for name in points if name not in teachers])
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(max(8, 4.2 * across), 1 + 3.8 * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (title, names) in zip(grid, shown, strict=False):
        for line in (teachers, names):
            for name, marker in zip(line, itertools.cycle("osD^vP*X")):
                style: dict[str, Any] = {"linewidth": 1}
                if line is teachers:
                    style = {"color": "black", "linewidth": 2, "linestyle": "-" if name == "teacher" else "none"}
                # The teacher is named in the first panel alone: what begins with _ is in no legend.
                label = f"_{name}" if line is teachers and axes is not grid[0] else name
                axes.plot(*zip(*sorted(points[name]), strict=True), marker=marker, label=label, **style)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xticks([1, 2, 4, 8, 16, 32], [str(n) for n in (1, 2, 4, 8, 16, 32)])
        axes.tick_params(labelbottom=True)
        axes.legend(fontsize=7)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("sampling steps")
    figure.supylabel("Fréchet distance (lower is better)")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    atomic_write(path, file.getvalue())


def panels(methods: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The names in parts of at most eight of one kind, with the kind; without names, an empty one."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(methods):
        kinds.setdefault(_kind_of(name), []).append(name)
    parts = [(kind, part) for kind, names in sorted(kinds.items()) for part in _even(names)]
    return parts or [("", [])]


def _even(names: Sequence[str], most: int = 8) -> list[list[str]]:
    """In as few parts as possible, as long as each other but for one name."""
    count = -(-len(names) // most)
    cuts = [round(k * len(names) / count) for k in range(count + 1)]
    return [list(names[a:b]) for a, b in itertools.pairwise(cuts)]


def _kind_of(entry: str) -> str:
    name = entry.split(" ")[0]
    return describe_method(name).about.kind if name in method_names() else "your own"
