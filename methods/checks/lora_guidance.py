"""Exact checks of lora_guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.core.schedule import sampling_grid
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, two_points
from diffdistill.methods.lora_guidance import Config, LoRAGuidance
from diffdistill.scaffold.method import Batch


def verify() -> Iterator[Check]:
    """Section 6.2's sanity items (6.1's first and third), on classes and "no class" of one variance."""
    means, std = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double(), torch.tensor([0.5, 1.3]).double()
    teacher, a, label = class_gaussians_teacher(means, std), 3.0, 1
    aim = means[-1] + a * (means - means[-1])  # the guided network is that of these means, in closed form
    x, _ = two_points(2)
    cond = {"class_labels": torch.full((len(x),), label)}

    def method_of(means: Tensor, **options: object) -> LoRAGuidance:
        student = class_gaussians_teacher(means, std).denoiser
        config = Config(guidance_scale=a, **options)  # type: ignore[arg-type]
        return LoRAGuidance(teacher, config, student=student)

    for t in (0.3, 0.9, 1.4):
        angle = torch.full((len(x),), t).double()
        cos, sin = torch.cos(angle[0]), torch.sin(angle[0])
        var = cos**2 * std**2 + sin**2
        # v = slope (x - cos m) - sin m moves with the mean m by -sin/V.
        start, _ = method_of(means).imitation(x, angle, cond)
        wanted = (a - 1) ** 2 * ((sin / var * (means[label] - means[-1])) ** 2).mean()
        yield equal(f"at the start the loss is (a - 1)^2 E|v_c - v_u|^2, t = {t}", wanted, start, 1e-12)
        yield differs(f"... which w for a would not give, t = {t}", a**2 / (a - 1) ** 2 * wanted, start, 1e-6)

        elsewhere = torch.tensor([[0.2, 0.1], [0.4, -1.0], [1.0, 1.0]]).double()
        method = method_of(elsewhere)
        loss, target = method.imitation(x, angle, cond)
        slope = torch.zeros(3, 2).double()
        slope[label] = 2 * (sin / var) ** 2 * (elsewhere[label] - aim[label]) / 2  # the mean over two dimensions
        got = gradient(loss, next(method.student.parameters()))
        yield equal(f"its gradient in the means, t = {t}", slope.flatten(), got, 1e-12)
        guided_v = class_gaussians_teacher(aim, std).denoiser(x, angle, cond).v
        yield equal(f"the target is the guided velocity, t = {t}", guided_v, target.v, 1e-12)

        method = method_of(aim)
        loss, _ = method.imitation(x, angle, cond)
        yield equal(f"zero at the guided means, t = {t}", 0.0, loss, 1e-24, scale=1.0)
        yield equal(f"... and its gradient, t = {t}", 0.0, gradient(loss, *method.student.parameters()), 1e-12, scale=1)

    # The same loss from a whole turn, at the points that the turn draws.
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = {"class_labels": torch.arange(16) % 2}
    batch = Batch(16, (2,), labels, x0, torch.device("cpu"), (0, 0, 0))

    def wanted_at(t: Tensor) -> Tensor:
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        apart = sin / (cos**2 * std**2 + sin**2) * (means[labels["class_labels"]] - means[-1])
        return (a - 1) ** 2 * apart.square().mean()

    method = method_of(means)
    times = math.pi / 2 * torch.rand(16, generator=batch.generator("student/t"), dtype=torch.float64)
    yield equal("a turn on noised data", wanted_at(times), method.on_data(batch).loss, 1e-9)
    method = method_of(means, trajectories=True, trajectory_steps=4)
    turn, times = method.on_trajectories(batch).loss, sampling_grid(method.schedule, 4)[torch.arange(16) // 4]
    yield equal("a turn at staggered points of trajectories", wanted_at(times), turn, 1e-9)

    sampler = method_of(aim, sampling_steps=7).sampler()
    grid, mean = sampling_grid(teacher.denoiser.schedule, 7), aim[labels["class_labels"]]
    closed = x0
    for t_now, s in pairwise(grid):
        rho = torch.cos(t_now) * std**2 / (torch.cos(t_now) ** 2 * std**2 + torch.sin(t_now) ** 2)
        factor = torch.cos(s) * rho + torch.sin(s) * (1 - torch.cos(t_now) * rho) / torch.sin(t_now)
        closed = torch.cos(s) * mean + factor * (closed - torch.cos(t_now) * mean)
    x_t, last = sampler.input_at(6, x0, labels, lambda j: torch.full_like(x0, torch.nan))  # no noise is added
    got = sampler.denoiser(x_t, last, labels).x0
    yield equal("an exact student samples the guided trajectory, one pass a step", closed, got, 1e-12)
