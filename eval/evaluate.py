"""Comparing a student with its teacher at several numbers of steps, from the same noise.

Sample i is a function of (seed, i): its noise comes from its own generator and its class from the i-th real
image, whatever the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, sample_ode
from diffdistill.data.images import Data, open_data
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.features.digit_classifier import DigitClassifier, load_digit_classifier
from diffdistill.eval.metrics import attributes
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.kernel import kernel_distance
from diffdistill.eval.metrics.manifold import precision_recall
from diffdistill.eval.metrics.moments import statistics
from diffdistill.eval.metrics.scores import class_agreement
from diffdistill.eval.report import check_writable, markdown_table, text_table, write_json, write_text
from diffdistill.families import METADATA, is_student, load_student, load_teacher, student_record
from diffdistill.pictures import save_png, side_by_side
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

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


def draws_of(
    models: Sequence[Path], teacher: str | None, teacher_steps: Sequence[int]
) -> tuple[Teacher, str, list[Row]]:
    """The teacher, where it came from, and the rows to draw: its own steps, once for each guidance scale, and students.

    `models` are one teacher, or students of one teacher.
    """
    if not is_student(models[0]):
        judged = on_device(load_teacher(models[0]))
        return judged, str(models[0]), _teacher_rows(judged, teacher_steps, 1.0)
    loaded = [(model, load_student(model), student_record(model)) for model in models]
    first = loaded[0][2]
    source = teacher or first.teacher
    judged = on_device(load_teacher(source, null_class=first.teacher_null_class))
    teachers: list[Row] = []
    students: list[Row] = []
    for model, (sampler, described), record in loaded:
        if (came_from := teacher or record.teacher) != source:
            raise UserError(f"eval: {model} has another teacher ({came_from!r}) than {models[0]} ({source!r})")
        # The student imitates the teacher as it was guided.
        known = {row.model for row in teachers}
        guided_rows = _teacher_rows(judged, teacher_steps, record.guidance.scale)
        teachers += [row for row in guided_rows if row.model not in known]
        sampler.denoiser.to(device())
        name = "student" if len(models) == 1 else model.parent.name
        students.append(Row(name, len(sampler.levels), partial(sampler, described.shape)))
    return judged, source, [*teachers, *students]


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
    check_writable(into)
    judged, source, rows = draws_of(models, teacher, teacher_steps)
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
