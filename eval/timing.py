"""Draws of models in turn, timed: seconds, network passes, GPU memory, with and without torch.compile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffdistill.errors import UserError, first_line
from diffdistill.options import Size

WARM_UP = 2


@dataclass(frozen=True)
class SpeedOptions:
    """What is measured; `resolutions` None is each model's own."""

    batch_sizes: Sequence[int] = (1, 4)
    resolutions: Sequence[Size | None] = (None,)
    teacher: str | None = None
    teacher_steps: int | None = None
    guidance_scale: float | None = None  #: of teachers, in the normal form: 1 is none
    attention: str = "auto"
    compiled: bool = False
    repeats: int = 20
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0  #: of the noise
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Subject:
    """A model that is loaded: `draw(batch, size)` gives images (B, ..., H, W, C)."""

    name: str
    steps: int | None
    scale: float
    against: int | None
    parts: Any  #: the pipeline, or the network of a pixel model
    networks: list[nn.Module]  #: whose passes are counted, and which are compiled
    draw: Callable[[int, Size | None], Any]
    weights_mb: float | None  #: on a GPU


@dataclass
class TimedRun:
    """A subject at one batch and resolution, eager or compiled; `seconds` stays empty where memory did not suffice."""

    subject: Subject
    place: int  #: of the subject
    compiled: list[Callable[..., Any]] | None = None  #: calls of its networks
    passes: float | None = None
    pixels: str | None = None
    peak_mb: float | None = None
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    out_of_memory: bool = False


def measure_runs(
    subjects: Sequence[Subject], batch: int, resolution: Size | None, options: SpeedOptions
) -> list[TimedRun]:
    """Every subject, eager and, if the options say so, compiled: warmed up, then timed in turn."""
    with ExitStack() as stack:
        if options.compiled:
            torch.compiler.reset()  # what other sizes have compiled counts against a limit
            # Beyond the limit torch would run eagerly without a word.
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True))
        runs: list[TimedRun] = []
        for place, subject in enumerate(subjects):
            for compiled in (False, True) if options.compiled else (False,):
                run = TimedRun(subject, place, _compile(subject.networks) if compiled else None)
                _warm_up(run, batch, resolution, options)
                runs.append(run)
        for repeat in range(options.repeats):
            first = repeat % len(runs)
            for run in runs[first:] + runs[:first]:
                if not run.out_of_memory:
                    with _guarded(run, batch, resolution, options):
                        run.seconds.append(_seconds(run, batch, resolution, options))
    return runs


def _compile(networks: Sequence[nn.Module]) -> list[Callable[..., Any]]:
    """The compiled calls of the networks, which stay as they are."""
    calls = []
    for network in networks:
        network.compile(dynamic=False)
        assert network._compiled_call_impl is not None
        calls.append(network._compiled_call_impl)
        network._compiled_call_impl = None
    return calls


def _warm_up(run: TimedRun, batch: int, resolution: Size | None, options: SpeedOptions) -> None:
    taken, before = [], _graphs()
    with _guarded(run, batch, resolution, options):
        with _counting(run, batch) if run.compiled is None else ExitStack():
            taken.append(_seconds(run, batch, resolution, options))
        compiled = _graphs() > before
        taken += [_seconds(run, batch, resolution, options) for _ in range(WARM_UP - 1)]
        if compiled:
            run.compile_seconds = max(taken[0] - taken[-1], 0.0)


def _graphs() -> int:
    """What torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def _guarded(run: TimedRun, batch: int, resolution: Size | None, options: SpeedOptions) -> Iterator[None]:
    """What a draw raises as one line; with too little memory on a GPU the run has no figures."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        run.out_of_memory, run.peak_mb = True, None
        run.seconds.clear()
        torch.cuda.empty_cache()
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = first_line(error)
        size = "" if resolution is None else f" of {resolution} pixels"
        how = f"{options.dtype}{', compiled' if run.compiled else ''}"
        raise UserError(f"speed: {run.subject.name} does not draw {batch} images{size} in {how} ({reason})") from error


@contextmanager
def _counting(run: TimedRun, batch: int) -> Iterator[None]:
    """Counts the passes of the subject's networks for an image: calls, by how many samples each takes."""
    if not run.subject.networks:
        yield
        return
    samples = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal samples
        samples += len((*args, *kwargs.values())[0])  # (B, ...), or a list of B

    with ExitStack() as stack:
        for network in run.subject.networks:
            stack.callback(network.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield
    run.passes = samples / batch


def _seconds(run: TimedRun, batch: int, resolution: Size | None, options: SpeedOptions) -> float:
    """Seconds of one draw, and into the run the most memory and the size of the images."""
    networks, gpu = run.subject.networks, options.device.type == "cuda"
    for network, call in zip(networks, run.compiled or (), strict=run.compiled is not None):
        network._compiled_call_impl = call
    held = allocated_mb(options.device)
    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            images = run.subject.draw(batch, resolution)
            last.record()
            torch.cuda.synchronize()
            seconds = first.elapsed_time(last) / 1000
        else:
            started = time.perf_counter()
            images = run.subject.draw(batch, resolution)
            seconds = time.perf_counter() - started
    finally:
        for network in networks:
            network._compiled_call_impl = None
    if held is not None and run.subject.weights_mb is not None:
        peak = run.subject.weights_mb + torch.cuda.max_memory_allocated() / 2**20 - held
        run.peak_mb = max(peak, run.peak_mb or 0.0)
    frames = f"{images.shape[1]} x " if images.ndim == 5 else ""
    run.pixels = f"{frames}{images.shape[-3]}x{images.shape[-2]}"
    return seconds


def allocated_mb(device: torch.device) -> float | None:
    """Of a GPU."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else None


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest rank: the least of the values that at least q of them do not exceed."""
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1]
