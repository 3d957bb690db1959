"""`diffdistill watch`: the curves of a run in a terminal, as its files have them."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffdistill.config import WatchConfig, run_options
from diffdistill.errors import UserError, one_line, shown
from diffdistill.training.lock import trainer_of
from diffdistill.training.metrics import metrics_lines

BARS, PLAIN = "▁▂▃▄▅▆▇█", "_.:-=+*#"
LEAST_WIDTH, MOST_WARNINGS = 60, 6
_CLEAR = "\x1b[H\x1b[2J"
_ABOUT = {"step", "seconds_per_step", "peak_memory_mb", "warnings", "judge/best step"}


def run(config: WatchConfig) -> int:
    """The command: draws the run until its training is done, or once."""
    folder = Path(config.run)
    bars = BARS if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else PLAIN
    clears = sys.stdout.isatty() and not config.once
    try:
        while True:
            width = max(LEAST_WIDTH, shutil.get_terminal_size().columns)
            lines, done = view(folder, width, bars, config.only)
            print((_CLEAR if clears else "") + "\n".join(lines), flush=True)
            if config.once or done:
                return 0
            time.sleep(config.refresh)
    except KeyboardInterrupt:  # the way to end it
        return 0


def view(run: Path, width: int, bars: str = BARS, only: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What is drawn of a run, line by line, and whether its training is done.

    `only` are beginnings of the names of curves. UserError for a folder that is no run, or where no curve is so named.
    """
    options = run_options(run)
    path = run / "metrics.jsonl"
    lines = [values for _, values in metrics_lines(path)] if path.is_file() else []
    steps = options.get("steps")
    step = max((line["step"] for line in lines), default=0)
    curves = curves_of(lines)
    if only and lines:
        chosen = {name: curve for name, curve in curves.items() if name.startswith(tuple(only))}
        if not chosen:
            raise UserError(f"only: no curve begins with {' or '.join(map(shown, only))}; they are {', '.join(curves)}")
        curves = chosen
    drawn = [_clip(line, width) for line in _head(run, options, lines, step)]
    if not lines:
        drawn.append("there is no line in its metrics.jsonl yet")
    drawn += [_clip(line, width) for line in _rows(curves, width, bars)]
    if warnings := warnings_of(run, lines):
        drawn += ["", "warnings:"]
        for text in warnings[-MOST_WARNINGS:]:
            drawn += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return drawn, isinstance(steps, int) and step >= steps


def curves_of(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The finite values of each curve by name, in the order of the lines."""
    curves: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _ABOUT and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append(float(value))
    return dict(sorted(curves.items(), key=lambda item: item[0].split("/")[0]))


def warnings_of(run: Path, lines: Sequence[dict[str, Any]]) -> list[str]:
    """Those of the lines and of the looks at the student, by step."""
    pairs = [(line["step"], text) for line in lines for text in _texts(line.get("warnings"))]
    looks = run / "looks.jsonl"
    for _, look in metrics_lines(looks) if looks.is_file() else ():
        pairs += [(look["step"], text) for text in _texts(look.get("faults"))]
    return [one_line(f"step {step}: {text}") for step, text in sorted(dict.fromkeys(pairs))]


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """A curve in one line of at most `width` characters, each the mean of as many values."""
    if len(values) > width:
        edges = [len(values) * k // width for k in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in values)


def _head(run: Path, options: dict[str, Any], lines: Sequence[dict[str, Any]], step: int) -> Iterator[str]:
    of = [str(options[name]) for name in ("method", "teacher", "architecture", "data") if options.get(name)]
    yield f"{run}: {', '.join(of)}"
    steps = options.get("steps")
    at = f"step {step}"
    if isinstance(steps, int) and steps > 0:
        at += f" of {steps} ({step / steps:.0%})"
    timed = [line for line in lines if isinstance(line.get("seconds_per_step"), int | float)]
    if timed:
        seconds = float(timed[-1]["seconds_per_step"])
        at += f", {seconds:.3g} s a step"
        if isinstance(steps, int) and step < steps:
            at += f", {_duration(seconds * (steps - step))} left"
        if isinstance(timed[-1].get("peak_memory_mb"), int | float):
            at += f", {timed[-1]['peak_memory_mb']:.0f} MiB at most"
    yield at
    holder = trainer_of(run)
    yield f"trained by {holder}" if holder else "no process trains it now"
    judged = [line["judge/best step"] for line in lines if line.get("judge/best step")]
    if judged:
        yield f"judged best at step {judged[-1]}"
    yield ""


def _rows(curves: dict[str, list[float]], width: int, bars: str) -> Iterator[str]:
    """Name, last value, curve, and between what it lies."""
    names = max(map(len, curves), default=0)
    room = max(8, min(60, width - names - 36))
    for name, values in curves.items():
        line = sparkline(values, room, bars)
        yield f"{name:{names}} {values[-1]:>10.4g}  {line:{room}}  {min(values):.3g} .. {max(values):.3g}"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
