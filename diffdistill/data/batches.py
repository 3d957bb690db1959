"""What a training step gets: conditions, data, pairs and noise, each a function of seed, step and rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdistill.config import FitConfig
from diffdistill.data.encoded import Encoded
from diffdistill.data.images import Data
from diffdistill.data.pairs import Pairs
from diffdistill.errors import UserError
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator, seed_for
from diffdistill.scaffold.method import Batch, Pair

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
    data: Data | None,
    accelerator: Accelerator,
    label_dropout: float = 0.0,
    pairs: Pairs | None = None,
) -> Callable[[int], Batch]:
    """step -> Batch: a function of (seed, step, rank) alone. Without data, conditions are drawn uniformly."""
    rank, world = accelerator.process_index, accelerator.num_processes
    device, size = accelerator.device, config.batch_size
    known = data if data is not None else teacher.conditions
    if isinstance(known, Data | Encoded):
        batch_indices(len(known), size, 0, seed=config.seed, rank=rank, world_size=world)  # refuses now, not later

    def pair_at(step: int) -> Pair | None:
        if pairs is None:
            return None
        # Not the data's order: pair i and image i have nothing to do with each other.
        seed = seed_for(config.seed, "pairs")
        got = pairs.get(batch_indices(len(pairs), size, step, seed=seed, rank=rank, world_size=world))
        return Pair(got.z.to(device), got.x0.to(device), {k: v.to(device) for k, v in got.cond.items()})

    def batch(step: int) -> Batch:
        key = (config.seed, step, rank)
        if isinstance(teacher.conditions, Encoded):
            encoded = teacher.conditions
            order = batch_indices(len(encoded), size, step, seed=config.seed, rank=rank, world_size=world)
            x0, cond = encoded.get(order)
            cond = {name: value.to(device) for name, value in cond.items()}
            return Batch(size, teacher.shape, cond, None if x0 is None else x0.to(device), device, key, pair_at(step))
        if data is None:
            cond = teacher.random_cond(size, generator(device, *key, "condition"))
            return Batch(size, teacher.shape, cond, None, device, key, pair_at(step))
        got = data.get(batch_indices(len(data), size, step, seed=config.seed, rank=rank, world_size=world))
        x0 = got.images.to(device) / teacher.denoiser.schedule.data_std
        cond = {}
        if teacher.num_classes is not None and got.labels is not None:
            labels = got.labels.to(device)
            if label_dropout and teacher.denoiser.null is not None:
                drop = torch.rand(size, generator=generator(device, *key, "label dropout"), device=device)
                null = teacher.denoiser.null({"class_labels": labels})["class_labels"]
                labels = torch.where(drop < label_dropout, null, labels)
            cond = {"class_labels": labels}
        return Batch(size, teacher.shape, cond, x0, device, key, pair_at(step))

    return batch


def check_data(teacher: Teacher, data: Data) -> None:
    """UserError unless the data's shape and labels are the teacher's."""
    if tuple(data.shape) != tuple(teacher.shape):
        raise UserError(
            f"data: {data.name!r} has samples of shape {tuple(data.shape)}; the teacher's are {tuple(teacher.shape)}"
        )
    if teacher.num_classes is not None:
        if data.num_classes is None:
            raise UserError(f"data: {data.name!r} has no labels and the teacher has {teacher.num_classes} classes")
        if data.num_classes > teacher.num_classes:
            raise UserError(
                f"data: {data.name!r} has {data.num_classes} classes; the teacher knows {teacher.num_classes}"
            )
