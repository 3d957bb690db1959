"""Benchmark: DMD2's one-step student of the embedded digits teacher against the teacher's own steps.

    python -m diffdistill.eval.digits_benchmark --seeds 0,1,2 --steps 1100 --out runs/digits-benchmark

Each seed trains a student and evaluates it and the teacher on noise of that seed. Reported are means and
standard deviations over the seeds. Seeds that are done are not repeated; a stopped one is resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffdistill.config import coerce
from diffdistill.environment import environment
from diffdistill.errors import UserError

from .evaluate import COLUMNS, evaluate_run
from .report import markdown_table, text_table, write_json, write_text


def one_seed(seed: int, steps: int, teacher_steps: Sequence[int], out: Path) -> dict[str, Any]:
    """Train (or resume) and evaluate one seed; the finished report is read back if it is there."""
    from diffdistill.run import distill

    run, asked = out / f"seed-{seed}", {"steps": steps, "teacher_steps": list(teacher_steps)}
    report = run / "report.json"
    if report.exists():
        done = json.loads(report.read_text())
        if done["asked"] != asked:
            raise UserError(f"out: {str(run)!r} was made with {done['asked']}, not {asked}; choose another --out")
        return done
    started = time.perf_counter()
    if not (run / "student").exists():
        if (run / "config.yaml").exists():
            distill(resume=run)
        else:
            distill(method="dmd2", preset="digits", steps=steps, seed=seed, sample_every=0, out=str(run))
    seconds = time.perf_counter() - started
    rows = evaluate_run(str(run), None, teacher_steps, "digits", None, seed, None)
    result = {"seed": seed, "asked": asked, "training seconds": seconds, "rows": rows}
    write_json(result, report)
    return result


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model and number of steps: means over the seeds, and the distance's deviation."""
    rows = []
    for index, first in enumerate(results[0]["rows"]):
        same = [result["rows"][index] for result in results]
        row = {"model": first["model"], "steps": first["steps"]}
        for column in COLUMNS[2:]:
            row[column] = statistics.fmean(r[column] for r in same)
        distances = [r["frechet distance"] for r in same]
        row["+- of distance"] = statistics.stdev(distances) if len(distances) > 1 else None
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1100, help="training steps of a student (default: 1100)")
    parser.add_argument("--teacher-steps", default="8,16,32")
    parser.add_argument("--out", default="runs/digits-benchmark")
    args = parser.parse_args(argv)
    out = Path(args.out)
    teacher_steps = [coerce("teacher_steps", part, int, {"at_least": 1}) for part in args.teacher_steps.split(",")]
    seeds = [coerce("seeds", part, int, {"at_least": 0}) for part in args.seeds.split(",")]
    results = [one_seed(seed, args.steps, teacher_steps, out) for seed in seeds]
    rows = summary(results)
    columns = [*COLUMNS[:3], "+- of distance", *COLUMNS[3:]]
    minutes = sum(result["training seconds"] for result in results) / 60
    print(text_table(rows, columns))
    print(f"means over seeds {args.seeds}; training took {minutes:.1f} minutes in all")
    write_text(markdown_table(rows, columns), out / "table.md")
    write_json(
        {"rows": rows, "results": results, "options": vars(args), "environment": environment()}, out / "results.json"
    )


if __name__ == "__main__":
    main()
