"""What is evaluated: any diffusers pipeline, a teacher or student of ours, or a folder of images, as 8-bit images."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffdistill.core.attention_choice import check_attention
from diffdistill.core.denoiser import Cond
from diffdistill.core.guidance import guided, refuse_second_scale
from diffdistill.core.ode import Denoise, Step, ddim_step, sample_ode
from diffdistill.core.prediction import diffuse, expand
from diffdistill.data.arrays import ARRAY_SUFFIXES
from diffdistill.data.shards import hash_file
from diffdistill.errors import UserError, first_line, shown
from diffdistill.eval.features.measure import network_fingerprint
from diffdistill.eval.image_folder import Model, open_image_file, open_image_folder
from diffdistill.eval.measurements import rounded
from diffdistill.eval.stock_call import steered, stock_call, with_negatives
from diffdistill.families import (
    METADATA,
    Family,
    Prompt,
    attention_of,
    describe,
    family_of,
    is_partial,
    is_single_file,
    is_student,
    load_pipeline,
    load_student,
    load_teacher,
    local_folder,
    parts_of,
    read_json,
)
from diffdistill.families._parts import LORA
from diffdistill.pictures import opaque
from diffdistill.pipelines.shipped.student_pipeline import seeded_steps
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

PIXEL_STEPS = 16  # of a teacher, where the user says nothing

Draw = Callable[[Cond, Sequence[torch.Generator]], Tensor]
"""(conditions, one generator an image) -> images (B, C, H, W) in the data's units."""
Student = tuple[Sampler, Teacher]
"""What `load_student` returns."""
ModelLike = str | os.PathLike[str] | Teacher | Student
"""A run, a model's folder or hub id, or a loaded teacher or student."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a model that is no student is sampled, and with what; a student has its own steps."""

    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None  #: of the second of two networks; None: the same
    negative_prompt: str | None = None  #: that guidance leads away from; None: what the family has
    dtype: str = "float32"
    attention: str = "auto"
    trust_remote_code: bool = False
    strict: bool = True  #: steps and a guidance scale are refused for a student, and else passed over
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    eight_bit: bool = True  #: images are rounded to 8 bits


def check_dtype(dtype: str, device: torch.device) -> None:
    """UserError for a half type that the device does not have."""
    cuda = device.type == "cuda"
    if dtype == "bfloat16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype: {torch.cuda.get_device_name()} has no bfloat16; use float16 or float32")
    if dtype == "float16" and not cuda:
        raise UserError("dtype: float16 is for GPUs, and the models run on a CPU; use float32 or bfloat16")


@torch.no_grad()
def open_model(model: ModelLike, sampling: SamplingOptions) -> Model:
    """The model of a run, a pipeline's folder or hub id, a folder or file of images, or a loaded one.

    UserError where it is none, or does not take the options of sampling.
    """
    check_dtype(sampling.dtype, sampling.device)
    check_attention(sampling.attention, sampling.device, getattr(torch, sampling.dtype))
    if not isinstance(model, str | os.PathLike):
        name = "student" if isinstance(model, tuple) else "teacher"
        return _pixel_model(model, name, loaded_fingerprint(model), sampling)
    path = model_folder(model)
    if path.is_dir() and not _holds_model(path):
        return open_image_folder(path)
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES and not is_single_file(path):
        return open_image_file(path)
    folder = local_folder(str(path))
    name = model_name(model, path if path.is_dir() else folder)
    family = family_or_none(folder)
    if family is not None and family.autoencoder is None:
        return _pixel_model(folder, name, folder_fingerprint(folder), sampling)
    return _pipeline_model(folder, family, name, folder_fingerprint(folder), sampling)


def _holds_model(folder: Path) -> bool:
    """Whether it is a pipeline's folder, or a student's that leaves parts to its teacher."""
    return (folder / "model_index.json").is_file() or is_partial(folder)


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """The student or teacher in a run folder; else the folder, hub id or name as it is."""
    runs = (Path(folder) / "student", Path(folder) / "teacher")
    return next((p for p in runs if _holds_model(p)), Path(folder))


def models_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The model of `model_folder`, or else the students of the runs in the folder."""
    model = model_folder(folder)
    if _holds_model(model):
        return [model]
    return sorted(path for path in Path(folder).glob("*/student") if _holds_model(path))


@torch.no_grad()
def teacher_images(
    teacher: Teacher,
    steps: int,
    guidance_scale: float,
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    second: float | None = None,
) -> Tensor:
    """DDIM (first order) on the teacher's own grid of `steps` steps, from its own initial noise.

    Where the teacher's scheduler clips x0 (`clip_sample`, the default of DDPM and DDIM schedulers) or thresholds it, so
    does this: it is what the stock sampler draws.
    """
    denoiser = teacher.denoiser
    parameter = next(denoiser.parameters())
    z = torch.stack([torch.randn(teacher.shape, generator=g) for g in generators]).to(parameter)
    denoise = guided(denoiser, guidance_scale, second=second)
    x0 = sample_ode(teacher_step(teacher), denoise, denoiser.schedule, z, steps, cond)
    return x0 * denoiser.schedule.data_std


def teacher_step(teacher: Teacher) -> Step:
    """The DDIM step of a teacher's stock sampler, which may bound x0 in each step and keeps eps as it is."""
    bound, std = _bound(teacher.scheduler), teacher.denoiser.schedule.data_std
    if bound is None:
        return ddim_step

    def step(denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        prediction = denoise(x_t, t, cond)
        x0 = bound(prediction.x0 * std) / std
        return diffuse(x0, s, prediction.eps) if bool((s > 0).all()) else x0

    return step


def _bound(scheduler: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a scheduler does to x0 in the data's units; None: nothing."""
    if scheduler.get("thresholding"):
        ratio, most = scheduler["dynamic_thresholding_ratio"], scheduler["sample_max_value"]

        def threshold(x0: Tensor) -> Tensor:
            """Imagen's (Saharia et al. 2022, arXiv:2205.11487, section 2.3), as diffusers has it."""
            largest = torch.quantile(x0.float().abs().flatten(1), ratio, dim=1).clamp(1, most)
            largest = expand(largest, x0)
            return x0.clamp(-largest, largest) / largest

        return threshold
    if scheduler.get("clip_sample"):
        limit = scheduler.get("clip_sample_range", 1.0)
        return lambda x0: x0.clamp(-limit, limit)
    return None


def family_or_none(path: Path) -> Family | None:
    """None of a pipeline that cannot be distilled: it can be drawn all the same."""
    try:
        return family_of(path)[0]
    except UserError:
        return None


def pixel_sampler(
    model: Path | Teacher | Student, steps: int | None, scale: float, null_class: int | None = None
) -> tuple[Draw, Teacher, int]:
    """How a pixel model is drawn, which we do ourselves: the stock pipelines take no classes. Steps are a teacher's.

    A model of a folder is on the CPU, and is moved by the denoiser of the Teacher that is returned beside its number
    of steps.
    """
    if isinstance(model, Path):
        model = load_student(model) if is_student(model) else load_teacher(model, null_class=null_class)
    described = model if isinstance(model, Teacher) else model[1]
    if described.size:
        raise UserError("model: a loaded model of latents has no autoencoder beside it; give its folder")
    if isinstance(model, Teacher):
        steps = steps or PIXEL_STEPS
        return partial(teacher_images, model, steps, scale), model, steps
    sampler = model[0]
    return partial(sampler, described.shape), replace(described, denoiser=sampler.denoiser), len(sampler.levels)


def model_name(folder: str | os.PathLike[str], path: Path) -> str:
    """Of the run, or else of the model's own folder."""
    run = Path(folder)
    return (run if path.name in ("student", "teacher") and run == path.parent else path).resolve().name


def folder_fingerprint(folder: Path) -> str:
    """16 hex digits of a pipeline's weights and configs."""
    digest = hashlib.blake2b(digest_size=8)
    parts = [*parts_of(read_json(folder / "model_index.json")), "adapter"]
    top = (folder / name for name in ("model_index.json", METADATA, LORA) if (folder / name).is_file())
    for path in sorted([*top, *folder.glob("*.py"), *(p for part in parts for p in (folder / part).glob("*"))]):
        if path.suffix in (".json", ".safetensors", ".txt", ".model", ".py"):
            digest.update(str(path.relative_to(folder)).encode())
            hash_file(digest, path)
    return digest.hexdigest()


def loaded_fingerprint(model: Teacher | Student) -> str:
    """16 hex digits of a loaded model's weights and of how it is sampled."""
    sampler, denoiser = (None, model.denoiser) if isinstance(model, Teacher) else (model[0], model[0].denoiser)
    settings = None if sampler is None else [sampler.levels, sampler.step.name]
    return network_fingerprint(denoiser, f"{settings} {denoiser.output.name} {type(denoiser.schedule).__name__}")


def pixel_model(
    name: str,
    fingerprint: str,
    draw: Draw,
    teacher: Teacher,
    steps: int,
    call: dict[str, Any],
    options: SamplingOptions,
) -> Model:
    """A pixel model that is drawn by `draw`, from classes or nothing."""

    def images(
        indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None,
        pictures: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        cond = {} if labels is None else {"class_labels": labels.to(options.device)}
        with attention_of(teacher.denoiser, options.attention):
            drawn = draw(cond, image_generators(seed, indices)).float().cpu()
        refuse_non_finite(drawn, name)
        return rounded((drawn + 1) / 2) if options.eight_bit else drawn

    conditions = "none" if teacher.num_classes is None else "classes"
    return Model(name, fingerprint, conditions, teacher.num_classes, steps, call, images)


def refuse_non_finite(images: Tensor, name: str) -> None:
    """UserError for images with infinities or NaN."""
    if not bool(images.isfinite().all()):
        raise UserError(f"eval: the images of {name} are not finite; its training diverged")


def _pixel_model(model: Path | Teacher | Student, name: str, fingerprint: str, sampling: SamplingOptions) -> Model:
    if sampling.dtype != "float32":
        raise UserError(f"dtype: {sampling.dtype} is for latent pipelines, and {name} works on pixels; use float32")
    student = is_student(model) if isinstance(model, Path) else isinstance(model, tuple)
    if student:
        refuse_for_student(sampling)
    if sampling.strict:
        refuse_second_scale(sampling.guidance_scale_2, repr(name))
    scale = 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
    draw, teacher, steps = pixel_sampler(model, sampling.steps, scale)
    teacher.denoiser.to(sampling.device)
    if sampling.strict and sampling.negative_prompt is not None:
        raise UserError(f"negative_prompt: {name} takes no prompts; leave it out")
    call: dict[str, Any] = {"num_inference_steps": steps}
    if not student:
        bounded = {} if _bound(teacher.scheduler) is None else {"clip_sample": True}
        call = {"sampler": "DDIM", **call, "guidance_scale": scale, **bounded}
    return pixel_model(name, fingerprint, draw, teacher, steps, call, sampling)


def _pipeline_model(path: Path, family: Family | None, name: str, fingerprint: str, sampling: SamplingOptions) -> Model:
    student = is_student(path)
    if student:
        refuse_for_student(sampling)
    wishes = (sampling.steps, sampling.guidance_scale, sampling.negative_prompt, sampling.guidance_scale_2)
    own = (None, None, None, None) if student else wishes
    call = stock_call(path, family, *own)
    dtype = getattr(torch, sampling.dtype)
    if family is None:
        pipeline = any_pipeline(path, device=sampling.device, dtype=dtype, trust=sampling.trust_remote_code)
    else:
        pipeline = load_pipeline(path, device=sampling.device, dtype=dtype)
    call = steered(pipeline, family, call)
    if getattr(pipeline, "safety_checker", None) is not None:  # it would blacken images, and nobody measures with it
        pipeline.safety_checker = None
    takes = inspect.signature(pipeline.__call__).parameters
    conditions = "prompts" if "prompt" in takes else "classes" if "class_labels" in takes else "none"
    reads_image = family is not None and family.reads_image
    several = family is not None and family.several
    begins_with_image = reads_image and family is not None and family.videos
    if "negative_prompt" in call and "negative_prompt" not in takes and "kwargs" not in takes:
        raise UserError(f"negative_prompt: the pipeline of {name} takes none; leave it out")

    def images(
        indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None,
        pictures: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if (several or begins_with_image) and pictures is not None and len(indices) > 1:  # it takes those of one prompt
            parts = [(i, [(captions or [])[k]], pictures[k : k + 1]) for k, i in enumerate(indices)]
            return torch.cat([images([i], seed, None, text, seen) for i, text, seen in parts])
        inputs: dict[str, Any] = {"batch_size": len(indices)} if conditions == "none" else {}
        if conditions == "prompts":
            inputs = {"prompt": list(captions or [])}  # a new list: some pipelines write into it
        elif conditions == "classes":
            assert labels is not None
            inputs = {"class_labels": labels.tolist()}
        if pictures is not None and (reads_image or several):
            seen = Prompt((0, 0), images=pictures).pictures
            inputs |= {"image": seen[0] if begins_with_image else seen, **own_size}
        generators = image_generators(seed, indices)
        with attention_of(pipeline, sampling.attention), seeded_steps(pipeline, generators):
            output = pipeline(**inputs | with_negatives(call, len(indices)), generator=generators, output_type="np")
        if hasattr(output, "images"):
            drawn = opaque(torch.as_tensor(output.images).float().permute(0, 3, 1, 2))
        else:
            drawn = torch.as_tensor(output.frames).float().permute(0, 4, 1, 2, 3)
        refuse_non_finite(drawn, name)
        return rounded(drawn) if sampling.eight_bit else 2 * drawn - 1

    classes = describe(path).num_classes if family is not None and conditions == "classes" else None
    steps = call.get("num_inference_steps")
    draw = torch.no_grad()(images)
    own_size = describe(path).size if several else {}  # which the pipeline would take from its images
    return Model(name, fingerprint, conditions, classes, steps, call, draw, reads_image=reads_image, several=several)


def any_pipeline(path: Path, *, device: torch.device, dtype: torch.dtype, trust: bool = False) -> Any:
    """A pipeline of no family of ours; UserError where it does not load, or brings its own code and is not trusted."""
    kind = read_json(path / "model_index.json").get("_class_name")
    if isinstance(kind, list) and kind and not trust:
        problem = f"{path} carries a pipeline of its own, {kind[0]}.py, and code of a folder is run only if you say so"
        raise UserError(f"eval: {problem}: --trust-remote-code")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path, use_safetensors=True, trust_remote_code=trust, torch_dtype=dtype
        )
    except Exception as error:  # whatever the parts of an unknown pipeline raise
        raise UserError(f"eval: the pipeline in {path} does not load ({first_line(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def refuse_for_student(sampling: SamplingOptions) -> None:
    """UserError for options that a student has of its own."""
    for name in ("steps", "guidance_scale", "guidance_scale_2", "negative_prompt"):
        if sampling.strict and (value := getattr(sampling, name)) is not None:
            raise UserError(f"{name}: {shown(value)} was given, and a student has its own; leave it out")
