"""Students that are networks of their own, which read noise once and know no time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, Output
from diffdistill.core.schedule import DiscreteVP, Schedule
from diffdistill.errors import UserError
from diffdistill.options import EquilibriumOptions
from diffdistill.players.equilibrium import EquilibriumTransformer
from diffdistill.players.teacher import Teacher, trainable_copy


def seen_as(denoiser: Denoiser, network: nn.Module, output: Output | None = None) -> Denoiser:
    """A network of ours in the place of the denoiser's, with its schedule, its output or another, and its null."""
    return Denoiser(network, denoiser.schedule, output or denoiser.output, null=denoiser.null)


@contextmanager
def every_iteration(network: Any) -> Iterator[None]:
    """While it lasts, a call gives what comes of each of the network's iterations, (iterations, B, ...)."""
    network.every = True
    try:
        yield
    finally:
        network.every = False


def equilibrium_student(teacher: Teacher, size: EquilibriumOptions) -> Denoiser:
    """A new equilibrium transformer in the teacher's place, or a copy of the one that the student is to begin as.

    What it predicts at the noisiest level is G, of unit variance, whatever the output that the teacher's kind of
    sampler takes: x0 itself of discrete timesteps, whose stock scheduler knows it. Raises UserError for conditions
    other than class labels, samples that are no images, a student to begin as of another kind, and sizes that do not
    fit.
    """
    denoiser, shape = teacher.denoiser, tuple(teacher.shape)
    if teacher.student is not None:
        if not isinstance(teacher.student.network, EquilibriumTransformer):
            raise UserError("start: the student to begin as is no equilibrium transformer; give a student of get")
        return trainable_copy(teacher.student)
    if teacher.small is not None:
        raise UserError("student: the student is a network of its own kind; give its width and depth in place of it")
    if teacher.example_cond and teacher.num_classes is None:
        raise UserError(
            f"method: the student reads noise and class labels, and this teacher {', '.join(teacher.example_cond)}; "
            "use slim_flow or dmd"
        )
    if len(shape) not in (1, 3):
        raise UserError(
            f"method: the student makes images, and the teacher's samples are {shape}; use slim_flow or dmd"
        )
    labels = None if teacher.num_classes is None else teacher.num_classes + (denoiser.null is not None)
    output = OUTPUTS["sample"] if isinstance(denoiser.schedule, DiscreteVP) else denoiser.output
    of_input, of_image = output_weights(denoiser.schedule, output)
    network = EquilibriumTransformer(
        shape, labels, depth=size.depth, equilibrium_depth=size.equilibrium_depth, iterations=size.iterations,
        ratio=(size.equilibrium_ratio, 4), of_input=of_input, of_image=of_image, **fitting(shape, size),
    )  # fmt: skip
    own = next(itertools.chain(denoiser.parameters(), denoiser.buffers()), torch.empty(0))
    return seen_as(denoiser, network.to(own.device), output)


def output_weights(schedule: Schedule, output: Output) -> tuple[float, float]:
    """What an output at the noisiest level is of the network's input and of the sample that it is to predict."""
    t = schedule.angle(schedule.init_level).clamp(schedule.t_min, schedule.t_max)
    native, cos, sin = schedule.native(t), torch.cos(t), torch.sin(t)
    a, b = output.at(native.alpha, native.sigma, schedule.data_std)
    return float(b / (sin * native.scale)), float(a * schedule.data_std - b * cos / sin)


def fitting(shape: tuple[int, ...], size: EquilibriumOptions) -> dict[str, Any]:
    """Width, heads and patch: those that are given, or such that images of 3x32x32 get the paper's smallest network.

    That has 256 tokens of width 256; the width grows with the root of the image's numbers, and a head has 64 of it.
    Raises UserError for those that do not fit one another or the shape.
    """
    sides = shape[1:] if len(shape) == 3 else (1,)
    parts = [p for p in range(1, min(sides) + 1) if all(side % p == 0 for side in sides)]
    area = math.prod(sides)
    patch = size.patch or next((p for p in parts if area // p**2 <= 256), parts[-1])
    if patch not in parts:
        raise UserError(f"patch: {patch} does not divide the sides of samples {shape}; give one of {parts}")
    width = size.width or 64 * min(max(round(256 / 64 * math.sqrt(math.prod(shape) / 3072)), 1), 12)
    heads = size.heads or next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    if width % 4 or width % heads:
        raise UserError(f"width: {width} is no multiple of 4 and of heads, {heads}; give one that is")
    return {"width": width, "heads": heads, "patch": patch}
