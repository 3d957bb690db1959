"""What a training step gets: conditions, data, pairs and noise, a function of seed, step and place in the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdistill.config import FitConfig
from diffdistill.core.denoiser import Cond, choose
from diffdistill.data.buckets import bucket_batch
from diffdistill.data.examples import (
    ClassLabels,
    Example,
    Examples,
    InBuckets,
    TensorExamples,
    check_classes,
    to_device,
)
from diffdistill.data.images import Data
from diffdistill.data.texts import note
from diffdistill.errors import UserError
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator, seed_for
from diffdistill.scaffold.method import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def batch_indices(n: int, batch_size: int, step: int, *, seed: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Which of n samples this rank sees at this step: int64 (batch_size,), a function of the arguments alone.

    Steps and ranks take turns along one endless row of shuffled epochs, so every epoch visits each sample
    once, a batch may straddle two epochs, and R ranks see what one rank sees with R times the batch.
    Raises UserError if batch_size is below 1 or all ranks together need more than n samples.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not a number of samples; use 1 or more")
    if batch_size * world_size > n:
        ranks = f" on each of {world_size} processes" if world_size > 1 else ""
        most = f"use at most {n // world_size}" if n >= world_size else "use fewer processes"
        raise UserError(f"batch_size {batch_size}{ranks} is larger than the data ({n} samples); {most}")
    epoch, first = divmod((step * world_size + rank) * batch_size, n)
    row = _epoch_order(n, seed, epoch)[first : first + batch_size]
    if len(row) == batch_size:
        return row.clone()  # a view would let the caller write into the cached epoch
    return torch.cat([row, _epoch_order(n, seed, epoch + 1)[: batch_size - len(row)]])


@lru_cache(maxsize=2)  # a batch straddles at most two epochs
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator("cpu", seed, epoch, "data order"))


def batches(
    config: FitConfig,
    teacher: Teacher,
    examples: Examples | None,
    accelerator: Accelerator,
    label_dropout: float = 0.0,
    pairs: Examples | None = None,
) -> Callable[[int], Batch]:
    """step -> Batch, the samples of this process: a function of (seed, step, place of the samples in the step) alone.

    R processes see what one sees with R times the batch.

    Examples come in shuffled epochs; without any, class labels are drawn uniformly. `pairs` are further examples with
    an order of their own, of which the batch takes the noise-image pairs. `label_dropout`: the share of samples whose
    condition becomes the teacher's "no class" or "no prompt". Raises UserError if there are fewer examples than a batch
    needs.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    device, size = accelerator.device, config.batch_size
    labels = ClassLabels(teacher.num_classes)
    if isinstance(examples, InBuckets):
        _check_buckets(examples.counts, size, rank, world)
    elif examples is not None:
        batch_indices(len(examples), size, 0, seed=config.seed, rank=rank, world_size=world)  # refuses now, not later

    def in_order(source: Examples, step: int, seed: int) -> Example:
        if isinstance(source, InBuckets):
            indices = bucket_batch(source.counts, size, step, seed=seed, rank=rank, world_size=world)
        else:
            indices = batch_indices(len(source), size, step, seed=seed, rank=rank, world_size=world)
        example = source.get(indices)
        _check_labels(teacher, example.cond)
        return to_device(example, device)

    def batch(step: int) -> Batch:
        samples = Batch(size, teacher.shape, {}, None, device, (config.seed, step, rank * size), total=size * world)
        if examples is None:
            example = labels.get(samples.integers(len(labels), "condition"))
        else:
            example = in_order(examples, step, config.seed)
        pair = example.pair
        if pairs is not None:
            # Not the order of the examples: pair i and image i have nothing to do with each other.
            pair = in_order(pairs, step, seed_for(config.seed, "pairs")).pair
        std = teacher.denoiser.schedule.data_std
        x0, losers = (None if part is None else part / std for part in (example.x0, example.losers))
        shape = tuple(x0.shape[1:]) if x0 is not None and isinstance(examples, InBuckets) else teacher.shape
        cond = _known(teacher, example.cond)
        if label_dropout:
            cond = _dropped(teacher, cond, samples.uniform("label dropout", torch.get_default_dtype()) < label_dropout)
        its = _known(teacher, example.teacher_cond) or None
        return replace(
            samples, cond=cond, x0=x0, pair=pair, shape=shape, texts=example.texts, losers=losers, teacher_cond=its
        )

    return batch


def _check_buckets(counts: Sequence[int], batch_size: int, rank: int, world: int) -> None:
    """UserError where no bucket has a batch; a note of those that have none."""
    bucket_batch(counts, batch_size, 0, seed=0, rank=rank, world_size=world)
    small = [count for count in counts if count < batch_size * world]
    if small and rank == 0:
        what = f"{len(small)} of {len(counts)} buckets ({sum(small)} of {sum(counts)} samples) have less than a batch"
        note(f"data: {what}, which is of one bucket, and are not trained on; a smaller batch_size reaches them")


def _check_labels(teacher: Teacher, cond: Cond) -> None:
    """UserError for a class label beyond those that the network reads: of a user's object the first says little."""
    labels = cond.get("class_labels")
    if teacher.num_classes is None or labels is None or labels.is_floating_point():
        return
    known = range(teacher.num_classes + (teacher.denoiser.null is not None))  # with that of "no class"
    low, high = int(labels.min()), int(labels.max())
    if low not in known or high not in known:
        wrong = low if low not in known else high
        raise UserError(f"data: a sample has the class {wrong}; the teacher's are 0 to {teacher.num_classes - 1}")


def _known(teacher: Teacher, cond: Cond) -> Cond:
    """The conditions without the class labels of data that a teacher without them is trained on."""
    if teacher.num_classes is not None or "class_labels" in teacher.example_cond:
        return cond
    return {name: value for name, value in cond.items() if name != "class_labels"}


def _dropped(teacher: Teacher, cond: Cond, drop: Tensor) -> Cond:
    """The conditions (B, ...) with those where `drop` (B,) is set replaced by the teacher's "no condition"."""
    null = teacher.denoiser.null
    if null is None or not cond:
        return cond
    return cond | choose(drop, null(cond), cond)


def check_data(teacher: Teacher, examples: Examples) -> None:
    """UserError unless shape, conditions and labels of the examples are those that the teacher takes.

    Of data that do not say them, the first example is looked at.
    """
    if not len(examples):
        raise UserError("data: there are no examples; give at least as many as a batch has")
    name, shape, classes = _described(examples)
    if shape is not None and shape != tuple(teacher.shape):
        raise UserError(f"data: {name} has samples of shape {shape}; the teacher's are {tuple(teacher.shape)}")
    if teacher.num_classes is not None:
        if classes is None:
            raise UserError(f"data: {name} has no labels and the teacher has {teacher.num_classes} classes")
        whole = isinstance(examples, Data | TensorExamples)  # of others the first example says but a lower bound
        check_classes(name, classes if whole else max(classes, teacher.num_classes), teacher.num_classes)
    else:
        _check_conditions(teacher, name, examples)


def _check_conditions(teacher: Teacher, name: str, examples: Examples) -> None:
    """UserError unless the conditions of the first example have those that a teacher without classes takes.

    Further ones may be its network's too, which is asked.
    """
    first = {} if isinstance(examples, Data) else examples.get(torch.zeros(1, dtype=torch.int64)).cond
    given, expected = _known(teacher, first), teacher.example_cond
    its = ", ".join(sorted(given)) or "nothing"
    if missing := expected.keys() - given.keys():
        raise UserError(f"data: of conditions {name} has {its}; the teacher takes {', '.join(sorted(missing))}")
    for key, value in expected.items():
        shapes = tuple(given[key].shape[1:]), tuple(value.shape[1:])
        if shapes[0] != shapes[1]:
            raise UserError(f"data: {name} has {key!r} of shape {shapes[0]} for a sample; the teacher's is {shapes[1]}")
    if given.keys() - expected.keys():
        replace(teacher, example_cond=given).check_call()


def _described(examples: Examples) -> tuple[str, tuple[int, ...] | None, int | None]:
    """What messages call the data, the shape of a sample and the number of classes, as far as there are any."""
    if isinstance(examples, Data):
        return repr(examples.name), tuple(examples.shape), examples.num_classes
    first = examples.get(torch.zeros(1, dtype=torch.int64))
    labels = (examples if isinstance(examples, TensorExamples) else first).cond.get("class_labels")
    shape = None if first.x0 is None else tuple(first.x0.shape[1:])
    return f"the {type(examples).__name__}", shape, None if labels is None else int(labels.max()) + 1
