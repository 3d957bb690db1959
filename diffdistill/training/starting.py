"""A student that begins as another student, not as the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffdistill.config import TrainConfig
from diffdistill.errors import UserError, shown
from diffdistill.families import StudentRecord, load_teacher, record_of
from diffdistill.players.teacher import Teacher
from diffdistill.training.recipe import Recipe


def with_start(config: TrainConfig, teacher: Teacher) -> Teacher:
    """The teacher with the student that its own begins as; UserError for one of another kind."""
    assert config.start is not None
    if "student" in teacher.lora:
        raise UserError("start: a LoRA student begins as the teacher, whose layers it is on; leave out --lora student")
    size: dict[str, Any] = {"resolution": config.resolution, "frames": config.frames}
    student, record = load_teacher(config.start, null_class=config.null_class, **size), record_of(config.start)
    if (student.family, student.shape, student.num_classes) != (teacher.family, teacher.shape, teacher.num_classes):
        raise UserError(f"start: {shown(config.start)} is of another kind than the teacher; give a student of it")
    of_student: dict[str, Any] = (
        {"levels": record.levels, "move": record.move} if isinstance(record, StudentRecord) else {}
    )
    if teacher.denoiser.null is not None and student.denoiser.null is None:
        student.denoiser.null = teacher.denoiser.null
    return dataclasses.replace(teacher, student=student.denoiser, **of_student)


def levels_of_start(values: Mapping[str, Any], teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    """The option that says the levels of the student that is begun as, where no option does."""
    names, levels = {f.name for f in dataclasses.fields(recipe.config)}, teacher.levels
    if not levels or {"levels", "student_steps", "student_level"} & set(values):
        return {}
    if "levels" in names:
        return {"levels": levels}
    return {"student_level": levels[0]} if "student_level" in names and len(levels) == 1 else {}
