"""Guided distillation: On Distillation of Guided Diffusion Models.

Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, CVPR 2023, arXiv:2210.03142 (no code was published).

Stage one: a student that takes the guidance scale as an input learns to give in one pass what classifier-free
guidance gives in two. Stage two: progressive distillation (Salimans & Ho 2022) of that student halves its DDIM
steps again and again, with the scale drawn for each sample and given to both networks.

Guidance scales here are diffusers' a, 1 being none: a = 1 + w with the paper's w.

Deviations: from the formulas as they are known from the abstract and later papers; the paper's appendix was not at
hand, so there is no preset of the paper, and the default range of w, [0, 4] as for ImageNet, is from memory. The
scale enters beside the class embedding with frequencies of at most 2 (`adapters.GuidanceEmbedding`), not as
Fourier features beside the time. The grid of stage two is the teacher's own timesteps with trailing spacing. The
learning rate falls linearly to zero in stage one too, if stage two follows. The sampler is the deterministic one,
not the paper's stochastic variant. With guidance_min = guidance_max the student takes no scale.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.prediction import ROWS, diffuse
from diffdistill.core.schedule import student_grid, student_levels
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.scale_input import guidance_input
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.halving import Halving, two_step_target, weighted_x0_loss
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Meng et al. 2023, arXiv:2210.03142"
DATA = "real images, which are noised"
EQUATIONS = {
    "stage one: x_w = (1 + w) x_c - w x_u, loss max(1, SNR) |x - x_w|^2": "GuidedDistillation.one_pass, guidance.guide",
    "w drawn uniformly for each sample, as an input": "GuidedDistillation.given, adapters.guidance_input",
    "stage two: two DDIM steps of the last student in one": "GuidedDistillation.half_steps, halving.two_step_target",
    "halving, optimizer restarted, learning rate to zero": "halving.Halving, GuidedDistillation.turns",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 600,
        "batch_size": 64,
        "guidance_max": 4.0,
        "guidance_scale": 1.5,
        "guidance_steps": 200,
        "start_steps": 16,
        "final_steps": 1,
        "stage_steps": 100,
        "student_lr": 5e-4,
    },
}
PASSES = {"digits": 3}
SCALES = ["guidance_steps", "stage_steps"]
END_TO_END = {
    "kind": "trajectory",
    "options": {
        "guidance_max": 2.0,
        "guidance_scale": 1.5,
        "guidance_steps": 500,
        "start_steps": 16,
        "final_steps": 1,
        "stage_steps": 500,
        "steps": 2500,
        "student_lr": 2e-3,
        "lr_schedule": "constant",
        "ema": 0.0,
    },
}


@dataclass(frozen=True)
class Config:
    """Guided distillation's options."""

    guidance_min: float = option(1.0, "guidance scales are drawn uniformly from here; 1 is none (w = 0)", at_least=0)
    guidance_max: float = option(5.0, "... to here; equal to guidance_min, the student takes no scale", at_least=0)
    guidance_scale: float | None = option(
        None, "the scale of samples and of the export; default: the middle of the range", at_least=0
    )
    guidance_steps: int = option(1000, "training steps of stage one, before the halving", at_least=1)
    start_steps: int = option(
        16, "DDIM steps of stage one's student; final_steps times a power of two, or 1: no stage two", at_least=1
    )
    final_steps: int = option(1, "the last halving's student has so many steps", at_least=1)
    stage_steps: int = option(1000, "training steps of each halving", at_least=1)
    student_lr: float = option(
        5e-5, "AdamW's learning rate at the start of a stage; it falls linearly to zero", above=0
    )
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    weight: Literal["truncated_snr", "snr_plus_one"] = option(
        "truncated_snr", "of the error in x0: max(1, SNR), or SNR + 1, which is the error in v"
    )

    def __post_init__(self) -> None:
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", (self.guidance_min + self.guidance_max) / 2)


class GuidedDistillation:
    """One player. A checkpoint also holds the student of the stage before, and how many steps are done."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        c = self.config = config
        if teacher.denoiser.row is ROWS["epsilon"]:
            raise UserError(
                "teacher: it predicts the noise, which says nothing of the image at the noisiest step of a few; "
                "guided distillation needs one that predicts v, x0 or a flow velocity"
            )
        assert c.guidance_scale is not None
        scale = c.guidance_scale
        if not c.guidance_min <= scale <= c.guidance_max:
            raise UserError(
                f"guidance_scale: {scale} is not from guidance_min ({c.guidance_min}) to guidance_max "
                f"({c.guidance_max})"
            )
        self.teacher = frozen(teacher.denoiser)
        require_null(self.teacher, "guided distillation")
        self.schedule = teacher.denoiser.schedule
        halves = c.start_steps != c.final_steps
        self.halving = Halving(c.start_steps, c.final_steps, c.stage_steps) if halves else None
        if self.halving:
            self.whole = c.guidance_steps + self.halving.whole
        self.takes_scale = c.guidance_min < c.guidance_max
        if student is None:
            student = teacher.player("student")
            student = guidance_input(student, default=scale) if self.takes_scale else student
        self.student = student.eval()  # no dropout
        self.previous = frozen(copy.deepcopy(student)) if halves else student
        self.grid = student_grid(self.schedule, c.start_steps)
        self.progress = nn.Module()
        self.progress.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {"progress": self.progress}
        if halves:
            self.state["previous"] = self.previous

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        if self.halving is None:
            return [Turn("student", self.one_pass_turn)]
        halving_step = step - self.config.guidance_steps
        if halving_step < 0:
            return [Turn("student", self.one_pass_turn, 1 - step / self.config.guidance_steps)]
        turn = partial(self.half_steps_turn, self.halving.student_steps(halving_step))
        return [Turn("student", turn, self.halving.lr_factor(halving_step), self.starts(step))]

    def starts(self, step: int) -> bool:
        """Whether a halving begins at this step."""
        halving_step = step - self.config.guidance_steps
        return self.halving is not None and (halving_step == 0 or self.halving.starts(halving_step))

    def after_step(self, step: int) -> None:
        self.progress.done.fill_(step + 1)  # type: ignore[operator]
        if self.starts(step + 1):
            self.previous.load_state_dict(self.student.state_dict())

    def sampler(self) -> FewStepSampler:
        """DDIM with the steps of the student as it stands; before training, with those it will have.

        A student of stage one takes any number of steps, here those of the first halving.
        """
        steps, done = self.config.final_steps, int(self.progress.done)  # type: ignore[arg-type]
        if self.halving is not None and done:
            steps = self.halving.student_steps(max(done - 1 - self.config.guidance_steps, 0))
        levels = student_levels(self.schedule, self.config.start_steps)[:: self.config.start_steps // steps]
        return FewStepSampler(self.student, levels.tolist(), renoise=False)

    def scales(self, batch: Batch) -> Tensor:
        """(B,) guidance scales."""
        draw = batch.generator("student/scale")
        u = torch.rand(batch.size, generator=draw, device=draw.device, dtype=torch.float64)
        return self.config.guidance_min + (self.config.guidance_max - self.config.guidance_min) * u

    def given(self, cond: Cond, scale: Tensor) -> Cond:
        """What the student and its former self are told."""
        return cond | {"guidance_scale": scale} if self.takes_scale else cond

    def one_pass_turn(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        t = native_uniform(self.schedule, batch.size, batch.generator("student/t"))
        return self.one_pass(diffuse(batch.x0, t, batch.randn("student/eps")), t, batch.cond, self.scales(batch))

    def one_pass(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> dict[str, Tensor]:
        """Stage one: the guided x0 at x_t (B, ...), with scales (B,), in one pass."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale).x0
        x0 = self.student(x_t, t, self.given(cond, scale)).x0
        loss = weighted_x0_loss(x0, target, t, self.config.weight)
        return {"loss": loss, "x0_error": loss}

    def half_steps_turn(self, steps: int, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        stride, draw = self.config.start_steps // steps, batch.generator("student/i")
        i = stride * torch.randint(steps, (batch.size,), generator=draw, device=draw.device)
        x_t = diffuse(batch.x0, self.grid.to(i.device)[i], batch.randn("student/eps"))
        return self.half_steps(x_t, i, stride, batch.cond, self.scales(batch))

    def half_steps(self, x_t: Tensor, i: Tensor, stride: int, cond: Cond, scale: Tensor) -> dict[str, Tensor]:
        """Stage two: one step over `stride` points of the grid from its points i (B,), for the last student's two."""
        grid, given = self.grid.to(i.device), self.given(cond, scale)
        t, mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        target = two_step_target(self.previous, x_t, t, mid, s, given)
        loss = weighted_x0_loss(self.student(x_t, t, given).x0, target, t, self.config.weight)
        return {"loss": loss, "x0_error": loss}


METHOD = GuidedDistillation


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


def verify() -> Iterator[Check]:
    """Section 5.2's sanity items, on a class and "no class" of one variance: guidance is affine there."""
    means, std = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
    teacher, n = class_gaussians_teacher(means, std), 64
    schedule = teacher.denoiser.schedule
    grid, draw = student_grid(schedule, 8), torch.Generator().manual_seed(0)
    x_t = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    scale, cond = 1 + 4 * torch.rand(n, generator=draw, dtype=torch.float64), {"class_labels": torch.zeros(n).long()}
    aim = means[1] + scale[:, None] * (means[0] - means[1])  # guided, the class is a Gaussian of this mean

    def gain(t: Tensor) -> Tensor:
        """rho in x0 = m + rho (x_t - cos(t) m)."""
        return torch.cos(t) * std**2 / (torch.cos(t) ** 2 * std**2 + torch.sin(t) ** 2)

    def landed(x: Tensor, first: int, last: int, stride: int = 1) -> Tensor:
        """Where guided DDIM steps over the grid end: each is affine, with the factor k about the mean."""
        for t, s in pairwise(grid[first : last + 1 : stride]):
            k = torch.cos(s) * gain(t) + torch.sin(s) * (1 - torch.cos(t) * gain(t)) / torch.sin(t)
            x = torch.cos(s) * aim + k * (x - torch.cos(t) * aim)
        return x

    def method_of(**options: object) -> tuple[GuidedDistillation, _PerNode]:
        network = _PerNode(grid, 2)
        student = Denoiser(network, schedule, ROWS["sample"])
        config = Config(**{"start_steps": 8, "guidance_steps": 1, "stage_steps": 1} | options)  # type: ignore[arg-type]
        return GuidedDistillation(teacher, config, student=student), network

    method, network = method_of()
    for i in range(8):
        t, node = grid[i], torch.full((n,), i)
        exact = aim + gain(t) * (x_t - torch.cos(t) * aim)
        loss = method.one_pass(x_t, grid[node], cond, scale)["loss"]
        weight = torch.clamp(torch.tan(t) ** -2, min=1)
        yield equal(f"stage one's loss of a student of nothing, node {i}", (weight * exact**2).mean(), loss, 1e-12)
        off = gradient(method.one_pass(x_t, grid[node], cond, scale + 1)["loss"], network.weights)
        network.fit(i, x_t, scale, exact)
        loss = method.one_pass(x_t, grid[node], cond, scale)["loss"]
        yield equal(f"zero at x_w, node {i}", 0.0, loss, 1e-20, scale=1.0)
        at_optimum = gradient(loss, network.weights)
        yield equal(f"... and its gradient, node {i}", 0.0, at_optimum, 1e-9, scale=1.0)
        yield differs(f"... which is not zero elsewhere, node {i}", 0.0, off, 1e-3)
        plain = teacher.denoiser(x_t, grid[node], cond).x0
        with torch.no_grad():
            told = method.student(x_t, grid[node], method.given(cond, scale)).x0
            shifted = method.student(x_t, grid[node], method.given(cond, scale - 1)).x0
        null = teacher.denoiser(x_t, grid[node], {"class_labels": cond["class_labels"] + 1}).x0
        w = (scale - 1)[:, None]
        yield equal(f"x_w = (1 + w) x_c - w x_u, node {i}", (1 + w) * plain - w * null, told, 1e-9)
        yield differs(f"w given for a is caught, node {i}", told, shifted, 1e-3)
        across = (told - plain) / w
        yield equal(f"x_w - x_c is linear in w, node {i}", across.mean(0).expand(n, 2), across, 1e-6)

    # The whole of stage two: at the optimum of each halving, the student is two steps of the one before.
    for stage in range(3):
        method.after_step(stage)
        stride = 2 << stage
        (turn,) = method.turns(stage + 1)
        yield equal(f"halving {stage + 1} starts a new optimizer", 1.0, float(turn.restart), 0.0)
        yield equal(f"... at the full learning rate, halving {stage + 1}", 1.0, turn.lr_factor, 0.0)
        for i in range(0, 8, stride):
            t, s, node = grid[i], grid[i + stride], torch.full((n,), i)
            end = landed(x_t, i, i + stride)
            wanted = (torch.sin(t) * end - torch.sin(s) * x_t) / torch.sin(t - s)
            before = method.half_steps(x_t, node, stride, cond, scale)["loss"]
            yield differs(f"halving {stage + 1} has something to learn, node {i}", 0.0, before, 1e-9)
            network.fit(i, x_t, scale, wanted)
            loss = method.half_steps(x_t, node, stride, cond, scale)["loss"]
            slopes = gradient(loss, network.weights)
            yield equal(f"loss at {stride} guided steps in one, node {i}", 0.0, loss, 1e-18, scale=1.0)
            yield equal(f"... and its gradient, node {i}", 0.0, slopes, 1e-8, scale=1.0)
        batch = Batch(n, (2,), cond, x_t, torch.device("cpu"), (0, stage, 0))
        whole = turn.loss(batch)["loss"]
        yield equal(f"... and of a whole turn of halving {stage + 1}", 0.0, whole, 1e-18, scale=1.0)
        method.after_step(stage + 1)
        sampler = method.sampler()
        yield equal(f"steps after halving {stage + 1}", 8 // stride, len(sampler.levels), 0.0)
        x, t = sampler.input_at(len(sampler.levels) - 1, x_t, method.given(cond, scale), lambda j: x_t * torch.nan)
        made = sampler.denoiser(x, t, method.given(cond, scale)).x0
        yield equal(f"{8 // stride} steps are eight guided DDIM steps", landed(x_t, 0, 8), made, 1e-8)
        coarse = landed(x_t, 0, 8, stride)
        yield differs(f"... and not {8 // stride} guided DDIM steps", coarse, made, 1e-3)

    for options in ({"guidance_min": 2.0, "guidance_max": 4.0}, {"guidance_min": 1.0, "guidance_max": 1.5}):
        method, network = method_of(**options)
        low, high = options.values()
        drawn = method.scales(Batch(4096, (2,), {}, None, torch.device("cpu"), (0, 0, 0)))
        ends = torch.stack([drawn.min(), drawn.mean(), drawn.max()])
        yield equal(f"scales from {low} to {high}", torch.tensor([low, (low + high) / 2, high]), ends, 0.01)
    method, _ = method_of(guidance_steps=4, stage_steps=2, final_steps=2)
    turns = [method.turns(step)[0] for step in range(9)]
    rates = torch.tensor([1, 0.75, 0.5, 0.25, 1, 0.5, 1, 0.5, 0])
    yield equal("learning rates of the stages", rates, torch.tensor([turn.lr_factor for turn in turns]), 1e-12)
    restarts = [step for step, turn in enumerate(turns) if turn.restart]
    yield equal("new optimizers", 0.0, float(restarts != [4, 6]), 0.0)
    yield equal("stage one alone goes on", 1.0, method_of(final_steps=8)[0].turns(10**6)[0].lr_factor, 0.0)
