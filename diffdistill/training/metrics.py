"""metrics.jsonl: what a training logs, one object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffdistill.data.progress import Pace, rate_and_rest
from diffdistill.files import atomic_write, json_of


class MetricsFile:
    """metrics.jsonl, one object a line. On a resume, lines after the checkpoint are dropped first.

    `warn` gives the warnings that a line is a reason for; it sees those that are there already first.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[dict[str, Any]], list[str]] | None = None):
        self.path, self.warn = path, warn
        if path.exists():
            # Of step 0 there is only what is written once more.
            kept = [line for line, values in metrics_lines(path) if 0 <= values["step"] <= step and step > 0]
            atomic_write(path, b"".join(line + b"\n" for line in kept))
            for _, values in metrics_lines(path):
                if warn:
                    warn(values)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line of JSON, with its warnings, which are printed too."""
        warnings = self.warn(values) if self.warn else []
        for warning in warnings:
            print(f"warning: step {values['step']}: {warning}", file=sys.stderr)
        if warnings:
            values = {**values, "warnings": warnings}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def metrics_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl with their values; what a crash or an editor has made of a line is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            values = json_of(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values


def show(bar: tqdm, means: dict[str, float], step: int, steps: int, every: int, seconds: float, pace: Pace) -> None:
    """The losses of a line on the bar; without a terminal there is no bar, and lines say where the run is.

    They come at each tenth of the run, and where that is slow as `pace` says. `every` is how many steps lie between two
    lines of metrics.jsonl, and `seconds` those of a step.
    """
    # What is minimised says little (the gradient injection has no meaning as a number) where a method logs something
    # that does.
    named = {k.split("/")[0] for k in means if not k.endswith(("/loss", "/grad_norm"))}
    hidden = {f"{player}/loss" for player in named}
    shown = {k: f"{v:.3g}" for k, v in means.items() if not k.endswith("/grad_norm") and k not in hidden}
    bar.set_postfix(shown)
    if bar.disable and pace.late((step * 10 // steps) != ((step - every) * 10 // steps)):
        show_step(step, steps, seconds, "  ".join(f"{k} {v}" for k, v in shown.items()))


def show_step(step: int, steps: int, seconds: float, losses: str = "") -> None:
    """A line of a log: where the run is, how fast, what is left of it, and losses if there are any."""
    print(f"step {step}/{steps}  {rate_and_rest(1 / seconds, steps - step, 'it')}  {losses}".rstrip(), flush=True)
