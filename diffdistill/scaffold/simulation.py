"""Backward simulation: a student of several steps is trained on inputs that its own sampler makes.

Yin et al. 2024, arXiv:2405.14867, section 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import student_levels
from diffdistill.players.sampler import Sampler
from diffdistill.rng import generator
from diffdistill.scaffold.method import Batch


def drawn_level(levels: int, batch: Batch, purpose: str = "student/level") -> int:
    """Which of so many levels a step trains: drawn for the step, the same in all processes."""
    draw = generator("cpu", *batch.key[:2], purpose)  # without the rank
    return int(torch.randint(levels, (), generator=draw))


def simulated_input(sampler: Sampler, k: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t (B, ...) and t (B,) that level k of the sampler reads, without gradients."""
    with torch.no_grad():
        return sampler.input_at(k, batch.randn("z"), batch.cond, lambda j: batch.randn(f"z {j}"))


@torch.no_grad()
def sampled_path(sampler: Sampler, batch: Batch, name: str) -> list[Tensor]:
    """What each level of the sampler reads (B, ...), and x0 (B, ...) at the end, with noise of that name."""
    z = batch.randn(f"{name} z")
    (x, t), path = sampler.start(z), []
    for k in range(len(sampler.levels)):
        if k:
            x, t = sampler.moved(x, t, k, batch.cond, lambda k=k: batch.randn(f"{name} z {k}"))  # type: ignore[misc]
        path.append(x)
    return [*path, sampler.predict(x, t, len(sampler.levels) - 1, batch.cond).x0]


@torch.no_grad()
def simulated_through(sampler: Sampler, times: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t (B, ...) and t (B,) after a denoising and fresh noise for each of the angles (B,), without gradients.

    The angles stand for the sampler's own levels, of which only the first is read.
    """
    x, t = sampler.start(batch.randn("z"))
    for j, s in enumerate(times, 1):
        x, t = diffuse(sampler.denoiser(x, t, batch.cond).x0, s, batch.randn(f"z {j}")), s
    return x, t


def rolled_out(student: Denoiser, steps: Sequence[int], level: float | None, batch: Batch) -> Tensor:
    """Samples x0 (B, ...) of a student with two times, by at most three jumps, all with gradients (AnyFlow, stage 2).

    One of the step's grids, of N levels, and k in it are drawn, the same in all processes: from the first level to the
    k-th, to the next, and to the end.
    """
    draw = generator("cpu", *batch.key[:2], "student/rollout")  # without the rank
    n = steps[int(torch.randint(len(steps), (), generator=draw))]
    k = int(torch.randint(n, (), generator=draw))
    levels = student_levels(student.schedule, n, level)
    x, t = Sampler(student, levels.tolist()).start(batch.randn("z"))
    angles = [*student.schedule.angle(levels).tolist(), 0.0]
    for angle in sorted({angles[k], angles[k + 1], 0.0} - {angles[0]}, reverse=True):
        r = torch.full_like(t, angle)
        x, t = student(x, t, batch.cond, Extra(r=r)).at(r), r
    return x
