"""Pictures of a teacher's or a student's images, and of what a latent model expects at each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import LinearFlow
from diffdistill.errors import UserError
from diffdistill.eval.evaluate import device, draw_all, model_folder, on_device
from diffdistill.eval.models import pixel_sampler, stock_call
from diffdistill.families import Family, describe, family_of, is_student, load_pipeline, local_folder, schedule_of
from diffdistill.pictures import image_grid, save_png
from diffdistill.pipelines.shipped.student_pipeline import seeded_steps
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators


def sample_picture(
    folder: str,
    prompts: Sequence[str] | None,
    count: int | None,
    classes: Sequence[int] | None,
    steps: int | None,
    guidance_scale: float | None,
    seed: int,
    out: str,
    trace: bool = False,
) -> Path:
    """`diffdistill sample`: images of a student's or a teacher's folder as one PNG; `trace` is stock_picture's."""
    model = model_folder(folder)
    family, _ = family_of(local_folder(str(model)))
    if family.autoencoder is not None:
        return stock_picture(model, family, prompts, count or 4, classes, steps, guidance_scale, seed, out, trace)
    if trace:
        raise UserError(f"trace: {folder!r} is no latent model")
    if prompts:
        raise UserError(f"prompt: {folder!r} takes no prompts; use --classes")
    count = count or 64
    if is_student(model):
        for name, value in (("steps", steps), ("guidance_scale", guidance_scale)):
            if value is not None:
                raise UserError(f"{name}: {value} was given, and a student's own are part of it")
    draw, teacher, _ = pixel_sampler(model, steps, 1.0 if guidance_scale is None else guidance_scale)
    on_device(teacher)
    labels = _labels(teacher, count, classes)
    drawn = draw_all(draw, labels, count, seed)
    columns = min(teacher.num_classes or 8, 10)
    return save_png(image_grid(drawn.images, columns, scale=max(1, 64 // teacher.shape[-1])), Path(out))


@torch.no_grad()
def stock_picture(
    model: Path, family: Family, prompts: Sequence[str] | None, count: int, classes: Sequence[int] | None,
    steps: int | None, guidance_scale: float | None, seed: int, out: str, trace: bool = False,
) -> Path:  # fmt: skip
    """Images of a latent model by its own stock pipeline, as anybody would draw them; guidance is in its own units.

    `trace`: a row an image instead, a column the image that the model expects after a step (DT-visualisation,
    Gandikota & Bau 2025, arXiv:2503.10637).
    """
    text = family.conditions == "text"
    if text != bool(prompts) or (text and classes):
        raise UserError(f"prompt: {str(model)!r} takes {'a prompt; give --prompt' if text else 'none; use --classes'}")
    if classes:
        _check_classes(classes, describe(local_folder(str(model))).num_classes or 0)
    if is_student(model) and steps is not None:
        raise UserError(f"steps: {steps} was given, and a student's own are part of it")
    call = stock_call(local_folder(str(model)), family, steps, guidance_scale)
    pipeline = load_pipeline(local_folder(str(model)), device=device())
    images = []
    columns = min(count, 4)
    for i, generator in enumerate(image_generators(seed, range(count))):
        what = (
            {"prompt": (prompts or [""])[i % len(prompts or [""])]}
            if text
            else {"class_labels": [(classes or range(10))[i % len(classes or range(10))]]}
        )
        if trace:
            with seeded_steps(pipeline, generator), traced(pipeline) as expected:
                pipeline(**what, **call, generator=generator, output_type="latent" if text else "np")
            images += [decoded(pipeline, family, x0[:1], call) for x0 in expected]
            columns = len(expected)
            continue
        with seeded_steps(pipeline, generator):
            got = pipeline(**what, **call, generator=generator, output_type="pt" if text else "np")
        picture = torch.as_tensor(got.frames if hasattr(got, "frames") else got.images).float()
        picture = picture[:, 0] if picture.ndim == 5 else picture  # a video's first frame
        images.append(2 * (picture if text else picture.permute(0, 3, 1, 2)) - 1)
    return save_png(image_grid(torch.cat(images), columns), Path(out))


@contextmanager
def traced(pipeline: Any) -> Iterator[list[Tensor]]:
    """While it lasts, the x0 that the network expects at each step of the pipeline's scheduler is appended to a list.

    They are latents of the pipeline's own shape. Raises UserError for a scheduler that is not supported.
    """
    scheduler, own, expected = pipeline.scheduler, pipeline.scheduler.step, []
    shifts = {"use_dynamic_shifting": False}  # a shift moves the grid, never what a sigma means
    schedule, row = schedule_of({**scheduler.config, "_class_name": type(scheduler).__name__, **shifts})

    @wraps(own)  # the pipeline looks at its arguments
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        # What the network read; flow matching's schedulers leave it as it is.
        x = getattr(scheduler, "scale_model_input", lambda x, t: x)(sample, timestep)
        result = own(model_output, timestep, sample, *args, **kwargs)
        level = torch.as_tensor(timestep, dtype=torch.float64).cpu()
        if isinstance(schedule, LinearFlow):
            level = level / schedule.train_timesteps
            if scheduler.config.get("use_flow_sigmas"):  # its timesteps are rounded
                level = scheduler.sigmas[scheduler.step_index - 1].double().cpu()
        t = schedule.angle(level).reshape(1)
        native = schedule.native(t)
        a, b = row(native.alpha, native.sigma, schedule.data_std)
        x_t = x.float() / float(native.scale)
        x0 = Prediction(x_t, t, model_output.float(), a * schedule.data_std, b).x0
        expected.append(x0 * schedule.data_std)
        return result

    before, scheduler.step = vars(scheduler).get("step"), step
    try:
        yield expected
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def decoded(pipeline: Any, family: Family, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of latents of the pipeline's shape; a video's first frame."""
    assert family.autoencoder is not None
    if latents.ndim == 3:  # packed in tokens
        size = pipeline.default_sample_size * pipeline.vae_scale_factor
        latents = pipeline._unpack_latents(
            latents, call.get("height", size), call.get("width", size), pipeline.vae_scale_factor
        )
        latents = latents.squeeze(2) if latents.ndim == 5 else latents
    images = family.autoencoder.decode(pipeline.vae, latents.to(pipeline.vae.dtype)).float().clamp(-1, 1)
    return images[:, :, 0] if images.ndim == 5 else images


def _labels(teacher: Teacher, count: int, classes: Sequence[int] | None) -> Tensor | None:
    if teacher.num_classes is None:
        if classes is not None:
            raise UserError(f"classes: {list(classes)} were given and this model has no classes")
        return None
    wanted = list(classes or range(teacher.num_classes))
    _check_classes(wanted, teacher.num_classes)
    return torch.tensor([wanted[i % len(wanted)] for i in range(count)])


def _check_classes(classes: Sequence[int], known: int) -> None:
    for label in classes:
        if label >= known:
            raise UserError(f"classes: {label} is not among the {known} classes 0 to {known - 1}")
