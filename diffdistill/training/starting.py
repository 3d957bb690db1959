"""A student that begins as another student, or as a network of another size, not as the teacher."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from diffdistill.config import TrainConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import Schedule
from diffdistill.errors import UserError, first_line, shown
from diffdistill.families import StudentRecord, load_teacher, record_of
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.training.recipe import Recipe


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """What is wrong with a folder is said of that option, and not of the teacher."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("teacher: "):
            raise
        raise UserError(f"{option}: {text.removeprefix('teacher: ')}") from None


def with_start(config: TrainConfig, teacher: Teacher) -> Teacher:
    """The teacher with the student that its own begins as; UserError for one of another kind."""
    assert config.start is not None
    if "student" in teacher.lora:
        raise UserError("start: a LoRA student begins as the teacher, whose layers it is on; leave out --lora student")
    size: dict[str, Any] = {"resolution": config.resolution, "frames": config.frames}
    if teacher.small is not None:
        raise UserError("start: --student says what the student begins as too; leave one of the two out")
    with _naming("start"):
        student, record = load_teacher(config.start, null_class=config.null_class, **size), record_of(config.start)
    if (student.family, student.shape, student.num_classes) != (teacher.family, teacher.shape, teacher.num_classes):
        raise UserError(f"start: {shown(config.start)} is of another kind than the teacher; give a student of it")
    if not _same_noise(student.denoiser.schedule, teacher.denoiser.schedule):
        raise UserError(
            f"start: {shown(config.start)} has another noise schedule than the teacher; give a student of it"
        )
    of_student: dict[str, Any] = (
        {"levels": record.levels, "move": record.move} if isinstance(record, StudentRecord) else {}
    )
    student.denoiser.schedule = teacher.denoiser.schedule  # that of its folder may end at its first level
    if teacher.denoiser.null is not None and student.denoiser.null is None:
        student.denoiser.null = teacher.denoiser.null
    return dataclasses.replace(teacher, student=student.denoiser, **of_student)


def _same_noise(one: Schedule, other: Schedule) -> bool:
    """Whether a network is told the same of all noise that both know; what their samplers visit may differ."""
    t = torch.linspace(max(one.t_min, other.t_min), min(one.t_max, other.t_max), 11, dtype=torch.float64)[1:-1]
    told = zip(one.native(t), other.native(t), strict=True)
    return type(one) is type(other) and all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in told)


def note_other_steps(start: str, teacher: Teacher, sampler: Sampler) -> None:
    """Say so where a student of several steps is begun as, and goes from level to level otherwise than that one."""
    if len(teacher.levels) > 1 and len(sampler.levels) > 1 and sampler.step.name != teacher.move:
        print(
            f"note: start: {shown(start)} goes from level to level by {teacher.move!r}, and this method's student by "
            f"{sampler.step.name!r}, which it has to learn",
            file=sys.stderr,
        )


def of_another_size(student: str, teacher: Teacher, weights: bool, **size: Any) -> Denoiser:
    """What a student of another size begins as; UserError where it is not used as the teacher is."""
    with _naming("student"):
        own = load_teacher(student, weights=weights, **size)
    schedule, u = teacher.denoiser.schedule, torch.linspace(0, 1, 9, dtype=torch.float64)
    for what, its, wanted in (
        ("family", own.family, teacher.family),
        ("samples", own.shape, teacher.shape),
        ("number of classes", own.num_classes, teacher.num_classes),
        ("output", own.denoiser.output.name, teacher.denoiser.output.name),
        ("noise schedule", own.denoiser.schedule.at_fraction(u).tolist(), schedule.at_fraction(u).tolist()),
    ):
        if its != wanted:
            shown = "" if what == "noise schedule" else f", {its} for {wanted}"
            raise UserError(f"student: {student!r} has another {what} than the teacher{shown}; give one like it")
    denoiser = own.denoiser
    denoiser.null = teacher.denoiser.null
    if weights:
        x, t = torch.zeros(1, *teacher.shape), torch.ones(1, dtype=torch.float64)
        try:
            with torch.no_grad():
                denoiser(x.to(next(denoiser.parameters())), t, teacher.sample_cond(1))
        except Exception as error:  # whatever the network raises
            raise UserError(
                f"student: {student!r} does not take the teacher's conditions: {first_line(error)}"
            ) from error
    return denoiser


def levels_of_start(values: Mapping[str, Any], teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    """The option that says the levels of the student that is begun as, where no option does."""
    names, levels = {f.name for f in dataclasses.fields(recipe.config)}, teacher.levels
    if not levels or {"levels", "student_steps", "student_level"} & set(values):
        return {}
    if "levels" in names:
        return {"levels": levels}
    return {"student_level": levels[0]} if "student_level" in names and len(levels) == 1 else {}
