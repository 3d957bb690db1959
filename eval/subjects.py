"""The models that are timed: which teachers and students, and how each is drawn."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.eval.models import (
    ModelLike,
    Student,
    any_pipeline,
    family_or_none,
    model_folder,
    models_in,
    pixel_sampler,
)
from diffdistill.eval.stock_call import guidance_call, stock_call, with_negatives
from diffdistill.eval.timing import SpeedOptions, Subject, allocated_mb
from diffdistill.families import (
    Family,
    Prompt,
    StudentRecord,
    describe,
    is_student,
    load_pipeline,
    local_folder,
    read_record,
    teacher_of,
)
from diffdistill.families._family import example_images
from diffdistill.options import Size, height_width
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

LATENT_STEPS = 50  # of a stock pipeline whose call names no number
NETWORKS = ("unet", "transformer", "transformer_2")
SIZE = ("height", "width", "num_frames", "frames")
PROMPTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "a red bicycle leaning against a white wall",
    "two cats asleep on a windowsill",
    "a map of an island that does not exist, ink on old paper",
)


SizeArguments = tuple[tuple[str, int], ...]
TeacherKey = tuple[str, float, SizeArguments]


@dataclass(frozen=True)
class ModelPlan:
    """A model as it is to be loaded; `against` is the place of its teacher in the list of plans."""

    source: Path | Teacher | Student  #: a pipeline's folder, or a loaded pixel model
    name: str
    scale: float = 1.0
    size: SizeArguments = ()  #: what a teacher is drawn at, that of its student
    null_class: int | None = None
    against: int | None = None


def plan_models(models: Sequence[ModelLike], options: SpeedOptions) -> list[ModelPlan]:
    """Teachers first, each once for a guidance scale and size; then the models in their order.

    UserError for what holds no model.
    """
    teachers: dict[TeacherKey, ModelPlan] = {}
    own_plans: list[tuple[ModelPlan, TeacherKey | None]] = []
    for model in models:
        for plan in _plans_of(model, 1.0 if options.guidance_scale is None else options.guidance_scale):
            key = _add_teacher(teachers, plan, options)
            own_plans.append((plan, key))
    keys, plans = list(teachers), list[ModelPlan]()
    for (source, scale, _), plan in teachers.items():
        name = "teacher" if len({k[0] for k in keys}) == 1 else f"teacher {source}"
        name = name if scale == 1 else f"{name}, guidance {scale:g}"
        plans.append(replace(plan, name=name, against=len(plans)))
    known = {plan.source.resolve() for plan in teachers.values() if isinstance(plan.source, Path)}
    for plan, key in own_plans:
        if not isinstance(plan.source, Path) or plan.source.resolve() not in known:
            plans.append(replace(plan, against=None if key is None else keys.index(key)))
    names = [plan.name for plan in plans]
    return [plan if names.count(plan.name) == 1 else _renamed(plan) for plan in plans]


def _plans_of(model: ModelLike, scale: float) -> list[ModelPlan]:
    """One of a model, several of a folder of runs."""
    if isinstance(model, Teacher):
        return [ModelPlan(model, "loaded teacher", scale)]
    if isinstance(model, tuple):
        return [ModelPlan(model, "loaded student", scale)]
    folders = models_in(model) or [model_folder(model)]
    return [ModelPlan(_pipeline_folder(folder), _name(folder), scale) for folder in folders]


def _add_teacher(teachers: dict[TeacherKey, ModelPlan], plan: ModelPlan, options: SpeedOptions) -> TeacherKey | None:
    """The key of a model's teacher, which is added to the teachers; None if it has none."""
    record = _student_record(plan)
    teacher = options.teacher
    if teacher is None and record is not None and isinstance(plan.source, Path):
        teacher = teacher_of(plan.source, record)
    if teacher is None:
        return None
    scale = options.guidance_scale
    if scale is None:  # the student imitates the teacher as it was guided
        scale = 1.0 if record is None else record.guidance.scale
    call = {} if record is None or record.call is None else record.call
    size = tuple((k, v) for k, v in call.items() if k in SIZE)
    key = (str(teacher), float(scale), size)
    if key not in teachers:
        teachers[key] = ModelPlan(
            _pipeline_folder(teacher), "", key[1], size, None if record is None else record.teacher_null_class
        )
    return key


def _renamed(plan: ModelPlan) -> ModelPlan:
    what = ", ".join(f"{k} {v}" for k, v in plan.size) or (plan.source if isinstance(plan.source, Path) else id(plan))
    return replace(plan, name=f"{plan.name} ({what})")


def _pipeline_folder(model: str | os.PathLike[str]) -> Path:
    path = local_folder(str(model_folder(model)))
    if not (path / "model_index.json").is_file():
        raise UserError(f"speed: {os.fspath(model)!r} holds no pipeline (model_index.json), nor runs with students")
    return path


def _name(model: Path) -> str:
    return (model.parent if model.name in ("student", "teacher") else model).resolve().name


def _student_record(plan: ModelPlan) -> StudentRecord | None:
    record = read_record(plan.source) if isinstance(plan.source, Path) else None
    return record if isinstance(record, StudentRecord) else None


def _family(plan: ModelPlan) -> Family | None:
    return family_or_none(plan.source) if isinstance(plan.source, Path) else None


def check_resolution(plan: ModelPlan, resolution: Size | None) -> None:
    """UserError for a size that the model does not make."""
    family = _family(plan)
    if resolution is None or family is None or not isinstance(plan.source, Path):
        return
    if family.autoencoder is not None:
        record = _student_record(plan)
        describe(plan.source, resolution, None if record is None else record.frames)
    elif resolution != (own := describe(plan.source).shape[-1]):
        raise UserError(f"resolution: {resolution} is not the {own} that {plan.name} makes, a pixel model; use {own}")


def load_subject(plan: ModelPlan, options: SpeedOptions) -> Subject:
    """The model of a plan, on the device."""
    family, before = _family(plan), allocated_mb(options.device)
    if not isinstance(plan.source, Path) or (family is not None and family.autoencoder is None):
        parts, networks, steps, draw = _pixel_model(plan, options)
    else:
        parts, networks, steps, draw = _stock_pipeline(family, plan.source, plan, options)
    for part in networks:
        part.eval()
    weights = None if before is None else (allocated_mb(options.device) or 0.0) - before
    return Subject(plan.name, steps, plan.scale, plan.against, parts, networks, torch.no_grad()(draw), weights)


Drawable = tuple[Any, list[nn.Module], int | None, Callable[[int, Size | None], Any]]


def _pixel_model(plan: ModelPlan, options: SpeedOptions) -> Drawable:
    sample, teacher, steps = pixel_sampler(plan.source, options.teacher_steps, plan.scale, plan.null_class)
    denoiser = teacher.denoiser.to(options.device, getattr(torch, options.dtype))

    def draw(batch: int, resolution: Size | None) -> Any:
        cond = {}
        if teacher.num_classes is not None:
            cond = {"class_labels": torch.arange(batch, device=options.device) % teacher.num_classes}
        return sample(cond, image_generators(options.seed, range(batch))).float().cpu().movedim(1, -1).numpy()

    return denoiser.network, [denoiser.network], steps, draw


def _stock_pipeline(family: Family | None, folder: Path, plan: ModelPlan, options: SpeedOptions) -> Drawable:
    dtype = getattr(torch, options.dtype)
    if family is None:
        pipeline = any_pipeline(folder, device=options.device, dtype=dtype, trust=options.trust_remote_code)
    else:
        pipeline = load_pipeline(folder, device=options.device, dtype=dtype)
    takes = inspect.signature(pipeline.__call__).parameters
    steps = options.teacher_steps
    if steps is None and "num_inference_steps" in takes:
        steps = takes["num_inference_steps"].default
    call = stock_call(folder, family, steps if isinstance(steps, int) else LATENT_STEPS, None)
    if plan.scale != 1 and not is_student(folder):
        call |= _guided(family, plan.scale, takes)
    call |= {name: value for name, value in plan.size if name in takes}
    classes = describe(folder).num_classes if family is not None and "class_labels" in takes else None
    reads_image = family is not None and family.reads_image
    alone = reads_image and family is not None and family.several

    def draw(batch: int, resolution: Size | None) -> Any:
        if alone and batch > 1:
            raise UserError(f"batch_sizes: {batch} was given, and {plan.name}'s pipeline draws one at a time; give 1")
        inputs: dict[str, Any] = {"batch_size": batch}
        if "prompt" in takes:
            inputs = {"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)]}  # anew: some pipelines write into it
        elif "class_labels" in takes:
            inputs = {"class_labels": [i % (classes or 1) for i in range(batch)]}
        if resolution is not None:
            if "height" not in takes:
                raise UserError(
                    f"resolution: {resolution} was given, and {plan.name}'s pipeline takes no size; leave it out"
                )
            inputs |= dict(zip(("height", "width"), height_width(resolution), strict=True))
            if reads_image:
                inputs |= describe(folder, resolution).size
        if reads_image:
            size = call | inputs
            changed = example_images(batch, (size["height"], size["width"]))
            pictures = Prompt((0, 0), images=changed).pictures
            inputs["image"] = pictures[0] if "num_frames" in takes else pictures  # Wan's call takes one for all
        output = pipeline(
            **with_negatives(call, batch) | inputs,
            generator=image_generators(options.seed, range(batch)),
            output_type="np",
        )
        images = getattr(output, "images", getattr(output, "frames", None))
        if not isinstance(images, np.ndarray):
            raise UserError(f"speed: {plan.name} makes neither images nor videos")
        return images

    networks = [part for name in NETWORKS if isinstance(part := getattr(pipeline, name, None), nn.Module)]
    return pipeline, networks, call.get("num_inference_steps"), draw


def _guided(family: Family | None, scale: float, takes: Any) -> dict[str, Any]:
    """u + scale (c - u) in the words of the stock pipeline."""
    if not {"true_cfg_scale", "guidance_scale"} & set(takes):
        raise UserError(f"guidance_scale: {scale:g} was given, and the pipeline takes none; use 1")
    own = scale - 1 if family is not None and family.stock_guidance.startswith("c + ") else scale
    return guidance_call(family, own, true_cfg="true_cfg_scale" in takes)
