"""Benchmark: what each switch that takes less memory saves of a training, what it costs, and what a plan says of it.

    python -m diffdistill.eval.benchmarks.switches --out switches.md

DMD2 on a UNet of Stable Diffusion's shape with random weights, student and fake score both moving in every step. Each
row is a training in a process of its own, on a CPU: the peak is what it holds resident above what it held once
everything was imported, above what the same training of the embedded digits takes, and without what is offloaded, which
would be in another memory. A plan counts tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.eval.benchmarks.memory import NETWORKS, in_a_process, measured, prepare
from diffdistill.eval.benchmarks.plan import LORA, SMALL
from diffdistill.eval.plan import plan_of
from diffdistill.eval.report import publish
from diffdistill.training.assemble import make_game

COLUMNS = ("switches", "plan MB", "peak MB", "plan over peak", "peak to none", "time to none")
_GROUP: dict[str, Any] = {"offload": "group"}
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"accumulate": 2},
    {"offload": "optimizer"},
    {"offload": "model"},
    _GROUP,
    _GROUP | {"gradient_checkpointing": True},
    LORA,
    LORA | {"teacher_bits": 8},
    LORA | {"teacher_bits": 4},
    LORA | _GROUP | {"gradient_checkpointing": True},
)


def written(switches: dict[str, Any]) -> str:
    """As one types them."""
    flags = (f"--{name.replace('_', '-')}" + f" {value}" * (value is not True) for name, value in switches.items())
    return " ".join(flags) or "none"


def options_of(switches: dict[str, Any], root: Path) -> dict[str, Any]:
    """Of a training whose network lies in `root`; without one, of the digits."""
    if not (root / "teacher").is_dir():
        return SMALL | {name: value for name, value in switches.items() if name == "lora"}
    shared = {"method": "dmd2", "teacher": str(root / "teacher"), "prompts": str(root / "prompts")}
    return {**shared, "update_ratio": 1, "batch_size": 2, "sample_every": 0, **switches}


def taken(switches: dict[str, Any], root: Path, steps: int) -> dict[str, Any]:
    """What `measured` gives in a process of its own."""
    arguments = ["--one", json.dumps(switches), "--folder", str(root), "--steps", str(steps)]
    # What is freed goes back at once, as if it were not in the peak of what comes later.
    free = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    row: dict[str, Any] = in_a_process("switches", arguments, written(switches), **free)
    return row


def compare(steps: int) -> list[dict[str, Any]]:
    """A row for each."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, NETWORKS["mid"], 128, torch.float32)
        before = {"lora" in kind: taken(kind, root / "none", 2)["peak MB"] for kind in ({}, LORA)}
        first: tuple[float, float] | None = None
        for switches in SWITCHES:
            planned = plan_of(make_game(options_of(switches, root), weights=False)).peak / 2**20
            row = taken(switches, root, steps)
            peak, seconds = row["peak MB"] - before["lora" in switches], row["seconds a step"]
            first = first or (peak, seconds)
            values = (written(switches), planned, peak, planned / peak, peak / first[0], seconds / first[1])
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(*values, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="training steps that are measured (default: 3)")
    parser.add_argument("--out", help="a file that the table is written into, as Markdown")
    parser.add_argument("--json", help="a file that the rows are written into, as JSON")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.one is not None:
            torch.set_num_threads(1)
            print(json.dumps(measured(options_of(args.one, args.folder), args.folder, args.steps, "cpu")))
            return 0
        rows = compare(args.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    publish(rows, COLUMNS, args.out, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
