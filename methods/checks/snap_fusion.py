"""Exact checks of snap_fusion."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.times import native_uniform
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.exact.guided_steps import GuidedClass
from diffdistill.methods import snap_fusion
from diffdistill.methods.snap_fusion import Config, SnapFusion
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "eight steps": {
        "start_steps": 64,
        "final_steps": 8,
        "stage_steps": 350,
        "compared_min": 1.0,
        "compared_max": 2.0,
        "guided_share": 0.5,
        "distillation_weight": 30.0,
        "student_lr": 0.002,
        "lr_schedule": "constant",
        "ema": 0.0,
        "steps": 1050,
        "weight": "truncated_snr",
    },
}


class _TwoBranches(nn.Module):
    """x0 = slope x_t + base of the label, each its own at each angle of a grid: any guided step fits."""

    def __init__(self, grid: Tensor):
        super().__init__()
        self.grid = nn.Buffer(grid)
        self.slope = nn.Parameter(torch.zeros(len(grid), 2, dtype=torch.float64))
        self.base = nn.Parameter(torch.zeros(len(grid), 2, 2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        node = (t[:, None] - self.grid).abs().argmin(1)
        return self.slope[node] * x_t + self.base[node, class_labels]

    def fit(self, node: int, x_t: Tensor, scale: Tensor, x0: Tensor) -> None:
        """Least squares at one node: guided, x0 = slope x_t + base_null + scale (base_class - base_null)."""
        for d in range(2):
            known = torch.stack([x_t[:, d], torch.ones_like(scale), scale], 1)
            slope, null, apart = torch.linalg.lstsq(known, x0[:, d]).solution
            self.slope.data[node, d] = slope
            self.base.data[node, :, d] = torch.stack([null + apart, null])


class _Game(GuidedClass):
    """With the method, whose student is a network of nothing."""

    def method(self, **options: object) -> tuple[SnapFusion, _TwoBranches]:
        network = _TwoBranches(self.grid)
        student = Denoiser(network, self.teacher.denoiser.schedule, OUTPUTS["sample"], null=self.teacher.denoiser.null)
        usual = {"start_steps": 8, "final_steps": 2, "stage_steps": 1, "weight": "truncated_snr"}
        return SnapFusion(self.teacher, Config(**usual | options), student=student), network  # type: ignore[arg-type]

    def loss(self, method: SnapFusion, i: int, scale: Tensor, stride: int = 2) -> Tensor:
        """Of a student's step over the grid from node i."""
        t, mid, s = (self.grid[k].expand(self.n) for k in (i, i + stride // 2, i + stride))
        return method.distillation_loss(method.teacher, self.x_t, t, mid, s, self.cond, scale)

    def weight(self, i: int) -> Tensor:
        return torch.clamp(torch.tan(self.grid[i]) ** -2, min=1)


def verify() -> Iterator[Check]:
    """Section 5.3's sanity items, on a class and "no class" of one variance."""
    game = _Game()
    for i in (0, 2, 4, 6):
        yield from _distillation(game, i)
    yield from _whole(game)
    yield from _scales(game)
    yield from _stages(game)


def _distillation(game: _Game, i: int) -> Iterator[Check]:
    """L_dstl of a step from a node of the grid: of a student of nothing, which is then fitted."""
    method, network = game.method()
    target = game.target(i, i + 2)
    closed = (game.weight(i) * target.square()).mean()
    yield equal(f"L_dstl of a student of nothing, node {i}", closed, game.loss(method, i, game.scale), 1e-12)
    with mistake(snap_fusion, "guide", lambda d, x, t, c, a: guide(d, x, t, c, a - 1)):
        yield differs(f"w given for a is caught, node {i}", closed, game.loss(method, i, game.scale), 1e-6)
    network.fit(i, game.x_t, game.scale, target)
    loss = game.loss(method, i, game.scale)
    yield equal(f"zero where the guided steps match, node {i}", 0.0, loss, 1e-20, scale=1.0)
    slopes = gradient(loss, network.slope, network.base)
    yield equal(f"... and its gradient, node {i}", 0.0, slopes, 1e-9, scale=1.0)
    one = torch.full_like(game.scale, 3.0)
    at_one = game.loss(method, i, one)
    yield equal(f"... at any scale, node {i}", 0.0, at_one, 1e-20, scale=1.0)
    # Another null branch, and the conditional one so that both together stay at the scale 3.
    network.base.data[i, 1] += 0.9
    network.base.data[i, 0] += 0.9 * (3 - 1) / 3
    yield equal(f"each branch alone is free, node {i}", 0.0, game.loss(method, i, one), 1e-20, scale=1.0)
    plain = game.loss(method, i, torch.ones_like(one))
    yield differs(f"... and seen by a plain comparison, node {i}", 0.0, plain, 1e-3, scale=1.0)
    moved = (game.weight(i) * torch.tensor(0.6, dtype=torch.float64) ** 2).mean()
    yield equal(f"... which is that of the conditional branches, node {i}", moved, plain, 1e-10)
    with mistake(snap_fusion, "at_scale", lambda denoiser, scale: denoiser):
        yield differs(f"nobody guided is caught, node {i}", 0.0, game.loss(method, i, one), 1e-3, scale=1.0)


def _whole(game: _Game) -> Iterator[Check]:
    """L = L_ori + gamma L_dstl in a whole turn, and L_ori in v."""
    images = diffuse(game.x_t, torch.full((game.n,), 0.4, dtype=torch.float64), game.x_t.flip(0))
    batch = Batch(game.n, (2,), game.cond, images, torch.device("cpu"), (0, 0, 0))
    method, network = game.method(distillation_weight=0.7, guided_share=1.0, compared_min=2.0, compared_max=4.0)
    network.slope.data.fill_(0.3)
    schedule = method.schedule
    t = batch.draw("student/diffusion t", lambda n, draw: native_uniform(schedule, n, draw))
    eps = batch.randn("student/diffusion eps").double()
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    x_t = cos * images + sin * eps
    x0 = method.student(x_t, t, game.cond).x0
    error = (cos * eps - sin * images) - (cos * (x_t - cos * x0) / sin - sin * x0)  # in v = cos eps - sin x0
    got = method.diffusion_loss(batch)
    yield equal("L_ori is the error in v", error.square().mean(), got, 1e-6)
    turn = method.turns(0)[0].loss(batch)
    steps = [method.grid[k] for k in range(0, 9, 2)]
    i = batch.integers(4, "student/i")
    angles = torch.stack(steps)[i], method.grid[2 * i + 1], torch.stack(steps)[i + 1]
    noised = diffuse(images, angles[0], batch.randn("student/eps"))
    distilled = method.distillation_loss(method.teacher, noised, *angles, game.cond, method.scales(batch))
    yield equal("L = L_ori + gamma L_dstl", got + 0.7 * distilled, turn.loss, 1e-10)
    yield differs("gamma left out is caught", got + distilled, turn.loss, 1e-6)
    yield differs("L_ori left out is caught", 0.7 * distilled, turn.loss, 1e-6)


def _scales(game: _Game) -> Iterator[Check]:
    """The scales that are drawn, and how many are 1."""
    batch = Batch(4096, (2,), {}, None, torch.device("cpu"), (0, 0, 0))
    method, _ = game.method(guided_share=0.25, compared_min=3.0, compared_max=15.0)
    drawn = method.scales(batch)
    some = drawn[drawn != 1]
    yield equal("a quarter is compared guided", 0.25, len(some) / 4096, 0.05)
    ends = torch.stack([some.min(), some.mean(), some.max()])
    yield equal("a = 1 + w for w in [2, 14]", torch.tensor([3.0, 9.0, 15.0]), ends, 0.03)
    for share, expected in ((0.0, 0.0), (1.0, 1.0)):
        drawn = game.method(guided_share=share)[0].scales(batch)
        yield equal(f"a share of {share:g}", expected, (drawn != 1).double().mean(), 0.0)


def _stages(game: _Game) -> Iterator[Check]:
    """Whose steps are learned: the teacher's, then the student's of the stage before."""
    method, network = game.method()
    yield equal("the teacher is the first stage's", 1.0, float(method.teacher_of(0) is method.teacher), 0.0)
    yield equal("its former self is the next one's", 1.0, float(method.teacher_of(1) is method.previous), 0.0)
    for i in range(0, 8, 2):
        network.fit(i, game.x_t, game.scale, game.target(i, i + 2))
    method.after_step(0)
    t, mid, s = (game.grid[k].expand(game.n) for k in (0, 2, 4))
    network.fit(0, game.x_t, game.scale, game.target(0, 4))
    loss = method.distillation_loss(method.teacher_of(1), game.x_t, t, mid, s, game.cond, game.scale)
    yield equal("four guided steps in one, two stages on", 0.0, loss, 1e-18, scale=1.0)
    loss = method.distillation_loss(method.teacher, game.x_t, t, mid, s, game.cond, game.scale)
    yield differs("the first teacher in the second stage is caught", 0.0, loss, 1e-9, scale=1.0)
