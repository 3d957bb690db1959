"""Benchmark: what a run takes beside its training, and what a second process gives.

    python -m diffdistill.eval.benchmarks.running --out running.json

A training with the defaults is timed where it steps, draws its figures and writes its checkpoints: what they take
beside the steps between them, where figures come as often as by default and a checkpoint every five minutes. Then the
same training runs in one process and in two, with one thread and as many samples each, in turns: how many times as many
samples a second the two take.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffdistill.data.batches import batches
from diffdistill.environment import alone, environment
from diffdistill.eval.report import markdown_table, write_json
from diffdistill.training.assemble import data_for, load_run
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.figures import Figures, usual_interval
from diffdistill.training.looks import Look
from diffdistill.training.metrics import metrics_lines
from diffdistill.training.trainer import Trainer, accelerator_for

COLUMNS = ("method", "what", "seconds", "against", "their seconds", "ratio")
BETWEEN_CHECKPOINTS = 300.0  # seconds
BESIDE = {"sample_every": 0, "figures_every": 0, "keep_checkpoints": 1}
"""Options of trainings of which the steps alone are timed."""


def teacher(widths: Sequence[int], layers: int, out: Path) -> Path:
    """The folder of an untrained network on 8x8 images."""
    shape = ["--widths", ",".join(map(str, widths)), "--layers", str(layers), "--attention", str(len(widths) - 1)]
    short = ["--data", "digits", "--steps", "1", "--batch-size", "2", "--sample-every", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "diffdistill", "teacher", *shape, *short, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=alone())
    return out / "teacher"


def costs(method: str, folder: Path, batch: int, steps: int, out: Path) -> list[dict[str, Any]]:
    """What figures and checkpoints take beside the steps of a training, in turns with them."""
    short = {"batch_size": batch, "steps": steps, **BESIDE}
    _train(1, _options(method, folder, short | {"max_hours": 1e-9}), out / "run", ends=(75,))
    game, _ = load_run(out / "run")
    accelerator = accelerator_for(game.config, out)
    draw = batches(game.config, game.teacher, data_for(game), accelerator)
    trainer = Trainer(game.method, draw, game.config, out / "again", accelerator)
    look = Look(game.teacher, game.method.sampler())
    every = usual_interval(look, game.method, batch, game.config.log_every)
    figures = Figures(look, game.method, every)
    stepped, drawn, saved = [], [], []
    for k in range(steps):
        stepped.append(_timed(trainer.iteration))
        if k % 10 == 9:
            with trainer.evaluating():
                drawn.append(_timed(partial(figures, trainer)))
            saved.append(_timed(trainer.save))
    step, figure, save = (statistics.median(taken) for taken in (stepped, drawn, saved))
    size = sum(file.stat().st_size for file in checkpoints(out / "again" / "checkpoints")[-1].iterdir()) >> 20
    return [
        _row(method, "figures", figure, f"{every} steps of {batch} samples", every * step),
        _row(method, f"a checkpoint of {size} MiB", save, "5 minutes", BETWEEN_CHECKPOINTS),
    ]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _row(method: str, what: str, seconds: float, against: str, theirs: float) -> dict[str, Any]:
    values = (method, what, seconds, against, theirs, seconds / theirs)
    return dict(zip(COLUMNS, values, strict=True))


def _options(method: str, folder: Path, more: Mapping[str, object]) -> list[str]:
    given = {"method": method, "teacher": folder, "data": "digits", "threads": 1, "device": "cpu", **more}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def _train(processes: int, options: Sequence[str], run: Path, ends: Sequence[int] = (0,)) -> None:
    """A training by that many processes, each with one thread."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    command = [sys.executable, "-m", "diffdistill", "train", *options, "--out", str(run)]
    started = [
        subprocess.Popen(
            command,
            env=alone() | group | {"MASTER_PORT": str(port), "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in map(str, range(processes))
    ]
    for process in started:
        errors = process.communicate()[1]
        if process.returncode not in ends:
            raise SystemExit(f"running: {' '.join(command[3:])} failed ({errors.strip().splitlines()[-1:]})")


def seconds_per_step(processes: int, options: Sequence[str], run: Path) -> float:
    """Of a training by that many processes, after its first tenth."""
    _train(processes, options, run)
    lines = [
        (values["step"], values["step"] * values["seconds_per_step"])
        for _, values in metrics_lines(run / "metrics.jsonl")
    ]
    (first, before), (last, after) = lines[0], lines[-1]
    return (after - before) / (last - first)


def gain(method: str, folder: Path, batch: int, steps: int, rounds: int, out: Path) -> dict[str, Any]:
    """Samples a second of two processes over those of one."""
    more = {"batch_size": batch, "steps": steps, "log_every": max(1, steps // 10), **BESIDE}
    options = _options(method, folder, more)
    taken: dict[int, list[float]] = {1: [], 2: []}
    for k in range(rounds):
        for n, seconds in taken.items():
            seconds.append(seconds_per_step(n, options, out / f"{n}-{k}"))
    one, two = (statistics.median(taken[n]) for n in (1, 2))
    row = _row(method, f"a step of {batch} samples", one, f"of 2 x {batch} in two processes", two)
    return row | {"ratio": statistics.median(2 * a / b for a, b in zip(taken[1], taken[2], strict=True))}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", default="dmd2,consistency", help="methods to time (default: dmd2,consistency)")
    parser.add_argument("--widths", default="128,256", help="channels of the network (default: 128,256)")
    parser.add_argument("--layers", type=int, default=2, help="its layers at each resolution (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (default: 60)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="pairs of trainings in one and two processes (default: 3)"
    )
    parser.add_argument("--out", "--json", type=Path, default=Path("running.json"), help="a file for the rows")
    args = parser.parse_args(argv)
    if args.steps < 10:
        parser.error(f"steps: {args.steps} is not at least 10")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        folder = teacher([int(w) for w in args.widths.split(",")], args.layers, made / "teacher")
        for method in args.methods.split(","):
            rows += costs(method, folder, args.batch_size, args.steps, made / method)
            if len(os.sched_getaffinity(0)) > 1 and args.rounds:
                rows.append(gain(method, folder, args.batch_size, args.steps, args.rounds, made / method))
    print(markdown_table(rows, COLUMNS))
    options = vars(args) | {"out": str(args.out)}
    write_json({"rows": rows, "columns": COLUMNS, "options": options, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
