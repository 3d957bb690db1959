"""A teacher's own samples in many steps, as the real images of a student of which no others are known."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.images import Data, Samples
from diffdistill.data.processes import Processes
from diffdistill.eval.choice import Choice
from diffdistill.eval.ladder import ladder_models
from diffdistill.eval.measurements import make_measurements, prepared
from diffdistill.eval.models import ModelLike, SamplingOptions
from diffdistill.eval.protocol import digest
from diffdistill.files import cache_folder
from diffdistill.players.teacher import Teacher

STEPS = 50
SEED = 999  # no image that is judged begins from the same noise
LEAST = 200  # which 25 components can be had of


def own_samples(
    model: ModelLike, choice: Choice, sampling: SamplingOptions, processes: Processes,
    teacher: str | os.PathLike[str] | Teacher | None = None,
) -> Data:  # fmt: skip
    """As many as are judged, and 200 at least, of classes in turn; guided as the student was trained.

    Of a text-to-image model just as many, for the same captions.

    They are kept in the cache by all that they depend on. `teacher`: of a student, in place of its own. UserError where
    the teacher cannot be had.
    """
    protocol = choice.protocol
    drawn = ladder_models(model, sampling, teacher, (STEPS,), protocol)[0]
    count = max(protocol.count, LEAST) if choice.captions is None else protocol.count
    labels = torch.arange(count) % drawn.classes if drawn.conditions == "classes" and drawn.classes else None
    settings = {
        "fingerprint": drawn.fingerprint,
        "call": drawn.call,
        "count": count,
        "shard_size": protocol.shard,
        "batch": protocol.batch,
        "seed": SEED,
        "shape": list(protocol.shape),
        "captions": None if choice.captions is None else digest(choice.captions),
        **({} if choice.conditions is None else {"conditions": choice.conditions.fingerprint}),
        "device": processes.device.type,
        **({} if sampling.attention == "auto" else {"attention": sampling.attention}),
    }

    def produce(indices: range) -> dict[str, Tensor]:
        captions = None if choice.captions is None else [choice.captions[i] for i in indices]
        changed = choice.conditions
        pictures = (
            None if changed is None else changed.get(torch.tensor([i % len(changed) for i in indices])).conditions
        )
        images = drawn.draw(indices, SEED, None if labels is None else labels[list(indices)], captions, pictures)
        return {"images": prepared(images, protocol, drawn.name).contiguous()}

    folder = cache_folder() / "samples" / digest(settings)
    folder.mkdir(parents=True, exist_ok=True)
    made = make_measurements(folder, settings, {"model": drawn.name}, protocol.batch, produce, processes)
    images = made.column("images").all()

    def read(rows: list[int]) -> Any:
        return Samples(images[rows].float() / 127.5 - 1, {} if labels is None else {"class_labels": labels[rows]})

    name = f"samples of the teacher in {STEPS} steps (seed {SEED})"
    return Data(name, protocol.shape, drawn.classes, digest(settings), count, read)
