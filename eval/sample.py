"""Pictures of a teacher's or a student's images, and of what a latent model expects at each step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.attention_choice import check_attention
from diffdistill.core.guidance import refuse_second_scale
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import LinearFlow
from diffdistill.data.folder import condition_picture
from diffdistill.errors import UserError, first_line, shown
from diffdistill.eval.models import ModelLike, model_folder, pixel_sampler
from diffdistill.eval.stock_call import steered, stock_call
from diffdistill.eval.videos import is_video, save_sounds, save_videos
from diffdistill.families import (
    Family,
    around_steps,
    attention_of,
    describe,
    family_of,
    is_student,
    load_pipeline,
    local_folder,
    schedule_of,
)
from diffdistill.options import Size
from diffdistill.pictures import image_grid, opaque, save_png
from diffdistill.pipelines.shipped.student_pipeline import seeded_steps
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

BATCH = 256
FPS = 16
"""Frames a second of a video's file, as Wan's are shown."""


@dataclass(frozen=True)
class SampleRequest:
    """What is drawn, and how; None is the default of each."""

    prompts: Sequence[str] = ()
    images: Sequence[str | os.PathLike[str]] = ()  #: files, in turn, of what a model changes
    images_per_prompt: int = 1  #: how many of them go with one prompt
    count: int | None = None
    classes: Sequence[int] = ()
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None  #: of the second of two networks; None: the same
    negative_prompt: str | None = None
    resolution: Size | None = None  #: of a latent teacher
    frames: int | None = None  #: of a teacher of videos
    seed: int = 0
    attention: str = "auto"
    as_video: bool = False  #: refuses a model of images, and a trace
    trace: bool = False  #: of a latent model: a row an image, a column for what the model expects after each step
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W) in [-1, 1], of videos their first frames, and how many a row of a picture has."""

    images: Tensor
    columns: int
    enlarged: int = 1  #: pixels a side of one of the images' pixels, in the picture
    videos: Tensor | None = None  #: (N, F, C, H, W) in [-1, 1], of a model of videos
    sounds: Tensor | None = None  #: (N, channels, samples) in [-1, 1], of a model of videos with sound
    sound_rate: int = 0  #: samples of them a second

    def save(self, path: str | os.PathLike[str], fps: int = FPS) -> Path:
        """As one PNG or, of videos under the name of an .mp4 or .gif, as one video of `fps` frames a second.

        Their sounds are in .wav files beside it.
        """
        if not is_video(path):
            return save_png(image_grid(self.images, self.columns, scale=self.enlarged), Path(path))
        if self.videos is None:
            raise UserError(f"out: {shown(os.fspath(path))} is the name of a video, and these are images; give a .png")
        saved = save_videos(self.videos, path, self.columns, fps)
        if self.sounds is not None:
            save_sounds(self.sounds, path, self.sound_rate)
        return saved


def draw_samples(model: ModelLike, request: SampleRequest) -> Samples:
    """Images of a student or a teacher. UserError for what the model does not take."""
    check_attention(request.attention, request.device)
    if isinstance(model, str | os.PathLike):
        folder = local_folder(str(model_folder(model)))
        family, _ = family_of(folder)
        if family.autoencoder is not None:
            return _stock_samples(folder, family, request)
        model = folder
    name = str(model) if isinstance(model, Path) else "the model"
    _check_video(request, name, False)
    if request.trace:
        raise UserError(f"trace: {name!r} is a model of pixels, and a trace is of latent models; leave it out")
    for option in ("resolution", "frames"):
        if getattr(request, option) is not None:
            raise UserError(f"{option}: {name!r} is a model of pixels, which takes no {option}; leave it out")
    for option, given in (("prompt", request.prompts), ("negative_prompt", request.negative_prompt is not None)):
        if given:
            raise UserError(f"{option}: {name!r} takes no prompts; use --classes")
    if request.images:
        raise UserError(f"image: {name!r} reads no image; leave it out")
    if is_student(model) if isinstance(model, Path) else isinstance(model, tuple):
        for option in ("steps", "guidance_scale", "guidance_scale_2"):
            if (value := getattr(request, option)) is not None:
                raise UserError(f"{option}: {value} was given, and a student has its own; leave it out")
    refuse_second_scale(request.guidance_scale_2, repr(name))
    scale = 1.0 if request.guidance_scale is None else request.guidance_scale
    draw, teacher, _ = pixel_sampler(model, request.steps, scale)
    teacher.denoiser.to(request.device)
    labels = _labels(teacher, request.count or 64, request.classes)
    images = []
    for indices in torch.arange(request.count or 64).split(BATCH):
        cond = {} if labels is None else {"class_labels": labels[indices].to(request.device)}
        with attention_of(teacher.denoiser, request.attention):
            images.append(draw(cond, image_generators(request.seed, indices.tolist())).float().cpu())
    return Samples(torch.cat(images), min(teacher.num_classes or 8, 10), max(1, 64 // teacher.shape[-1]))


@torch.no_grad()
def _stock_samples(folder: Path, family: Family, request: SampleRequest) -> Samples:
    """Images of a latent model by its own stock pipeline, as anybody would draw them; guidance is in its own units.

    With `trace` a row an image instead, a column the image that the model expects after a step (DT-visualisation,
    Gandikota & Bau 2025, arXiv:2503.10637).
    """
    prompts, classes, text = request.prompts, request.classes, family.conditions == "text"
    _check_video(request, str(folder), family.videos)
    if request.trace and not (family.autoencoder and family.autoencoder.encodes):
        raise UserError(f"trace: a step of {shown(str(folder))} is seen in a part of its sample; leave it out")
    if text != bool(prompts) or (text and classes):
        raise UserError(f"prompt: {str(folder)!r} takes {'a prompt; give --prompt' if text else 'none; use --classes'}")
    if classes:
        _check_classes(classes, describe(folder).num_classes or 0)
    if not text and request.negative_prompt is not None:
        raise UserError(f"negative_prompt: {str(folder)!r} takes no prompts; leave it out")
    pipeline, call, pictures = _ready(folder, family, request)
    count = request.count or 4
    images: list[Tensor] = []
    videos: list[Tensor] = []
    sounds: list[Tensor] = []
    columns = min(count, 4)
    for i, generator in enumerate(image_generators(request.seed, range(count))):
        labels = classes or range(10)
        inputs: dict[str, Any] = (
            {"prompt": prompts[i % len(prompts)]} if text else {"class_labels": [labels[i % len(labels)]]}
        )
        inputs |= {"image": pictures[i % len(pictures)]} if pictures else {}
        if request.trace:
            with (
                drawing(folder),
                attention_of(pipeline, request.attention),
                seeded_steps(pipeline, generator),
                traced(pipeline) as expected,
            ):
                pipeline(**inputs, **call, generator=generator, output_type="latent" if text else "np")
            images += [decoded(pipeline, family, x0[:1], call) for x0 in expected]
            columns = len(expected)
            continue
        with drawing(folder), attention_of(pipeline, request.attention), seeded_steps(pipeline, generator):
            output = pipeline(**inputs, **call, generator=generator, output_type="pt" if text else "np")
        picture = torch.as_tensor(output.frames if hasattr(output, "frames") else output.images).float()
        if picture.ndim == 5:
            videos.append(2 * picture - 1)
            picture = picture[:, 0]
        if hasattr(output, "audio"):
            sounds.append(output.audio.float().cpu())
        images.append(2 * opaque(picture if text else picture.permute(0, 3, 1, 2)) - 1)
    made = Samples(torch.cat(images), columns, videos=torch.cat(videos) if videos else None)
    if not sounds:
        return made
    return replace(made, sounds=torch.cat(sounds), sound_rate=pipeline.vocoder.config.output_sampling_rate)


def _ready(folder: Path, family: Family, request: SampleRequest) -> tuple[Any, dict[str, Any], list[Any]]:
    """The stock pipeline, the arguments of its call, and the images that it is given in turn."""
    fixed = ("steps", "guidance_scale_2", "negative_prompt", "resolution", "frames")
    for option in fixed if is_student(folder) else ():
        if (value := getattr(request, option)) is not None:
            raise UserError(f"{option}: {shown(value)} was given, and a student has its own; leave it out")
    _check_images(folder, family, request)
    guidance = (request.guidance_scale, request.negative_prompt, request.guidance_scale_2)
    call = stock_call(folder, family, request.steps, *guidance)
    call |= _size(folder, family, request)
    if request.images:
        call = {**describe(folder).size, **call}
    pictures: list[Any] = [condition_picture(name, (call["height"], call["width"])) for name in request.images]
    if family.several:
        each = request.images_per_prompt
        pictures = [pictures[k : k + each] for k in range(0, len(pictures), each)]
    pipeline = load_pipeline(folder, device=request.device)
    return pipeline, steered(pipeline, family, call), pictures


def _check_images(folder: Path, family: Family, request: SampleRequest) -> None:
    """UserError for images that the model does not take, or another number of them."""
    given, each = len(request.images), request.images_per_prompt
    if (family.reads_image and not given) or (given and not (family.reads_image or family.several)):
        does = "begins with" if family.videos else "changes"
        right = f"{does} an image; give --image FILE" if family.reads_image else "reads no image; leave it out"
        raise UserError(f"image: {str(folder)!r} {right}")
    if each > 1 and not family.several:
        raise UserError(f"images_per_prompt: {each} was given, and {str(folder)!r} takes one image a prompt; give 1")
    if given % each or (each > 1 and not given):
        raise UserError(f"image: {given} were given, and --images-per-prompt is {each}; give {each}, or a multiple")


def _check_video(request: SampleRequest, name: str, videos: bool) -> None:
    """UserError for a video of a model of images, or of a trace."""
    if request.as_video and not videos:
        raise UserError(f"out: it is the name of a video, and {shown(name)} makes images; give a .png")
    if request.as_video and request.trace:
        raise UserError("trace: it is of first frames, which are no video; give a .png")


def _size(folder: Path, family: Family, request: SampleRequest) -> dict[str, int]:
    """The arguments of the stock pipeline's call for the size that is asked for; UserError for one that it lacks."""
    if request.frames is not None and not family.videos:
        raise UserError(f"frames: {request.frames} was given, and {family.name} makes images; leave it out")
    if (request.resolution, request.frames) == (None, None):
        return {}
    size = describe(folder, request.resolution, request.frames).size
    known = {"height": request.resolution, "width": request.resolution, "num_frames": request.frames}
    known["frames"] = request.frames  # as some pipelines call them (`Teacher.frames`)
    return {name: value for name, value in size.items() if known.get(name, True) is not None}


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """UserError for whatever a stock pipeline raises whose folder loads and does not fit together."""
    try:
        yield
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"sample: the stock pipeline of {folder} cannot draw ({reason})") from error


@contextmanager
def traced(pipeline: Any) -> Iterator[list[Tensor]]:
    """While it lasts, the x0 that the network expects at each step of the pipeline's scheduler is appended to a list.

    They are latents of the pipeline's own shape. Raises UserError for a scheduler that is not supported.
    """
    scheduler, expected = pipeline.scheduler, []
    shifts = {"use_dynamic_shifting": False}  # a shift moves the grid, never what a sigma means
    schedule, output = schedule_of({**scheduler.config, "_class_name": type(scheduler).__name__, **shifts})

    def around(stepping: Any, own: Callable[[], Any], told: dict[str, Any]) -> Any:
        timestep, sample = told["timestep"], told["sample"]
        # What the network read; flow matching's schedulers leave it as it is.
        x = getattr(scheduler, "scale_model_input", lambda x, t: x)(sample, timestep)
        result = own()
        level = torch.as_tensor(timestep, dtype=torch.float64).cpu()
        if isinstance(schedule, LinearFlow):
            level = level / schedule.train_timesteps
            if scheduler.config.get("use_flow_sigmas"):  # its timesteps are rounded
                level = scheduler.sigmas[scheduler.step_index - 1].double().cpu()
        t = schedule.angle(level).reshape(1)
        native = schedule.native(t)
        a, b = output.at(native.alpha, native.sigma, schedule.data_std)
        x_t = x.float() / float(native.scale)
        x0 = Prediction(x_t, t, told["model_output"].float(), a * schedule.data_std, b).x0
        expected.append(x0 * schedule.data_std)
        return result

    with around_steps(scheduler, around):
        yield expected


def decoded(pipeline: Any, family: Family, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of latents of the pipeline's shape; a video's first frame."""
    assert family.autoencoder is not None
    if family.packing is not None and latents.ndim == family.packing.dims:
        config = dict(pipeline.vae.config)
        sides = (_side(pipeline, call, side) // family.autoencoder.factor(config) for side in ("height", "width"))
        shape = (family.autoencoder.channels(config), *sides) if latents.ndim == 3 else latents.shape[1:]
        latents = family.packing.unpack(latents, shape)
    images = family.autoencoder.decode(pipeline.vae, latents.to(pipeline.vae.dtype)).float().clamp(-1, 1)
    return images[:, :, 0] if images.ndim == 5 else images


def _side(pipeline: Any, call: dict[str, Any], name: str) -> int:
    """Height or width in pixels of a pipeline's call, its own where the call does not say it."""
    if name in call:
        return int(call[name])
    usual = {key: each.default for key, each in inspect.signature(pipeline.__call__).parameters.items()}
    own = usual[name] or usual.get("output_resolution")
    return int(own or pipeline.default_sample_size * pipeline.vae_scale_factor)


def _labels(teacher: Teacher, count: int, classes: Sequence[int]) -> Tensor | None:
    if teacher.num_classes is None:
        if classes:
            raise UserError(f"classes: {list(classes)} were given and this model has no classes; leave them out")
        return None
    cycle = list(classes or range(teacher.num_classes))
    _check_classes(cycle, teacher.num_classes)
    return torch.tensor([cycle[i % len(cycle)] for i in range(count)])


def _check_classes(classes: Sequence[int], known: int) -> None:
    for label in classes:
        if label >= known:
            raise UserError(f"classes: {label} is not among the {known} classes 0 to {known - 1}")
