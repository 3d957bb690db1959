"""Exact checks of lora_guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import sampling_grid
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.lora_guidance import Config, LoRAGuidance
from diffdistill.scaffold import imitating
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "fixed scale": {
        "guidance_scale": 1.5,
        "lora": "student",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_targets": "all",
        "sampling_steps": 64,
        "steps": 1000,
        "student_lr": 0.002,
    },
}

MEANS, STD = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double(), torch.tensor([0.5, 1.3]).double()
SCALE = 3.0
AIM = MEANS[-1] + SCALE * (MEANS - MEANS[-1])  # the guided network is that of these means, in closed form


def verify() -> Iterator[Check]:
    """Section 6.2's sanity items (6.1's first and third), on classes and "no class" of one variance."""
    for t in (0.3, 0.9, 1.4):
        yield from _loss(t)
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = {"class_labels": torch.arange(16) % 2}
    yield from _turns(x0, labels)
    yield from _sampler(x0, labels)


def _method(means: Tensor, **options: object) -> LoRAGuidance:
    """The method with a student of these means."""
    student = class_gaussians_teacher(means, STD).denoiser
    config = Config(guidance_scale=SCALE, **options)  # type: ignore[arg-type]
    return LoRAGuidance(class_gaussians_teacher(MEANS, STD), config, student=student)


def _one_more(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
    """The mistake of 1 + a for the scale a."""
    return guide(denoiser, x_t, t, cond, scale + 1)


def _loss(t: float) -> Iterator[Check]:
    """The loss and its gradient at the start, elsewhere, and where it is zero."""
    a, label = SCALE, 1
    x, _ = two_points(2)
    cond = {"class_labels": torch.full((len(x),), label)}
    angle = torch.full((len(x),), t).double()
    cos, sin = torch.cos(angle[0]), torch.sin(angle[0])
    var = cos**2 * STD**2 + sin**2
    # v = slope (x - cos m) - sin m moves with the mean m by -sin/V.
    start, _ = _method(MEANS).imitation(x, angle, cond)
    closed = (a - 1) ** 2 * ((sin / var * (MEANS[label] - MEANS[-1])) ** 2).mean()
    yield equal(f"at the start the loss is (a - 1)^2 E|v_c - v_u|^2, t = {t}", closed, start, 1e-12)
    with mistake(imitating, "guide", _one_more):
        wrong, _ = _method(MEANS).imitation(x, angle, cond)
    yield differs(f"... where 1 + a in the teacher is caught, t = {t}", closed, wrong, 1e-6)

    elsewhere = torch.tensor([[0.2, 0.1], [0.4, -1.0], [1.0, 1.0]]).double()
    method = _method(elsewhere)
    loss, target = method.imitation(x, angle, cond)
    slope = torch.zeros(3, 2).double()
    slope[label] = 2 * (sin / var) ** 2 * (elsewhere[label] - AIM[label]) / 2  # the mean over two dimensions
    got = gradient(loss, next(method.student.parameters()))
    yield equal(f"its gradient in the means, t = {t}", slope.flatten(), got, 1e-12)
    guided_v = class_gaussians_teacher(AIM, STD).denoiser(x, angle, cond).v
    yield equal(f"the target is the guided velocity, t = {t}", guided_v, target.v, 1e-12)

    method = _method(AIM)
    loss, _ = method.imitation(x, angle, cond)
    yield equal(f"zero at the guided means, t = {t}", 0.0, loss, 1e-24, scale=1.0)
    yield equal(f"... and its gradient, t = {t}", 0.0, gradient(loss, *method.student.parameters()), 1e-12, scale=1)


def _turns(x0: Tensor, labels: Cond) -> Iterator[Check]:
    """The same loss from a whole turn, at the points that the turn draws."""
    batch = Batch(16, (2,), labels, x0, torch.device("cpu"), (0, 0, 0))

    def closed_at(t: Tensor) -> Tensor:
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        apart = sin / (cos**2 * STD**2 + sin**2) * (MEANS[labels["class_labels"]] - MEANS[-1])
        return (SCALE - 1) ** 2 * apart.square().mean()

    method = _method(MEANS)
    times = math.pi / 2 * batch.uniform("student/t")
    yield equal("a turn on noised data", closed_at(times), method.on_data(batch).loss, 1e-9)
    method = _method(MEANS, trajectories=True, trajectory_steps=4)
    turn, times = method.on_trajectories(batch).loss, sampling_grid(method.schedule, 4)[torch.arange(16) // 4]
    yield equal("a turn at staggered points of trajectories", closed_at(times), turn, 1e-9)


def _sampler(x0: Tensor, labels: Cond) -> Iterator[Check]:
    sampler = _method(AIM, sampling_steps=7).sampler()
    grid, mean = sampling_grid(sampler.denoiser.schedule, 7), AIM[labels["class_labels"]]
    closed = x0
    for t, s in pairwise(grid):
        rho = torch.cos(t) * STD**2 / (torch.cos(t) ** 2 * STD**2 + torch.sin(t) ** 2)
        factor = torch.cos(s) * rho + torch.sin(s) * (1 - torch.cos(t) * rho) / torch.sin(t)
        closed = torch.cos(s) * mean + factor * (closed - torch.cos(t) * mean)
    x_t, last = sampler.input_at(6, x0, labels, lambda j: torch.full_like(x0, torch.nan))  # no noise is added
    got = sampler.denoiser(x_t, last, labels).x0
    yield equal("an exact student samples the guided trajectory, one pass a step", closed, got, 1e-12)
