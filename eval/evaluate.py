"""Comparing a student with its teacher at several numbers of steps, from the same noise.

Sample i is a function of (seed, i): its noise comes from its own generator and its class from the i-th real
image, whatever the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.data import Data, open_data
from diffdistill.denoiser import Cond
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.families import (
    METADATA,
    Family,
    family_of,
    is_student,
    load_pipeline,
    load_student,
    load_teacher,
    local_folder,
    read_metadata,
    schedule_of,
)
from diffdistill.guidance import guided
from diffdistill.ode import ddim_step, sample_ode
from diffdistill.players import Teacher
from diffdistill.prediction import Prediction
from diffdistill.rng import image_generators
from diffdistill.schedule import LinearFlow

from . import attributes
from .digit_classifier import DigitClassifier, load_digit_classifier
from .metrics import class_agreement, frechet_distance, kernel_distance, precision_recall, statistics
from .report import image_grid, markdown_table, save_png, side_by_side, text_table, write_json, write_text

Draw = Callable[[Cond, Sequence[torch.Generator]], Tensor]
"""(conditions, one generator an image) -> images (B, C, H, W) in the data's units."""

COLUMNS = (
    *("model", "steps", "frechet distance", "kernel distance x1000", "precision", "recall"),
    *("class agreement %", "ms per image"),
)


@torch.no_grad()
def teacher_images(
    teacher: Teacher, steps: int, guidance_scale: float, cond: Cond, generators: Sequence[torch.Generator]
) -> Tensor:
    """DDIM (first order) on the teacher's own grid of `steps` steps, from its own initial noise."""
    denoiser = teacher.denoiser
    parameter = next(denoiser.parameters())
    z = torch.stack([torch.randn(teacher.shape, generator=g) for g in generators]).to(parameter)
    x0 = sample_ode(ddim_step, guided(denoiser, guidance_scale), denoiser.schedule, z, steps, cond)
    return x0 * denoiser.schedule.data_std


class Row(NamedTuple):
    """A model at a number of steps."""

    model: str
    steps: int
    draw: Draw


def device() -> torch.device:
    """Where images are drawn."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Drawn:
    """Images of one row and the seconds they took, without the first batch, which warms up."""

    images: Tensor
    seconds_per_image: float


def draw_all(draw: Draw, labels: Tensor | None, count: int, seed: int, batch_size: int = 256) -> Drawn:
    """Images 0..count-1 of the seed."""
    images: list[Tensor] = []
    timed, seconds = 0, 0.0
    where = device()
    for first in range(0, count, batch_size):
        indices = range(first, min(first + batch_size, count))
        cond = {} if labels is None else {"class_labels": labels[list(indices)].to(where)}
        started = time.perf_counter()
        images.append(draw(cond, image_generators(seed, indices)).float().cpu())
        if first > 0 or count <= batch_size:
            seconds += time.perf_counter() - started
            timed += len(indices)
    return Drawn(torch.cat(images), seconds / timed)


class DigitJudge:
    """Distances to the first `count` real images in the feature space of a small classifier; not FID.

    The default network is the shipped classifier of 8x8 digits.
    """

    def __init__(self, data: Data, network: DigitClassifier | None = None, count: int | None = None):
        if network is None and tuple(data.shape) != (1, 8, 8):
            raise UserError(
                f"data: {data.name!r} has samples of shape {tuple(data.shape)}; the feature network that this "
                "version ships is for 8x8 digits, shape (1, 8, 8)"
            )
        self.network = network or load_digit_classifier()
        self.real = self.features(data.get(torch.arange(count or len(data))).images)
        self.statistics = statistics(self.real)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 64)."""
        return torch.cat([self.network.features(part) for part in images.clamp(-1, 1).split(512)])

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        features = self.features(images)
        precision, recall = precision_recall(self.real, features)
        logits = torch.cat([self.network(part) for part in images.clamp(-1, 1).split(512)])
        agreement = None if labels is None else 100 * class_agreement(logits, labels)
        return {
            "frechet distance": frechet_distance(statistics(features), self.statistics),
            "kernel distance x1000": 1000 * kernel_distance(features, self.real),
            "precision": precision,
            "recall": recall,
            "class agreement %": agreement,
        }


def on_device(teacher: Teacher) -> Teacher:
    teacher.denoiser.to(device())
    return teacher


def draws_of(folder: Path, teacher: str | None, teacher_steps: Sequence[int]) -> tuple[Teacher, str, list[Row]]:
    """The teacher, where it came from, and the rows to draw: its own steps, and the student's if there is one."""
    if not is_student(folder):
        judged = on_device(load_teacher(folder))
        return judged, str(folder), _teacher_rows(judged, teacher_steps, 1.0)
    sampler, described = load_student(folder)
    sampler.denoiser.to(device())
    meta = read_metadata(folder)
    source, used = teacher or meta["teacher"], meta["options"]
    judged = on_device(load_teacher(source, null_class=used.get("null_class")))
    # The student imitates the teacher as it was guided.
    rows = _teacher_rows(judged, teacher_steps, used.get("guidance_scale", 1.0))
    return judged, source, [*rows, Row("student", len(sampler.levels), partial(sampler, described.shape))]


def _teacher_rows(teacher: Teacher, teacher_steps: Sequence[int], guidance_scale: float) -> list[Row]:
    name = "teacher" if guidance_scale == 1 else f"teacher, guidance {guidance_scale:g}"
    return [Row(name, steps, partial(teacher_images, teacher, steps, guidance_scale)) for steps in teacher_steps]


def compare(
    teacher: Teacher, rows: Sequence[Row], data: Data, count: int, seed: int
) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """The table, and for the picture twenty images a row, all from the same noise and classes."""
    judge = DigitJudge(data)
    labels = shown_cond = None
    if teacher.num_classes is not None:
        real = data.get(torch.arange(len(data))).labels
        if real is None:
            raise UserError(f"data: {data.name!r} has no labels and the teacher has {teacher.num_classes} classes")
        labels = real[torch.arange(count) % len(data)]
        shown_cond = torch.arange(20) % teacher.num_classes
    table, shown = [], []
    # The first call of a process pays for set-up; without this the first row would look slow.
    draw_all(rows[0].draw, labels, 64, seed)
    for row in rows:
        drawn = draw_all(row.draw, labels, count, seed)
        if not bool(drawn.images.isfinite().all()):
            raise UserError(f"eval: the {row.model}'s images are not finite; its training diverged")
        scores = judge(drawn.images, labels)
        table.append({"model": row.model, "steps": row.steps, **scores, "ms per image": 1000 * drawn.seconds_per_image})
        label = f"{row.model}, {row.steps} step{'' if row.steps == 1 else 's'}"
        shown.append((label, draw_all(row.draw, shown_cond, 20, seed).images))
    return table, shown


def model_folder(folder: str) -> Path:
    """The student or teacher in a run folder; else the folder, hub id or name as it is."""
    runs = (Path(folder) / "student", Path(folder) / "teacher")
    return next((p for p in runs if (p / "model_index.json").is_file()), Path(folder))


def models_in(folder: str) -> list[Path]:
    """The model of `model_folder`, or else the students of the runs in the folder."""
    model = model_folder(folder)
    if (model / "model_index.json").is_file():
        return [model]
    return sorted(path.parent for path in Path(folder).glob("*/student/model_index.json"))


def draws_of_all(
    models: Sequence[Path], teacher: str | None, teacher_steps: Sequence[int]
) -> tuple[Teacher, str, list[Row]]:
    """`draws_of` for students of one teacher, whose rows come once for each guidance scale."""
    judged, source, rows = draws_of(models[0], teacher, teacher_steps)
    if len(models) == 1:
        return judged, source, rows
    teachers, students = rows[:-1], [rows[-1]._replace(model=models[0].parent.name)]
    for model in models[1:]:
        _, came_from, found = draws_of(model, teacher, ())
        if came_from != source:
            raise UserError(f"eval: {model} has another teacher ({came_from!r}) than {models[0]} ({source!r})")
        students.append(found[-1]._replace(model=model.parent.name))
        guidance_scale = read_metadata(model)["options"].get("guidance_scale", 1.0)
        known = {row.model for row in teachers}
        teachers += [r for r in _teacher_rows(judged, teacher_steps, guidance_scale) if r.model not in known]
    return judged, source, [*teachers, *students]


def evaluate_run(
    folder: str, teacher: str | None, teacher_steps: Sequence[int], data: str, count: int | None, seed: int,
    out: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """`diffdistill eval`: prints the table and writes it with its pictures; returns the rows.

    `folder` is a run, or the folder of a student or a teacher, whose model card gets the table too; or a folder of
    runs, whose students are compared in one table.
    """
    root, models = Path(folder), models_in(folder)
    if not models:
        raise UserError(f"eval: {folder!r} holds no student or teacher yet; train one, or make it with export")
    into = Path(out) if out else root / "eval"
    write_text("", into / ".probe").unlink()  # an unwritable folder shows now
    judged, source, rows = draws_of_all(models, teacher, teacher_steps)
    columns: Sequence[str]
    if data.partition(":")[0] == "shapes":
        count, columns, scale = count or attributes.COUNT, attributes.COLUMNS, 2
        table, shown = attributes.compare_attributes(judged, source, rows, count, seed)
        features, told = "attributes read by rules", f"captions of {count} held-out pictures, noise of seed {seed}"
    elif judged.size:
        raise UserError(f"eval: {folder!r} is text-to-image, and {data!r} has no captions to judge by; give shapes")
    else:
        images = open_data(data)
        count, columns, scale = count or len(images), COLUMNS, 6
        table, shown = compare(judged, rows, images, count, seed)
        features = "digit classifier shipped with diffdistill (not Inception: never compare with FID)"
        told = f"{count} images of seed {seed} against {len(images)} real ones, in the features of a small digit "
        told += "classifier (not FID)"
    report = {
        "model": ", ".join(map(str, models)),
        "teacher": source,
        "data": data,
        "count": count,
        "seed": seed,
        "features": features,
        "environment": environment(),
        "rows": table,
    }
    write_json(report, into / "results.json")
    write_text(markdown_table(table, columns), into / "table.md")
    picture = save_png(side_by_side(shown, scale=scale), into / "comparison.png")
    for model in models:
        if (model / METADATA).is_file():  # a folder of ours
            _add_to_card(model / "README.md", f"{markdown_table(table, columns)}\n{told}.\n")
    print(text_table(table, columns))
    print(told)
    print(f"pictures: {picture}" + (f", {root / 'samples'}/" if (root / "samples").is_dir() else ""))
    print(f"table:    {into / 'table.md'}, {into / 'results.json'}")
    return table


def _add_to_card(card: Path, section: str) -> None:
    heading = "\n## Evaluation\n\n"
    before = card.read_text(encoding="utf-8").split(heading)[0]
    write_text(before + heading + section, card)


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
    draw: Draw
    if is_student(model):
        for name, value in (("steps", steps), ("guidance_scale", guidance_scale)):
            if value is not None:
                raise UserError(f"{name}: {value} was given, and a student's own are part of it")
        sampler, teacher = load_student(model)
        sampler.denoiser.to(device())
        draw = partial(sampler, teacher.shape)
    else:
        teacher = on_device(load_teacher(model))
        draw = partial(teacher_images, teacher, steps or 16, 1.0 if guidance_scale is None else guidance_scale)
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
    meta = read_metadata(model)
    known = 0 if text else load_teacher(model).num_classes or 0
    for label in classes or ():
        if label >= known:
            raise UserError(f"classes: {label} is not among the {known} classes 0 to {known - 1}")
    call = dict(meta.get("call") or family.arguments(steps or 20))
    if is_student(model) and steps is not None:
        raise UserError(f"steps: {steps} was given, and a student's own are part of it")
    if guidance_scale is not None:
        if "true_cfg_scale" in call:  # which acts only where a negative prompt is given
            call |= {"true_cfg_scale": guidance_scale, "negative_prompt": ""}
        else:
            call["guidance_scale"] = guidance_scale
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
            with traced(pipeline) as expected:
                pipeline(**what, **call, generator=generator, output_type="latent" if text else "np")
            images += [decoded(pipeline, family, x0[:1], call) for x0 in expected]
            columns = len(expected)
            continue
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

    scheduler.step = step
    try:
        yield expected
    finally:
        del scheduler.step


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
    for label in wanted:
        if label >= teacher.num_classes:
            raise UserError(
                f"classes: {label} is not among the {teacher.num_classes} classes 0 to {teacher.num_classes - 1}"
            )
    return torch.tensor([wanted[i % len(wanted)] for i in range(count)])
