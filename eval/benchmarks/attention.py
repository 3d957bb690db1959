"""Benchmark: attention with a forward derivative, ours against torch's plain products (MATH), in memory and time.

    python -m diffdistill.eval.benchmarks.attention --out attention.json

Memory is exact: torch's profiler notes every allocation and release, of the temporaries inside of operators too, and
the peak is the most that was held at once beyond what was held before, which is the inputs and their tangents. Time is
taken without the profiler, on one thread, both sides in turn in one process: the median ratio of a pair, and the middle
half of the ratios. Of the gradients of output and tangent to all inputs and tangents the memory is measured, of ours
alone: MATH's tangent has none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from diffdistill.core.attention_choice import attention_by
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.report import markdown_table, write_json
from diffdistill.rng import generator

SIDES = {"ours": "jvp", "MATH": "math"}
"""What stands in the table -> what `--attention` calls it."""
COLUMNS = (
    "pass", "length", "ours MB", "MATH MB", "of MATH's", "ours s", "MATH s", "time to MATH's", "from", "to",
    "relative difference",
)  # fmt: skip
TANGENT, GRADIENTS = "output and tangent", "with gradients"


def inputs(length: int, heads: int, width: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values (1, heads, length, width) in float32, and their tangents."""
    draw = generator(torch.device("cpu"), "benchmark", seed)
    parts = torch.randn(6, 1, heads, length, width, generator=draw)
    return [x.clone() for x in parts[:3]], [x.clone() for x in parts[3:]]


def product(side: str, parts: list[Tensor], tangents: list[Tensor], gradients: bool = False) -> tuple[Tensor, ...]:
    """Output and tangent by one of SIDES; with their gradients where these are taken."""
    leaves = [x.detach().requires_grad_(gradients) for x in (*parts, *tangents)]
    with attention_by(SIDES[side]), torch.set_grad_enabled(gradients), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves[:3], leaves[3:], strict=True)]
        both = forward_ad.unpack_dual(F.scaled_dot_product_attention(*duals))
    output, tangent = both.primal, both.tangent
    assert tangent is not None
    if not gradients:
        return output, tangent
    return output, tangent, *torch.autograd.grad((output, tangent), leaves, (parts[0], tangents[0]))


def peak_mb(work: Callable[[], object]) -> float:
    """The most MB that torch's CPU allocator held at once while `work` ran, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        record.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if e["name"] == MEMORY)
    if not changes:
        return 0.0
    _, total, first = changes[0]
    return (max(held for _, held, _ in changes) - (total - first)) / 2**20


MEMORY = "[memory]"
"""What a trace of torch's profiler calls an allocation or a release."""


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(length: int, heads: int, width: int, pairs: int, both: bool, gradients: bool, seed: int) -> dict[str, Any]:
    """One row of the table, without MATH unless `both`, and without times where these are the gradients."""
    parts, tangents = inputs(length, heads, width, seed)
    sides = tuple(SIDES) if both else ("ours",)
    works: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        side: lambda side=side: product(side, parts, tangents, gradients)  # type: ignore[misc]
        for side in sides
    }
    row: dict[str, Any] = {"pass": GRADIENTS if gradients else TANGENT, "length": length}
    row |= {f"{side} MB": peak_mb(work) for side, work in works.items()}
    if gradients:
        return row
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(pairs):
        for side, work in works.items():
            taken[side].append(seconds(work))
    row |= {f"{side} s": statistics.median(values) for side, values in taken.items()}
    if not both:
        return row
    ratios = sorted(a / b for a, b in zip(taken["ours"], taken["MATH"], strict=True))
    ours, theirs = (torch.stack(work()) for work in works.values())
    return row | {
        "of MATH's": row["ours MB"] / row["MATH MB"],
        "time to MATH's": statistics.median(ratios),
        "from": ratios[len(ratios) // 4],
        "to": ratios[-1 - len(ratios) // 4],
        "relative difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def exponent(lengths: Sequence[int], peaks: Sequence[float]) -> float:
    """The p of c L^p that fits the peaks, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (lengths, peaks))
    return statistics.linear_regression(x, y).slope


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How the peaks grow, in a sentence for each column of them."""
    lines = []
    for name in (TANGENT, GRADIENTS):
        for side in SIDES:
            held = {r["length"]: r[f"{side} MB"] for r in rows if r["pass"] == name and r.get(f"{side} MB")}
            if len(held) > 1:
                power, last = (exponent(list(x), list(x.values())) for x in (held, dict(list(held.items())[-2:])))
                lines.append(f"{name}, {side}: L^{power:.2f} from {min(held)} to {max(held)}, L^{last:.2f} at its end")
    return f"The peak beyond the inputs grows as: {'; '.join(lines)}." if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="of the sequences, separated by commas")
    parser.add_argument("--math-up-to", type=int, default=8192, help="the longest that MATH computes (default: 8192)")
    parser.add_argument("--heads", type=int, default=1, help="heads of attention (default: 1)")
    parser.add_argument("--width", type=int, default=64, help="of a head (default: 64)")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of the time of each side (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--out", "--json", type=Path, default=Path("attention.json"), help="a file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        lengths = whole_numbers("lengths", args.lengths)
        for name in ("heads", "width", "pairs"):
            if getattr(args, name) < 1:
                raise UserError(f"{name}: {getattr(args, name)} is not at least 1")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for gradients in (False, True):
        for length in lengths:
            both = length <= args.math_up_to and not gradients
            rows.append(measure(length, args.heads, args.width, args.pairs, both, gradients, args.seed))
    print(markdown_table(rows, COLUMNS))
    print(summary(rows))
    report = {
        "rows": rows,
        "columns": COLUMNS,
        "summary": summary(rows),
        "options": vars(args) | {"out": str(args.out)},
    }
    write_json(report | {"environment": environment()}, args.out)
    return 0


def whole_numbers(name: str, text: str) -> list[int]:
    """Those of an option, in ascending order; UserError where it has others."""
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UserError(f"{name}: {text!r} is no list of whole numbers from 1; use 64,128 say")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
