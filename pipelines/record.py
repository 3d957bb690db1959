"""The record of a student that is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffdistill.core.denoiser import Denoiser
from diffdistill.environment import environment
from diffdistill.families import FAMILIES, Guidance, StudentRecord, TeacherRecord, public_name, record_of
from diffdistill.options import Size
from diffdistill.pipelines.card import student_call
from diffdistill.pipelines.origin import public_options
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.sampler import Sampler
from diffdistill.players.scale_input import scale_inputs
from diffdistill.players.teacher import Teacher


def new_student_record(
    method: str,
    options: dict[str, Any],
    teacher: Teacher,
    sampler: Sampler,
    step: int,
    *,
    resolution: Size | None = None,
    frames: int | None = None,
) -> StudentRecord:
    """What is written beside the student that `sampler` samples, at training step `step`.

    `options` are those of the training; `resolution` and `frames` those of a latent model's samples.
    """
    entry = FAMILIES.get(teacher.family)
    latent = entry is not None and entry.autoencoder is not None
    own = record_of(teacher.source) if latent and teacher.source else None
    if isinstance(own, TeacherRecord):
        resolution, frames = resolution or own.resolution, frames or own.frames
    return StudentRecord(
        levels=sampler.levels,
        move=sampler.step.name,
        teacher=public_name(teacher.source),
        method=method,
        step=step,
        guidance=replace(imitated_guidance(sampler.denoiser, options), negative_prompt=options.get("negative_prompt")),
        num_classes=teacher.num_classes,
        null_class=None if teacher.denoiser.null is None else teacher.num_classes,
        resolution=resolution if latent else None,
        frames=frames if latent else None,
        call=student_call(teacher, sampler) if latent else None,
        options=public_options(options),
        environment=environment(),
    )


def imitated_guidance(student: Denoiser, options: Mapping[str, Any]) -> Guidance:
    """How the teacher was guided in a training with these options, of which `student` is exported.

    The options of a range are called guidance_min and guidance_max, that of one scale guidance_scale.
    """
    least, greatest = options.get("guidance_min"), options.get("guidance_max")
    network = student.network
    scale = float(network.guidance_scale) if isinstance(network, AdaptedNetwork) else student.default_scale
    if scale is not None:  # a student of one that took it has no range of its own
        return Guidance(scale, float(scale if least is None else least), float(scale if greatest is None else greatest))
    # Else a scale that was an input is exported at its default for good.
    parts = scale_inputs(network)
    scale = float(parts[0].default) if parts else options.get("guidance_scale")
    if scale is None:  # of a range that is one scale
        scale = least
    second = options.get("guidance_scale_2")
    return Guidance(1.0 if scale is None else float(scale), second=second)
