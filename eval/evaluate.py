"""Comparing a student with its teacher at several numbers of steps, from the same noise.

Sample i is a function of (seed, i): its noise comes from its own generator and its class from the i-th real
image, whatever the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.config import run_options
from diffdistill.data import Data, open_data
from diffdistill.denoiser import Cond
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.families import load_student, load_teacher
from diffdistill.guidance import guided
from diffdistill.ode import ddim_step, solve
from diffdistill.players import Teacher
from diffdistill.rng import image_generators

from .digit_classifier import load_digit_classifier
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
    grid = denoiser.schedule.grid(steps)
    parameter = next(denoiser.parameters())
    z = torch.stack([torch.randn(teacher.shape, generator=g) for g in generators]).to(parameter)
    x = z * denoiser.schedule.init_scale(float(grid[0]))
    x0 = solve(ddim_step, guided(denoiser, guidance_scale), x, grid, cond)
    return x0 * denoiser.schedule.data_std


@dataclass(frozen=True)
class Drawn:
    """Images of one row and the seconds they took, without the first batch, which warms up."""

    images: Tensor
    seconds_per_image: float


def draw_all(draw: Draw, labels: Tensor | None, count: int, seed: int, batch_size: int = 256) -> Drawn:
    """Images 0..count-1 of the seed."""
    images: list[Tensor] = []
    timed, seconds = 0, 0.0
    for first in range(0, count, batch_size):
        indices = range(first, min(first + batch_size, count))
        cond = {} if labels is None else {"class_labels": labels[list(indices)]}
        started = time.perf_counter()
        images.append(draw(cond, image_generators(seed, indices)).float().cpu())
        if first > 0 or count <= batch_size:
            seconds += time.perf_counter() - started
            timed += len(indices)
    return Drawn(torch.cat(images), seconds / timed)


class DigitJudge:
    """Distances to the real digits in the feature space of the shipped digit classifier; not FID."""

    def __init__(self, data: Data):
        if tuple(data.shape) != (1, 8, 8):
            raise UserError(
                f"data: {data.name!r} has samples of shape {tuple(data.shape)}; the feature network that this "
                "version ships is for 8x8 digits, shape (1, 8, 8)"
            )
        self.network = load_digit_classifier().eval()
        self.real = self._features(data.get(torch.arange(len(data))).images)
        self.statistics = statistics(self.real)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.network.features(part) for part in images.clamp(-1, 1).split(512)])

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        features = self._features(images)
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


def compare(
    student_folder: str | Path,
    teacher_source: str,
    teacher_steps: Sequence[int],
    data: Data,
    count: int | None,
    seed: int,
) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """The table's rows, and for the picture ten images a row, all from the same noise."""
    judge = DigitJudge(data)
    sampler, student = load_student(student_folder)
    teacher = load_teacher(teacher_source)
    count = count or len(data)
    if count < 100:
        raise UserError(f"count: {count} images say too little of a distribution; give 100 or more")
    labels = None
    if teacher.num_classes is not None:
        real = data.get(torch.arange(len(data))).labels
        assert real is not None
        labels = real[torch.arange(count) % len(data)]
    draws: list[tuple[str, int, Draw]] = [
        ("teacher", steps, lambda cond, gens, n=steps: teacher_images(teacher, n, 1.0, cond, gens))
        for steps in teacher_steps
    ]
    draws.append(("student", len(sampler.levels), lambda cond, gens: sampler(student.shape, cond, gens)))
    rows, shown = [], []
    # The first call of a process pays for set-up; without this the first row would look slow.
    draws[0][2]({} if labels is None else {"class_labels": labels[:64]}, image_generators(seed, range(64)))
    for name, steps, draw in draws:
        drawn = draw_all(draw, labels, count, seed)
        rows.append(
            {
                "model": name,
                "steps": steps,
                **judge(drawn.images, labels),
                "ms per image": 1000 * drawn.seconds_per_image,
            }
        )
        cond = {} if labels is None else {"class_labels": torch.arange(20) % teacher.num_classes}
        plural = "" if steps == 1 else "s"
        shown.append((f"{name}, {steps} step{plural}", draw(cond, image_generators(seed, range(20)))))
    return rows, shown


def evaluate_run(
    folder: str, teacher: str | None, teacher_steps: Sequence[int], data: str, count: int | None, seed: int,
    out: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """`diffdistill eval`: prints the table and writes it with its pictures; returns the rows."""
    root = Path(folder)
    is_run = (root / "config.yaml").is_file()
    student = root / "student" if is_run else root
    if not (student / "model_index.json").is_file():
        raise UserError(f"eval: {str(student)!r} has no student yet; train it, or make it with `diffdistill export`")
    source = teacher or (run_options(root)["teacher"] if is_run else "digits")
    images = open_data(data)
    rows, shown = compare(student, source, teacher_steps, images, count, seed)
    into = Path(out) if out else root / "eval"
    report = {
        "student": str(student),
        "teacher": source,
        "data": data,
        "count": count or len(images),
        "seed": seed,
        "features": "digit classifier shipped with diffdistill (not Inception: never compare with FID)",
        "environment": environment(),
        "rows": rows,
    }
    write_json(report, into / "results.json")
    write_text(markdown_table(rows, COLUMNS), into / "table.md")
    picture = save_png(side_by_side(shown, scale=6), into / "comparison.png")
    print(text_table(rows, COLUMNS))
    print(f"distances to {len(images)} real images in the features of a small digit classifier (not FID)")
    print(f"pictures: {picture}" + (f", {root / 'samples'}/" if is_run else ""))
    print(f"table:    {into / 'table.md'}, {into / 'results.json'}")
    return rows


def sample_picture(
    folder: str,
    count: int,
    classes: Sequence[int] | None,
    steps: int | None,
    guidance_scale: float,
    seed: int,
    out: str,
) -> Path:
    """`diffdistill sample`: images of a student's or a teacher's folder as one PNG."""
    teacher = load_teacher(folder)
    labels = _labels(teacher, count, classes)
    draw: Draw
    if steps is None and _is_student(folder):
        sampler, student = load_student(folder)
        draw = lambda cond, gens: sampler(student.shape, cond, gens)  # noqa: E731
    else:
        draw = lambda cond, gens: teacher_images(teacher, steps or 16, guidance_scale, cond, gens)  # noqa: E731
    drawn = draw_all(draw, labels, count, seed)
    columns = teacher.num_classes or 8
    return save_png(image_grid(drawn.images, columns, scale=max(1, 64 // teacher.shape[-1])), Path(out))


def _is_student(folder: str) -> bool:
    try:
        load_student(folder)
    except UserError:
        return False
    return True


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
