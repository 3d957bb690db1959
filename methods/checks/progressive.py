"""Exact checks of progressive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import Denoise, ddim_step
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import DiscreteVP, sampling_grid
from diffdistill.exact.analytic import AffinePerAngle, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods.progressive import Config, Progressive
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import halving

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "start_steps": 64,
        "final_steps": 1,
        "stage_steps": 350,
        "student_lr": 0.002,
        "lr_schedule": "constant",
        "ema": 0.0,
        "steps": 2100,
        "guidance_scale": 1.5,
        "weight": "truncated_snr",
    },
}


MU, S = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()


def verify() -> Iterator[Check]:
    """Appendix B row 5 and section 5.1's sanity items, on a Gaussian: every DDIM step is affine there."""
    teacher = gaussian_teacher(MU.tolist(), S)
    grid = sampling_grid(teacher.denoiser.schedule, 8)
    draw = torch.Generator().manual_seed(0)
    yield from _targets(teacher, grid, draw)
    x_t = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    yield from _stages(teacher, grid, x_t, torch.randn(64, 2, generator=draw, dtype=torch.float64))
    yield from _order(teacher)
    yield from _weights(x_t, *torch.randn(2, 64, 2, generator=draw, dtype=torch.float64))
    vp = DiscreteVP.from_config({"beta_schedule": "squaredcos_cap_v2"})
    coarse, fine = sampling_grid(vp, 8), sampling_grid(vp, 16)
    yield equal("a student's grid is every second point of its teacher's", coarse, fine[::2], 0.0)


def _slope(t: Tensor, r: Tensor) -> Tensor:
    """k in x_r - cos(r) mu = k (x_t - cos(t) mu) for one DDIM step with the exact denoiser."""
    rho = torch.cos(t) * S**2 / (torch.cos(t) ** 2 * S**2 + torch.sin(t) ** 2)
    return torch.cos(r) * rho + torch.sin(r) * (1 - torch.cos(t) * rho) / torch.sin(t)


def _targets(teacher: Teacher, grid: Tensor, draw: torch.Generator) -> Iterator[Check]:
    """One step with the target lands where two of the teacher's do."""
    for i, name in ((0, "pure noise"), (2, "the middle"), (6, "the last step")):
        x_t = torch.randn(16, 2, generator=draw, dtype=torch.float64)
        t, mid, r = (grid[j].expand(16) for j in (i, i + 1, i + 2))
        target = halving.two_step_target(teacher.denoiser, x_t, t, mid, r, {})
        landed = (torch.sin(r)[:, None] * x_t + torch.sin(t - r)[:, None] * target) / torch.sin(t)[:, None]
        closed = torch.cos(r)[:, None] * MU + _slope(grid[i], grid[i + 1]) * _slope(grid[i + 1], grid[i + 2]) * (
            x_t - torch.cos(t)[:, None] * MU
        )
        yield equal(f"one step with the target lands where two exact steps land, from {name}", closed, landed, 1e-12)
        once = halving.two_step_target(teacher.denoiser, x_t, t, r, r, {})
        landed = (torch.sin(r)[:, None] * x_t + torch.sin(t - r)[:, None] * once) / torch.sin(t)[:, None]
        yield differs(f"a target of one teacher step is caught, from {name}", closed, landed, 1e-6)
        if i + 2 == len(grid) - 1:
            at_mid = ddim_step(teacher.denoiser, x_t, t, mid, {})
            yield equal(
                "at s = 0 the target is the teacher's x0 at the middle",
                teacher.denoiser(at_mid, mid, {}).x0,
                target,
                1e-12,
            )


def _stages(teacher: Teacher, grid: Tensor, x_t: Tensor, z: Tensor) -> Iterator[Check]:
    """An affine student per node can follow exactly: the loss reaches zero in every stage.

    The last student is the product of all the teacher's factors.
    """
    method, network = _affine_student(teacher, grid)
    for stage in range(3):
        for i, current, (t, mid, r) in _halve(method, network, grid, x_t, stage):
            loss = method.halve(current, x_t, t, mid, r, {}).loss
            slopes = gradient(loss, network.slope, network.offset)
            yield equal(f"loss at the optimum, stage {stage + 1}, node {i}", 0.0, loss, 1e-20, scale=1.0)
            yield equal(f"its gradient there, stage {stage + 1}, node {i}", 0.0, slopes, 1e-10, scale=1.0)
    product = torch.stack([_slope(grid[i], grid[i + 1]) for i in range(8)]).prod(0)
    closed = MU + product * (z - torch.cos(grid[0]) * MU)
    got = method.sampler().one_step(z, {})
    yield equal("three stages from 8 steps: the product of eight DDIM factors", closed, got, 1e-10)
    yield equal("and its sampler makes one step", 1.0, float(len(method.sampler().levels)), 0.0)
    method, network = _affine_student(teacher, grid)
    with mistake(Progressive, "teacher_of", lambda self, stage: self.first):
        for stage in range(3):
            for _ in _halve(method, network, grid, x_t, stage):
                pass
    got = method.sampler().one_step(z, {})
    yield differs("the first teacher in all stages is caught", closed, got, 1e-3)


def _affine_student(teacher: Teacher, grid: Tensor) -> tuple[Progressive, AffinePerAngle]:
    """The method from 8 steps to one, with a student of nothing that is affine at each node."""
    network = AffinePerAngle(grid, 2)
    student = Denoiser(network, teacher.denoiser.schedule, OUTPUTS["sample"])
    stages = Teacher(teacher.denoiser, (2,), None, start=student)
    return Progressive(stages, Config(start_steps=8, final_steps=1, stage_steps=1), student=student), network


def _halve(
    method: Progressive, network: AffinePerAngle, grid: Tensor, x_t: Tensor, stage: int
) -> Iterator[tuple[int, Denoise, list[Tensor]]]:
    """A stage, fitted node by node: each node, the teacher there, and the step's three angles."""
    current, stride = method.teacher_of(stage), 2 << stage
    for i in range(0, 8, stride):
        t, mid, r = (grid[j].expand(len(x_t)) for j in (i, i + stride // 2, i + stride))
        network.fit(i, x_t, halving.two_step_target(current, x_t, t, mid, r, {}))
        yield i, current, [t, mid, r]
    method.after_step(stage)


def _order(teacher: Teacher) -> Iterator[Check]:
    errors = []
    for steps in (64, 128):
        fine = sampling_grid(teacher.denoiser.schedule, steps)
        factors = torch.stack([_slope(fine[i], fine[i + 1]) for i in range(steps)]).prod(0)
        errors.append((factors - S).norm())
    yield equal("that error halves with twice the starting steps", 2.0, errors[0] / errors[1], 0.05)


def _weights(x_t: Tensor, x0: Tensor, aim: Tensor) -> Iterator[Check]:
    """The two weights of the error in x0, as errors in v and in eps."""
    t = torch.full((64,), 0.6, dtype=torch.float64)
    v, v_aim = ((torch.cos(t)[:, None] * x_t - y) / torch.sin(t)[:, None] for y in (x0, aim))
    yield equal(
        "SNR + 1 is the squared error in v",
        (v - v_aim).square().mean(),
        halving.weighted_x0_loss(x0, aim, t, "snr_plus_one"),
        1e-12,
    )
    for angle in (0.6, 1.2):
        t = torch.full((64,), angle, dtype=torch.float64)
        eps, eps_aim = ((x_t - torch.cos(t)[:, None] * y) / torch.sin(t)[:, None] for y in (x0, aim))
        larger = torch.maximum((x0 - aim).square().mean(), (eps - eps_aim).square().mean())
        got = halving.weighted_x0_loss(x0, aim, t, "truncated_snr")
        yield equal(f"truncated SNR is the larger of the errors in x0 and eps, t = {angle}", larger, got, 1e-12)
