"""How long an image takes under a protocol, end to end; `speed` measures more."""

from __future__ import annotations

import statistics
import time

import torch

from diffdistill.eval.image_folder import Model
from diffdistill.eval.judge import Judge

TIMED = 5


def latency(model: Model, judge: Judge) -> float | None:
    """Milliseconds an image of the protocol's batch, drawn end to end; the median of some, after one to warm up.

    None of a folder of images.
    """
    if model.conditions == "images":
        return None
    protocol = judge.protocol
    indices = range(min(protocol.batch, protocol.count))
    conditions = judge.conditions(judge.labels(model), indices)
    seconds = []
    with torch.inference_mode():
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            model.draw(indices, protocol.seed, *conditions)
            seconds.append(time.perf_counter() - started)  # the images have come to the CPU: nothing is pending
    return 1000 * statistics.median(seconds[1:]) / len(indices)


def latency_note(judge: Judge) -> str:
    """What the column of milliseconds means."""
    batch = min(judge.protocol.batch, judge.protocol.count)
    return f"ms per image: median of {TIMED} batches of {batch} on {judge.device.type}, text and decoding included"
