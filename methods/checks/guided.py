"""Exact checks of guided."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, call_by_keyword, scale_by_keyword
from diffdistill.core.guidance import guide
from diffdistill.core.ode import Denoise, ddim_step, inverse_ddim
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.exact.guided_steps import GuidedClass
from diffdistill.methods import guided
from diffdistill.methods.guided import Config, GuidedDistillation
from diffdistill.players.sampler import Sampler
from diffdistill.scaffold import halving
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "start_steps": 64,
        "final_steps": 1,
        "stage_steps": 350,
        "student_lr": 0.002,
        "lr_schedule": "constant",
        "ema": 0.0,
        "guidance_min": 1.0,
        "guidance_max": 2.0,
        "guidance_scale": 1.5,
        "guidance_steps": 400,
        "steps": 2500,
        "weight": "truncated_snr",
    },
}


class _PerNode(nn.Module):
    """x0 = slope x_t + base + scale gain, each its own at each angle of a grid, for one class: any guided step fits."""

    def __init__(self, grid: Tensor, d: int):
        super().__init__()
        self.grid = nn.Buffer(grid)
        self.weights = nn.Parameter(torch.zeros(len(grid), 3, d, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        slope, base, gain = self.weights[(t[:, None] - self.grid).abs().argmin(1)].unbind(1)
        return slope * x_t + base + guidance_scale[:, None] * gain

    def fit(self, node: int, x_t: Tensor, scale: Tensor, x0: Tensor) -> None:
        """Least squares at one node, per dimension."""
        for d in range(x_t.shape[1]):
            known = torch.stack([x_t[:, d], torch.ones_like(scale), scale], 1)
            self.weights.data[node, :, d] = torch.linalg.lstsq(known, x0[:, d]).solution


def _one_more(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
    """The mistake of 1 + a for the scale a."""
    return guide(denoiser, x_t, t, cond, scale + 1)


def _one_step_target(teacher: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """The mistake of leaving the middle out."""
    with torch.no_grad():
        return inverse_ddim(ddim_step(teacher, x_t, t, s, cond), x_t, t, s)


def _at_scale(scale: Tensor, network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, time, **cond, guidance_scale=scale)


class _Plane(GuidedClass):
    """With the method."""

    def method(self, **options: object) -> tuple[GuidedDistillation, _PerNode]:
        """The method with a student of nothing, and the student's network."""
        network, schedule = _PerNode(self.grid, 2), self.teacher.denoiser.schedule
        student = Denoiser(network, schedule, OUTPUTS["sample"], extra_call=scale_by_keyword(call_by_keyword))
        config = Config(**{"start_steps": 8, "guidance_steps": 1, "stage_steps": 1} | options)  # type: ignore[arg-type]
        return GuidedDistillation(self.teacher, config, student=student), network


def verify() -> Iterator[Check]:
    """Section 5.2's sanity items, on a class and "no class" of one variance."""
    plane = _Plane()
    method, network = plane.method()
    for i in range(8):
        yield from _one_pass(plane, method, network, i)
    for stage in range(3):
        yield from _halving(plane, method, network, stage)
    yield from _scales_and_rates(plane)


def _one_pass(plane: _Plane, method: GuidedDistillation, network: _PerNode, i: int) -> Iterator[Check]:
    """Stage one at a node of the grid: a student of nothing, which is then fitted."""
    x_t, scale, cond = plane.x_t, plane.scale, plane.cond
    t, angles = plane.grid[i], plane.grid[torch.full((plane.n,), i)]
    exact = plane.aim + plane.gain(t) * (x_t - torch.cos(t) * plane.aim)
    loss = method.one_pass(x_t, angles, cond, scale).loss
    weight = torch.clamp(torch.tan(t) ** -2, min=1)
    yield equal(f"stage one's loss of a student of nothing, node {i}", (weight * exact**2).mean(), loss, 1e-12)
    network.fit(i, x_t, scale, exact)
    loss = method.one_pass(x_t, angles, cond, scale).loss
    yield equal(f"zero at x_w, node {i}", 0.0, loss, 1e-20, scale=1.0)
    at_optimum = gradient(loss, network.weights)
    yield equal(f"... and its gradient, node {i}", 0.0, at_optimum, 1e-9, scale=1.0)
    with mistake(guided, "guide", _one_more):
        loss = method.one_pass(x_t, angles, cond, scale).loss
    yield differs(f"... where 1 + a in the teacher is caught, node {i}", 0.0, loss, 1e-3, scale=1.0)
    plain = plane.teacher.denoiser(x_t, angles, cond).x0
    with torch.no_grad():
        guided_x0 = method.student(x_t, angles, cond, method.input_of(scale)).x0
        shifted = method.student(x_t, angles, cond, method.input_of(scale - 1)).x0
    null = plane.teacher.denoiser(x_t, angles, {"class_labels": cond["class_labels"] + 1}).x0
    w = (scale - 1)[:, None]
    yield equal(f"x_w = (1 + w) x_c - w x_u, node {i}", (1 + w) * plain - w * null, guided_x0, 1e-9)
    yield differs(f"w given for a is caught, node {i}", guided_x0, shifted, 1e-3)
    across = (guided_x0 - plain) / w
    yield equal(f"x_w - x_c is linear in w, node {i}", across.mean(0).expand(plane.n, 2), across, 1e-6)


def _halving(plane: _Plane, method: GuidedDistillation, network: _PerNode, stage: int) -> Iterator[Check]:
    """At the optimum of each halving of stage two, the student is two steps of the one before."""
    grid, n, x_t, scale, cond = plane.grid, plane.n, plane.x_t, plane.scale, plane.cond
    method.after_step(stage)
    stride = 2 << stage
    (turn,) = method.turns(stage + 1)
    yield equal(f"halving {stage + 1} starts a new optimizer", 1.0, float(turn.restart), 0.0)
    yield equal(f"... at the full learning rate, halving {stage + 1}", 1.0, turn.lr_factor, 0.0)
    for i in range(0, 8, stride):
        x0 = plane.target(i, i + stride)
        angles = [grid[k].expand(n) for k in (i, i + stride // 2, i + stride)]
        half = partial(
            method.halve, method.previous, x_t, angles[0], angles[1], angles[2], cond, method.input_of(scale)
        )
        network.fit(i, x_t, scale, x0)
        loss = half().loss
        slopes = gradient(loss, network.weights)
        yield equal(f"loss at {stride} guided steps in one, node {i}", 0.0, loss, 1e-18, scale=1.0)
        yield equal(f"... and its gradient, node {i}", 0.0, slopes, 1e-8, scale=1.0)
        with mistake(halving, "two_step_target", _one_step_target):
            loss = half().loss
        yield differs(f"one step of the student before in place of two is caught, node {i}", 0.0, loss, 1e-9, scale=1.0)
    batch = Batch(n, (2,), cond, x_t, torch.device("cpu"), (0, stage, 0))
    whole = turn.loss(batch).loss
    yield equal(f"... and of a whole turn of halving {stage + 1}", 0.0, whole, 1e-18, scale=1.0)
    method.after_step(stage + 1)
    sampler = method.sampler()
    yield equal(f"steps after halving {stage + 1}", 8 // stride, len(sampler.levels), 0.0)
    fixed = Denoiser(network, method.schedule, OUTPUTS["sample"], call=partial(_at_scale, scale))
    fixed_sampler = Sampler(fixed, sampler.levels, sampler.step)
    x, t = fixed_sampler.input_at(len(sampler.levels) - 1, x_t, cond, lambda j: x_t * torch.nan)
    made = fixed(x, t, cond).x0
    yield equal(f"{8 // stride} steps are eight guided DDIM steps", plane.landed(0, 8), made, 1e-8)
    less = Denoiser(network, method.schedule, OUTPUTS["sample"], call=partial(_at_scale, scale - 1))
    less_sampler = Sampler(less, sampler.levels, sampler.step)
    x, t = less_sampler.input_at(len(sampler.levels) - 1, x_t, cond, lambda j: x_t * torch.nan)
    yield differs("... and w given for a to the sampler is caught", plane.landed(0, 8), less(x, t, cond).x0, 1e-3)


def _scales_and_rates(plane: _Plane) -> Iterator[Check]:
    """The scales that are drawn, the learning rates and the new optimizers."""
    for low, high in ((2.0, 4.0), (1.0, 1.5)):
        method, _ = plane.method(guidance_min=low, guidance_max=high)
        drawn = method.scales(Batch(4096, (2,), {}, None, torch.device("cpu"), (0, 0, 0)))
        ends = torch.stack([drawn.min(), drawn.mean(), drawn.max()])
        yield equal(f"scales from {low} to {high}", torch.tensor([low, (low + high) / 2, high]), ends, 0.01)
    method, _ = plane.method(guidance_steps=4, stage_steps=2, final_steps=2)
    turns = [method.turns(step)[0] for step in range(9)]
    rates = torch.tensor([1, 0.75, 0.5, 0.25, 1, 0.5, 1, 0.5, 0])
    yield equal("learning rates of the stages", rates, torch.tensor([turn.lr_factor for turn in turns]), 1e-12)
    restarts = [step for step, turn in enumerate(turns) if turn.restart]
    yield equal("new optimizers", 0.0, float(restarts != [4, 6]), 0.0)
    yield equal("stage one alone goes on", 1.0, plane.method(final_steps=8)[0].turns(10**6)[0].lr_factor, 0.0)
