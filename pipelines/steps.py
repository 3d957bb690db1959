"""The other numbers of steps that an exported folder serves, of a student that takes the time to jump to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.pipelines.schedulers import Row, level_arguments, scheduler_config, student_rows, student_scheduler
from diffdistill.pipelines.shipped.student_pipeline import STEPS_FILE
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Method

EQUAL = (*range(1, 17), 20, 25, 32, 40, 50, 64)
"""Numbers of equal jumps, which a folder has a bias for."""
UNEQUAL = range(1, 9)
"""Numbers of jumps of several lengths, which a folder has a matrix of that rank for."""


@dataclass(frozen=True)
class OtherSteps:
    """By number of steps: what differs in the scheduler's config, and what is added to layers of the network."""

    schedulers: dict[int, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[int, list[Row]] = field(default_factory=dict)  #: of `student_rows`, of the student's own number too

    def write(self, folder: Path) -> None:
        """The tensors, into a folder that is always loaded whole."""
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / STEPS_FILE)


def other_steps(method: Method, teacher: Teacher) -> OtherSteps:
    """Those that the method can be sampled in and its folder's scheduler can take; none of a student of one time.

    The method's own number of steps is as it was, after it.
    """
    sampler = method.sampler()
    own, others = len(sampler.levels), OtherSteps()
    if rows := student_rows(teacher, sampler):
        others.rows[own] = rows
    if not sampler.two_times:
        return others
    config = scheduler_config(student_scheduler(teacher, sampler))

    def changes(sampler: Sampler) -> dict[str, Any]:
        return sampler.changes(teacher.shape, teacher.sample_cond(len(sampler.levels)))

    here = changes(sampler)
    for steps in EQUAL:
        if steps == own:
            continue
        try:
            method.in_steps(steps)
            there = method.sampler()
            scheduler, rows = scheduler_config(student_scheduler(teacher, there)), student_rows(teacher, there)
            if own in others.rows and steps == 1:  # by the same scheduler
                scheduler, rows = config, [(there.levels[0], 0.0, 1.0, 0.0)]
        except UserError:  # not trained, or no scheduler takes so many
            continue
        if not there.equal_jumps and steps not in UNEQUAL:
            continue
        if level_arguments(teacher, there):  # which the call would have to hand over
            continue
        if rows:
            others.rows[steps] = rows
        same_class = scheduler["_class_name"] == config["_class_name"]
        kept = config if same_class else {}
        others.schedulers[steps] = {
            name: value for name, value in scheduler.items() if name not in kept or kept[name] != value
        }
        for layer, change in changes(there).items():
            for name, value in change.after(here[layer])._asdict().items():
                if value.numel():
                    others.tensors[f"{steps}/{layer}/{name}"] = value
    method.in_steps(own)
    return others
