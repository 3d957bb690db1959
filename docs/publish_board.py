"""The published board, with the rows of another one: its file, the table in docs/results.md and docs/quality.png.

    diffdistill bench --suite digits --methods pdd,arc_flow --seed 100 --out runs/bench
    python docs/publish_board.py runs/bench

A method's rows take the place of those that it had. The teachers' rows stay: they are over the noise of three seeds.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from diffdistill.eval.board import COLUMNS, in_order, quality_picture
from diffdistill.eval.report import markdown_table, write_between, write_text
from diffdistill.eval.suites import published_board

DOCS = Path(__file__).parent
MARKS = ("<!-- written by docs/publish_board.py: begin -->", "<!-- written by docs/publish_board.py: end -->")


def publish(folder: Path, *, docs: Path = DOCS) -> None:
    """Puts the rows of the board in `folder` among the published ones, in the files of `docs` and eval/suites."""
    other = json.loads((folder / "board.json").read_text(encoding="utf-8"))
    board = published_board(other["suite"])
    new = [row for row in other["rows"] if not row["method"].startswith("teacher")]
    methods = sorted({row["method"] for row in new})
    kept = [row for row in board["rows"] if row["method"] not in methods]
    rows = [*kept, *({key: _rounded(row[key]) for key in COLUMNS if key in row} for row in new)]
    board["rows"] = in_order(rows)
    seeds = sorted({result["seed"] for result in other["results"] if result["seed"] is not None})
    commit = other["environment"]["commit"]
    for part in board["newer"]:
        part["methods"] = [name for name in part["methods"] if name not in methods]
    board["newer"] = [
        *(part for part in board["newer"] if part["methods"]),
        {"seeds": seeds, "commit": commit, "methods": methods},
    ]
    write_text(json.dumps(board, indent=1) + "\n", docs.parent / "eval" / "suites" / f"{other['suite']}.board.json")
    table = markdown_table(board["rows"], COLUMNS)
    write_between(docs / "results.md", f"{table}\n{_said(board)}", MARKS)
    quality_picture(board["rows"], docs / "quality.png")


def _rounded(value: Any) -> Any:
    """As the table shows it."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _said(board: dict[str, Any]) -> str:
    """Where the rows of other boards are from."""
    parts = [
        f"{', '.join(f'`{name}`' for name in part['methods'])} (`--seeds {','.join(map(str, part['seeds']))}`, commit "
        f"{part['commit'][:10]})"
        for part in board["newer"]
    ]
    return "\n".join(
        textwrap.wrap(
            f"Of other boards, `diffdistill bench --suite {board['suite']} --methods ..`: {'; '.join(parts)}.",
            120,
            break_on_hyphens=False,
        )
    )


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
