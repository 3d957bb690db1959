"""The trainings of a scoreboard, each in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffdistill.core.schedule import student_levels
from diffdistill.environment import alone
from diffdistill.errors import UserError
from diffdistill.eval.budget import Entry
from diffdistill.eval.report import write_json
from diffdistill.eval.suites import Suite
from diffdistill.players.sampler import Sampler
from diffdistill.training.assemble import load_run
from diffdistill.training.checkpoint import checkpoints
from diffdistill.training.metrics import metrics_lines

SHOWN_STEPS = (1, 2, 4)


def train(entry: Entry, suite: Suite, values: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train (or resume) in a process of its own; seconds and peak memory are kept beside the run."""
    run, note, given = (out / f"{entry.folder}{ending}" for ending in ("", ".json", ".options.json"))
    before = json.loads(note.read_text()) if note.exists() else {"seconds": 0.0, "peak_mb": 0.0}
    if given.exists():  # as a preset writes them, not as the run's config.yaml has read them
        made = json.loads(given.read_text())
        for name, value in json.loads(json.dumps(values)).items():
            if made.get(name) != value:
                was = f"{name} {made.get(name)!r}, not {value!r}"
                raise UserError(f"out: {str(run)!r} was made with {was}; choose another --out")
    if before.get("done"):
        return before
    command = [sys.executable, "-m", "diffdistill.commands.cli", "train"]
    if (run / "config.yaml").exists():
        command += ["--resume", str(run)]
    else:
        keep = {"sample_every": 0, "keep_checkpoints": 100, "out": str(run)}
        stage = [values[name] for name in suite.method(entry.info.name).scales]
        keep["checkpoint_every"] = stage[-1] if stage else 0
        command += ["--config", str(write_json(values | keep, given))]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=alone())
    assert child.stderr is not None
    errors = child.stderr.read()
    child.wait()
    after = {
        "seconds": before["seconds"] + time.perf_counter() - started,
        "peak_mb": max(before["peak_mb"], *_peaks(run / "metrics.jsonl")),
        "done": child.returncode == 0,
    }
    write_json(after, note)
    if child.returncode:
        last = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {child.returncode}"
        raise UserError(f"bench: {entry.folder} failed ({last})")
    return after


def _peaks(metrics: Path) -> list[float]:
    """Of the processes that have trained so far."""
    lines = metrics_lines(metrics) if metrics.exists() else ()
    return [float(values.get("peak_memory_mb", 0.0)) for _, values in lines] or [0.0]


def students(entry: Entry, suite: Suite, out: Path, device: torch.device) -> Iterator[Sampler]:
    """The samplers of a run, one for each number of steps that it can make."""
    run = out / entry.folder
    last: dict[int, int] = {}
    for path in checkpoints(run / "checkpoints"):
        step = int(path.name.split("-")[1])
        last[len(load_run(run, step)[0].method.sampler().levels)] = step
    for step in last.values():
        sampler = load_run(run, step)[0].method.sampler()
        sampler.denoiser.to(device)
        yield sampler
        if suite.method(entry.info.name).any_steps:
            schedule = sampler.denoiser.schedule
            for n in SHOWN_STEPS:
                if n not in last:  # which another stage's student makes, and was trained for
                    yield Sampler(sampler.denoiser, student_levels(schedule, n).tolist(), sampler.step)
