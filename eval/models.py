"""What is evaluated: any diffusers pipeline, a teacher or student of ours, or a folder of images, as 8-bit images."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffdistill.data.folder import IMAGE_SUFFIXES, naming_image
from diffdistill.data.images import open_data
from diffdistill.data.shards import hash_file
from diffdistill.errors import UserError, first_line
from diffdistill.eval.attention import attention
from diffdistill.eval.evaluate import Draw, model_folder, teacher_images
from diffdistill.families import (
    METADATA,
    Family,
    TeacherRecord,
    describe,
    family_of,
    in_half,
    is_student,
    load_pipeline,
    load_student,
    load_teacher,
    local_folder,
    parts_of,
    read_json,
    read_record,
)
from diffdistill.pictures import as_bytes
from diffdistill.pipelines.shipped.student_pipeline import seeded_steps
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

PIXEL_STEPS, LATENT_STEPS = 16, 20  # of a teacher, where the user says nothing


@dataclass(frozen=True)
class Wanted:
    """How a model that is no student is sampled, and with what; a student has its own steps."""

    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "float32"
    attention: str = "auto"
    trust_remote_code: bool = False
    strict: bool = True  #: steps and a guidance scale are refused for a student, and else passed over
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Model:
    """`draw(indices, seed, labels, captions)` gives images `indices` of the seed, uint8 (B, C, H, W) on the CPU."""

    name: str
    fingerprint: str  #: 16 hex digits: weights and configs
    conditions: str  #: none, classes, prompts, or images: there is nothing to draw
    classes: int | None
    steps: int | None
    call: dict[str, Any]  #: how it is sampled, for the record
    draw: Callable[[Sequence[int], int, Tensor | None, Sequence[str] | None], Tensor]
    count: int | None = None  #: images that there are; None: as many as one likes


def check_dtype(dtype: str, device: torch.device) -> None:
    """UserError for a half type that the device does not have."""
    cuda = device.type == "cuda"
    if dtype == "bfloat16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype: {torch.cuda.get_device_name()} has no bfloat16; use float16 or float32")
    if dtype == "float16" and not cuda:
        raise UserError("dtype: float16 is for GPUs, and the models run on a CPU; use float32 or bfloat16")


@torch.no_grad()
def open_model(folder: str, wanted: Wanted) -> Model:
    """The model of a run, a pipeline's folder or hub id; or a folder of images. UserError where it is none."""
    check_dtype(wanted.dtype, wanted.device)
    path = model_folder(folder)
    if path.is_dir() and not (path / "model_index.json").is_file():
        return _images(path)
    path = local_folder(str(path))
    name = _name(folder, path)
    found = _fingerprint(path)
    family = family_or_none(path)
    if family is not None and family.autoencoder is None:
        return _pixel_model(path, name, found, wanted)
    return _pipeline_model(path, family, name, found, wanted)


def family_or_none(path: Path) -> Family | None:
    """None of a pipeline that cannot be distilled: it can be drawn all the same."""
    try:
        return family_of(path)[0]
    except UserError:
        return None


def pixel_sampler(
    path: Path, steps: int | None, scale: float, null_class: int | None = None
) -> tuple[Draw, Teacher, int]:
    """How a pixel model is drawn, which we do ourselves: the stock pipelines take no classes. Steps are a teacher's.

    The model is on the CPU, and is moved by the denoiser of the Teacher that is given beside its number of steps.
    """
    if is_student(path):
        sampler, described = load_student(path)
        return partial(sampler, described.shape), described, len(sampler.levels)
    teacher, steps = load_teacher(path, null_class=null_class), steps or PIXEL_STEPS
    return partial(teacher_images, teacher, steps, scale), teacher, steps


def _name(folder: str, path: Path) -> str:
    run = Path(folder)
    return (run if path.name in ("student", "teacher") and run == path.parent else path).resolve().name


def _fingerprint(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    parts = [*parts_of(read_json(folder / "model_index.json")), "adapter"]
    top = (folder / name for name in ("model_index.json", METADATA) if (folder / name).is_file())
    for path in sorted([*top, *folder.glob("*.py"), *(p for part in parts for p in (folder / part).glob("*"))]):
        if path.suffix in (".json", ".safetensors", ".txt", ".model", ".py"):
            digest.update(str(path.relative_to(folder)).encode())
            hash_file(digest, path)
    return digest.hexdigest()


def _pixel_model(path: Path, name: str, found: str, wanted: Wanted) -> Model:
    if wanted.dtype != "float32":
        raise UserError(f"dtype: {wanted.dtype} is for latent pipelines, and {name} works on pixels; use float32")
    student = is_student(path)
    if student:
        _refuse_for_student(wanted)
    scale = 1.0 if wanted.guidance_scale is None else wanted.guidance_scale
    draw, teacher, steps = pixel_sampler(path, wanted.steps, scale)
    denoiser = teacher.denoiser.to(wanted.device)
    call: dict[str, Any] = {"num_inference_steps": steps}
    if not student:
        call = {"sampler": "DDIM", **call, "guidance_scale": scale}

    def images(indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None) -> Tensor:
        cond = {} if labels is None else {"class_labels": labels.to(wanted.device)}
        with attention(denoiser, wanted.attention):
            drawn = draw(cond, image_generators(seed, indices))
        return _eight_bit((drawn.float().cpu() + 1) / 2, name)

    conditions = "none" if teacher.num_classes is None else "classes"
    return Model(name, found, conditions, teacher.num_classes, steps, call, images)


def stock_call(path: Path, family: Family | None, steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Arguments of a stock pipeline's call: a student's own, or a number of steps with guidance off or in its units."""
    record = read_record(path)
    own = None if record is None or isinstance(record, TeacherRecord) else record.call
    call = dict(own or (family.arguments(steps or LATENT_STEPS) if family else {"num_inference_steps": steps}))
    call = {key: value for key, value in call.items() if value is not None}
    if guidance_scale is not None:
        if "true_cfg_scale" in call:  # which acts only where a negative prompt is given
            call |= {"true_cfg_scale": guidance_scale, "negative_prompt": ""}
        else:
            call["guidance_scale"] = guidance_scale
    return call


def _pipeline_model(path: Path, family: Family | None, name: str, found: str, wanted: Wanted) -> Model:
    student = is_student(path)
    if student:
        _refuse_for_student(wanted)
    call = stock_call(path, family, *((None, None) if student else (wanted.steps, wanted.guidance_scale)))
    dtype = getattr(torch, wanted.dtype)
    if family is None:
        pipeline = any_pipeline(path, device=wanted.device, dtype=dtype, trust=wanted.trust_remote_code)
    else:
        pipeline = load_pipeline(path, device=wanted.device, dtype=dtype)
    if getattr(pipeline, "safety_checker", None) is not None:  # it would blacken images, and nobody measures with it
        pipeline.safety_checker = None
    takes = inspect.signature(pipeline.__call__).parameters
    conditions = "prompts" if "prompt" in takes else "classes" if "class_labels" in takes else "none"

    def images(indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None) -> Tensor:
        what: dict[str, Any] = {"batch_size": len(indices)} if conditions == "none" else {}
        if conditions == "prompts":
            what = {"prompt": list(captions or [])}  # a new list: some pipelines write into it
        elif conditions == "classes":
            assert labels is not None
            what = {"class_labels": labels.tolist()}
        generators = image_generators(seed, indices)
        with attention(pipeline, wanted.attention), seeded_steps(pipeline, generators):
            got = pipeline(**what, **call, generator=generators, output_type="np")
        if not hasattr(got, "images"):
            raise UserError(f"eval: {name} makes videos, and the protocols are of images")
        return _eight_bit(torch.as_tensor(got.images).float().permute(0, 3, 1, 2), name)

    classes = describe(path).num_classes if family is not None and conditions == "classes" else None
    steps = call.get("num_inference_steps")
    return Model(name, found, conditions, classes, steps, call, torch.no_grad()(images))


def any_pipeline(path: Path, *, device: torch.device, dtype: torch.dtype, trust: bool = False) -> Any:
    """A pipeline of no family of ours; UserError where it does not load, or brings its own code and is not trusted."""
    kind = read_json(path / "model_index.json").get("_class_name")
    if isinstance(kind, list) and not trust:
        told = f"{path} carries a pipeline of its own, {kind[0]}.py, and code of a folder is run only if you say so"
        raise UserError(f"eval: {told}: --trust-remote-code")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path, use_safetensors=True, trust_remote_code=trust, **in_half(dtype)
        )
    except Exception as error:  # whatever the parts of an unknown pipeline raise
        raise UserError(f"eval: the pipeline in {path} does not load ({first_line(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _refuse_for_student(wanted: Wanted) -> None:
    for name in ("steps", "guidance_scale"):
        if wanted.strict and getattr(wanted, name) is not None:
            raise UserError(f"{name}: {getattr(wanted, name)} was given, and a student's own are part of it")


def _eight_bit(images: Tensor, name: str) -> Tensor:
    """Images in [0, 1] as uint8, rounded to nearest."""
    if not bool(images.isfinite().all()):
        raise UserError(f"eval: the images of {name} are not finite; its training diverged")
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _images(path: Path) -> Model:
    """Image files in sorted order, as they are: all of one size and mode."""
    found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files:
        raise UserError(f"eval: {str(path)!r} holds no pipeline (model_index.json) and no images")
    numbers = [[int(n) for n in re.findall(r"\d+", file.name)] for file in files]
    if all(numbers) and sorted(numbers) != numbers and len({file.parent for file in files}) == 1:
        raise UserError(
            f"eval: the files of {str(path)!r} are not in the order of their numbers, by which captions are "
            "compared; call them 00000.png, 00001.png, .."
        )
    first, digest = None, hashlib.blake2b(digest_size=8)
    for file in files:
        with naming_image(str(file)), Image.open(file) as image:
            kind = (image.mode, *image.size)
        if image.mode not in ("L", "RGB"):
            raise UserError(f"eval: {file} is of mode {image.mode}; give RGB or grey images without alpha or palette")
        first = first or kind
        if kind != first:
            one, other = (f"{width}x{height} {mode}" for mode, width, height in (kind, first))
            raise UserError(f"eval: {file} is {one} where {files[0].name} is {other}; give images of one kind")
        digest.update(file.name.encode())
        hash_file(digest, file)
    data = open_data(str(path))
    if len(data) != len(files):
        told = f"{str(path)!r} has {len(files)} image files and {len(data)} of them are read as data"
        raise UserError(f"eval: {told} (it holds splits or a metadata.jsonl); give a folder of images alone")

    def images(indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None) -> Tensor:
        return as_bytes(data.get(torch.tensor(indices)).images)

    return Model(path.resolve().name, digest.hexdigest(), "images", None, None, {}, images, count=len(files))
