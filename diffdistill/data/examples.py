"""What every kind of data is to a training: `len` examples, read by index.

Images, encoded prompts and latents, noise-image pairs and class labels are all `Examples`, and so is any object with
`__len__` and `get`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.data.texts import note
from diffdistill.errors import UserError, shown
from diffdistill.scaffold.method import Pair


@dataclass(frozen=True)
class Example:
    """B examples. What a kind of data does not have is None or empty."""

    x0: Tensor | None = None
    """(B, ...) float, in the units of the teacher's samples: images in [-1, 1], or latents as the network takes them.
    `data.batches` brings them to unit variance."""
    cond: Cond = field(default_factory=dict)  #: conditions (B, ...) by the network's own argument names
    pair: Pair | None = None  #: noise and the image that the teacher makes of it, both of unit variance
    losers: Tensor | None = None  #: (B, ...) in the same units as x0, each worse than x0 under the same condition
    texts: tuple[str, ...] | None = None  #: the prompts that the conditions are of, where somebody reads them
    teacher_cond: Cond = field(default_factory=dict)  #: what the teacher sees in place of `cond`, where that is another


@runtime_checkable
class Examples(Protocol):
    """Data to train on."""

    def __len__(self) -> int: ...

    def get(self, indices: Tensor) -> Example:
        """The examples at int64 indices (B,) on the CPU, in that order."""
        ...


@runtime_checkable
class InBuckets(Examples, Protocol):
    """Data of several shapes: a training step takes samples of one of them (see data/buckets.py)."""

    @property
    def counts(self) -> Sequence[int]:
        """How many samples each bucket has, whose indices follow each other."""
        ...


@dataclass(frozen=True, eq=False)
class TensorExamples:
    """Samples (N, ...) that are held in memory, with or without conditions (N, ...)."""

    x0: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x0.ndim < 2 or not self.x0.is_floating_point():
            shape = f"{tuple(self.x0.shape)} of {self.x0.dtype}"
            raise UserError(f"data: a tensor {shape} holds no samples; give floats (N, ...), images in [-1, 1] say")
        for name, values in self.cond.items():
            if len(values) != len(self):
                raise UserError(
                    f"data: the condition {name!r} has {len(values)} entries for {len(self)} samples; give one for each"
                )

    def __len__(self) -> int:
        return len(self.x0)

    def get(self, indices: Tensor) -> Example:
        """The samples at int64 indices (B,), in that order."""
        return Example(self.x0[indices], {name: values[indices] for name, values in self.cond.items()})


@dataclass(frozen=True, eq=False)
class Preferred:
    """Pairs of samples of which one is better: row i of both has the same condition."""

    winners: Examples
    losers: Examples

    def __post_init__(self) -> None:
        if len(self.winners) != len(self.losers):
            raise UserError(
                f"losers: there are {len(self.losers)} for {len(self.winners)} that are better; row i of both is a pair"
            )
        rows = torch.arange(min(16, len(self.winners)))
        better, worse = self.winners.get(rows), self.losers.get(rows)
        if better.x0 is None or worse.x0 is None or better.x0.shape != worse.x0.shape:
            raise UserError("losers: they are no images of the same size as the better ones; give both alike")
        for name, value in better.cond.items():
            if name not in worse.cond or not torch.equal(value, worse.cond[name]):
                raise UserError(f"losers: their {name} differ from those of the better ones; row i of both is a pair")

    def __len__(self) -> int:
        return len(self.winners)

    def get(self, indices: Tensor) -> Example:
        """The pairs at int64 indices (B,), with the conditions of the better."""
        return replace(self.winners.get(indices), losers=self.losers.get(indices).x0)


@dataclass(frozen=True, eq=False)
class TwoViews:
    """Samples of which the teacher sees other conditions than the student: row i of both is the same sample."""

    student: Examples
    teacher: Examples

    def __post_init__(self) -> None:
        if len(self.student) != len(self.teacher):
            raise UserError(
                f"teacher_data: there are {len(self.teacher)} for {len(self.student)} samples; row i of both is one"
            )
        rows = torch.arange(min(16, len(self.student)))
        seen, by_teacher = self.student.get(rows), self.teacher.get(rows)
        if seen.x0 is None or by_teacher.x0 is None or not torch.equal(seen.x0, by_teacher.x0):
            raise UserError("teacher_data: its samples are not those of the data; give the same, row by row")
        shapes = [{name: tuple(value.shape) for name, value in each.cond.items()} for each in (seen, by_teacher)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"teacher_data: its conditions are {shown(shapes[1])}, and those of the data {shown(shapes[0])}"
            )
        if all(torch.equal(value, by_teacher.cond[name]) for name, value in seen.cond.items()):
            raise UserError("teacher_data: its conditions are those of the data; give what the teacher sees more in")

    def __len__(self) -> int:
        return len(self.student)

    def get(self, indices: Tensor) -> Example:
        """The samples at int64 indices (B,), with the conditions of both."""
        return replace(self.student.get(indices), teacher_cond=self.teacher.get(indices).cond)


@dataclass(frozen=True)
class ClassLabels:
    """The conditions of a training without data: an example for each class, or one without conditions."""

    num_classes: int | None

    def __len__(self) -> int:
        return self.num_classes or 1

    def get(self, indices: Tensor) -> Example:
        """Class i for index i."""
        return Example(cond={} if self.num_classes is None else {"class_labels": indices})

    def draw(self, n: int, generator: torch.Generator) -> Example:
        """n examples drawn uniformly and with replacement, on the generator's device."""
        return self.get(torch.randint(len(self), (n,), generator=generator, device=generator.device))


def as_examples(data: Tensor | Examples) -> Examples:
    """A tensor (N, ...) of samples as examples; examples as they are; UserError for anything else."""
    if isinstance(data, Tensor):
        return TensorExamples(data)
    if not isinstance(data, Examples):
        raise UserError(
            f"data: {type(data).__name__} is no data; give a tensor (N, C, H, W), or an object with __len__ and "
            "get(indices) -> Example"
        )
    return data


def check_classes(name: str, classes: int | None, known: int | None) -> None:
    """UserError if data `name` have more classes than the teacher knows; a note if they have fewer."""
    if classes is None or known is None:
        return
    if classes > known:
        raise UserError(f"data: {name} has {classes} classes; the teacher knows {known}")
    if classes < known:
        note(f"data: {name} has {classes} classes and the teacher {known}; label i is the teacher's class i")


def to_device(example: Example, device: torch.device) -> Example:
    """The same examples with every tensor on that device."""

    def moved(cond: Cond) -> Cond:
        return {name: value.to(device) for name, value in cond.items()}

    pair = example.pair
    return Example(
        None if example.x0 is None else example.x0.to(device),
        moved(example.cond),
        None if pair is None else Pair(pair.z.to(device), pair.x0.to(device), moved(pair.cond)),
        None if example.losers is None else example.losers.to(device),
        example.texts,
        moved(example.teacher_cond),
    )
