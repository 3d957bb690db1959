"""Exact checks of multistep_consistency."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import inverse_ddim
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient, two_points
from diffdistill.methods.multistep_consistency import Config, MultistepConsistency, Segment
from diffdistill.players.teacher import Teacher

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "two segments": {
        "mode": "distillation",
        "segments": 2,
        "eta": 0.0,
        "teacher_steps_start": 128,
        "teacher_steps_end": 128,
        "loss_weight": "v",
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.0001,
        "steps": 2000,
        "student_lr": 0.001,
    },
}


class _Gaussian:
    """A Gaussian teacher and an affine student per angle; in VE coordinates x_t/cos(t) all maps are affine about mu."""

    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.0]).double()

    def __init__(self, config: Config):
        self.exact = GaussianMixture(self.mu[None], self.s[None])
        schedule = TrigFlow(t_max=1.5)
        teacher = Teacher(Denoiser(self.exact, schedule, OUTPUTS["v_prediction"]), (2,))
        empty = Denoiser(AffinePerAngle(torch.zeros(1), 2), schedule, OUTPUTS["sample"])
        self.grid = MultistepConsistency(teacher, config, student=empty).grid(0)
        self.network = AffinePerAngle(self.grid[:, :-1].flatten(), 2)
        self.method = MultistepConsistency(teacher, config, student=Denoiser(self.network, schedule, OUTPUTS["sample"]))

    def node(self, row: int, i: int) -> int:
        return row * (self.grid.shape[1] - 1) + i

    def at(self, row: int, i: int) -> tuple[Tensor, ...]:
        """x_t, x_r (16, 2) and t, r, e (16,) of one step of a segment, from data that has the two first moments."""
        z, eps = two_points(2)
        x0 = self.mu + self.s * z
        t, r, e = (self.grid[row, k].expand(16) for k in (i, i + 1, -1))
        x_t = diffuse(x0, t, eps)
        return x_t, self.method.less_noisy(x_t, x0, eps, Segment(t, r, r), {}), t, r, e

    def minimise(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient after each angle was fitted to x_ref, from the end of its segment upwards."""
        losses = []
        for row in range(len(self.grid)):
            for i in reversed(range(self.grid.shape[1] - 1)):
                x_t, x_r, t, r, e = self.at(row, i)
                self.network.fit(self.node(row, i), x_t, self.method.reference(x_t, x_r, Segment(t, r, e), {}))
                losses.append(self.method.following(x_t, x_r, Segment(t, r, e), {}).loss)
        loss = torch.stack(losses).sum()
        return loss, gradient(loss, self.network.slope, self.network.offset)

    def factor(self, t: Tensor, r: Tensor) -> Tensor:
        """(2,) what a DDIM step multiplies x_t/cos(t) - mu by: 1 + (r - t) t/(s^2 + t^2) in sigma."""
        t, r = torch.tan(t), torch.tan(r)
        return 1 + (r - t) * t / (self.s**2 + t**2)

    def product(self, row: int) -> Tensor:
        """(2,) that of all the teacher's steps of a segment."""
        angles = self.grid[row]
        return torch.stack([self.factor(t, r) for t, r in pairwise(angles)]).prod(0)

    def landing(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t at the segment's top, where the student's DDIM step to its end lands, and the two angles."""
        x_t, _, t, _, e = self.at(row, 0)
        return x_t, self.method.student(x_t, t, {}).at(e), torch.stack([t, e])


def verify() -> Iterator[Check]:
    """Section 1.6's sanity items, on a Gaussian."""
    yield from _steps()
    yield from _fixed_point()
    yield from _off_the_optimum()
    yield from _limits()


def _steps() -> Iterator[Check]:
    """DDIM, its inverse and adjusted DDIM, against the paper's formulas in alpha and sigma."""
    game = _Gaussian(Config())
    z, eps = two_points(2)
    x0 = game.mu + game.s * z
    t, s = torch.full((16,), 1.1).double(), torch.full((16,), 0.6).double()
    x_t = diffuse(x0, t, eps)
    (alpha, sigma), (alpha_s, sigma_s) = ((torch.cos(a[0]), torch.sin(a[0])) for a in (t, s))
    x_s = alpha_s * x0 + sigma_s / sigma * (x_t - alpha * x0)
    closed = (x_s - sigma_s / sigma * x_t) / (alpha_s - alpha * sigma_s / sigma)
    yield equal("the inverse of DDIM, eq. 5", closed, inverse_ddim(x_s, x_t, t, s), 1e-12)
    yield equal("it gives the x0 of the step", x0, inverse_ddim(x_s, x_t, t, s), 1e-12)

    mean = game.mu + alpha * game.s**2 * (x_t - alpha * game.mu) / (alpha**2 * game.s**2 + sigma**2)
    noise = (x_t - alpha * mean) / sigma
    for eta in (0.0, 0.75):
        x_var = eta * (mean - x0).square().sum(1, keepdim=True) / 2
        added = (alpha_s - alpha * sigma_s / sigma) ** 2 * x_var
        closed = alpha_s * mean + torch.sqrt(sigma_s**2 + 2 / noise.square().sum(1, keepdim=True) * added) * noise
        got = _Gaussian(Config(eta=eta)).method.less_noisy(x_t, x0, eps, Segment(t, s, s), {})
        yield equal(f"adjusted DDIM, eq. 14, eta = {eta}", closed, got, 1e-12)
    for name, wrong in (("eta = 0", Config(eta=0.0)), ("the data's noise", Config(mode="training"))):
        got = _Gaussian(wrong).method.less_noisy(x_t, x0, eps, Segment(t, s, s), {})
        yield differs(f"{name} in its place is caught", closed, got, 1e-3)
    shared = _Gaussian(Config(mode="training")).method.less_noisy(x_t, x0, eps, Segment(t, s, s), {})
    yield equal("in training x_r has the noise of x_t", alpha_s * x0 + sigma_s * eps, shared, 1e-12)


def _fixed_point() -> Iterator[Check]:
    z, _ = two_points(2)
    for segments in (1, 3):
        steps = 5 * segments
        config = Config(segments=segments, eta=0.0, teacher_steps_start=steps, distance="l2")
        game = _Gaussian(config)
        loss, slope = game.minimise()
        yield equal(f"the loss at the fixed point is zero, {segments} segments", 0.0, loss, 1e-18, scale=1.0)
        yield equal(f"its gradient there is zero, {segments} segments", 0.0, slope, 1e-8, scale=1.0)
        for row in range(segments):
            x_t, got, (t, e) = game.landing(row)
            k = game.product(row)
            closed = torch.cos(e)[:, None] * (game.mu + k * (x_t / torch.cos(t)[:, None] - game.mu))
            yield equal(f"segment {row + 1} of {segments}: the product of its DDIM steps", closed, got, 1e-10)
            wrong = _Gaussian(config)
            wrong.method.teacher = at_half_the_angle(wrong.method.teacher)
            wrong.minimise()
            got = wrong.landing(row)[1]
            name = f"a teacher asked at another level is caught, segment {row + 1} of {segments}"
            yield differs(name, closed, got, 1e-4)
        sampler = game.method.sampler()
        x, t = sampler.input_at(segments - 1, z, {}, lambda j: z)
        k = torch.stack([game.product(row) for row in range(segments)]).prod(0)
        closed = game.mu + k * (z / torch.cos(game.grid[0, 0]) - game.mu)
        got = sampler.denoiser(x, t, {}).x0
        yield equal(f"sampling {segments} steps: the product of all DDIM steps", closed, got, 1e-10)

    errors = []
    for steps in (60, 120):
        game = _Gaussian(Config(segments=2, eta=0.0, teacher_steps_start=steps, distance="l2"))
        game.minimise()
        x_t, got, (t, e) = game.landing(0)
        errors.append((got - game.exact.flow_map(x_t, t, e)).norm())
    yield equal("it tends to the exact map with order 1", 1.0, torch.log2(errors[0] / errors[1]), 0.05)

    # A student that is the exact map to the segment's end, with x_r on the exact trajectory.
    game = _Gaussian(Config(segments=2, teacher_steps_start=6))
    x_t, _, t, r, e = game.at(0, 0)
    x_r, z_e = game.exact.flow_map(x_t, t, r), game.exact.flow_map(x_t, t, e)
    game.network.fit(game.node(0, 1), x_r, inverse_ddim(z_e, x_r, r, e))
    x_ref = game.method.reference(x_t, x_r, Segment(t, r, e), {})
    landed = torch.cos(e)[:, None] * x_ref + torch.sin(e)[:, None] * (
        (x_t - torch.cos(t)[:, None] * x_ref) / torch.sin(t)[:, None]
    )
    yield equal("with the exact map, DDIM with x_ref lands on the trajectory", z_e, landed, 1e-12)


def _off_the_optimum() -> Iterator[Check]:
    """Value and gradient against their closed forms, at random parameters."""
    generator = torch.Generator().manual_seed(0)
    for loss_weight in ("snr_plus_one", "v", "uniform"):
        for kind in ("l2", "huber"):
            config = Config(segments=2, teacher_steps_start=6, loss_weight=loss_weight, distance=kind, huber_c=0.3)
            game = _Gaussian(config)
            for p in game.network.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for i in (0, 2):
                yield from _one_step(game, i, f"{kind}, {loss_weight}, step {i + 1} of 3")


def _one_step(game: _Gaussian, i: int, label: str) -> Iterator[Check]:
    config, network = game.method.config, game.network
    x_t, x_r, t, r, e = game.at(0, i)
    node, cos, sin = game.node(0, i), torch.cos(torch.stack([t, r, e])[:, 0]), torch.sin(torch.stack([t, r, e])[:, 0])
    with torch.no_grad():
        f_r = network.slope[node + 1] * x_r + network.offset[node + 1]
        z_e = x_r if i == 2 else cos[2] * f_r + sin[2] / sin[1] * (x_r - cos[1] * f_r)
        x_ref = (z_e - sin[2] / sin[0] * x_t) / (cos[2] - cos[0] * sin[2] / sin[0])
        gap = network.slope[node] * x_t + network.offset[node] - x_ref
        inside = 1 / sin[0] if config.loss_weight == "v" else torch.ones(()).double()
        outside = 1 / sin[0] ** 2 if config.loss_weight == "snr_plus_one" else torch.ones(()).double()
        gap = inside * gap
        if config.distance == "l2":
            value, pull = gap.square().mean(1), gap  # 2/d with d = 2
        else:
            root = torch.sqrt(gap.square().sum(1, keepdim=True) + 0.3**2)
            value, pull = root[:, 0] - 0.3, gap / root
        expected = torch.zeros(2, *network.slope.shape, dtype=torch.float64)
        expected[0, node] = outside * inside * (pull * x_t).mean(0)
        expected[1, node] = outside * inside * pull.mean(0)
    loss = game.method.following(x_t, x_r, Segment(t, r, e), {}).loss
    yield equal(f"the loss, {label}", outside * value.mean(), loss, 1e-10)
    got = gradient(loss, network.slope, network.offset)
    yield equal(f"its gradient, through the noisier point alone, {label}", expected, got, 1e-10)
    for name, wrong in (("x_r for x_t", (x_r, x_r, t, r, e)), ("t for r", (x_t, x_r, t, t, e))):
        loss = game.method.following(*wrong[:2], Segment(*wrong[2:]), {}).loss
        yield differs(f"{name} is caught, {label}", expected, gradient(loss, network.slope, network.offset), 1e-6)


def _limits() -> Iterator[Check]:
    """As many segments as steps is diffusion; one segment is a consistency model; N_teacher(i); dropout."""
    game = _Gaussian(Config(segments=4, teacher_steps_start=4, mode="training", loss_weight="v", distance="l2"))
    z, eps = two_points(2)
    x0 = game.mu + game.s * z
    for row in (0, 2, 3):
        t, r = game.grid[row, 0].expand(16), game.grid[row, 1].expand(16)
        x_t = diffuse(x0, t, eps)
        x_r = game.method.less_noisy(x_t, x0, eps, Segment(t, r, r), {})
        got = game.method.reference(x_t, x_r, Segment(t, r, r), {})
        yield equal(
            f"training with as many segments as steps: x_ref is the data, eq. 9, segment {row + 1}", x0, got, 1e-12
        )
    one = _Gaussian(Config(segments=1, teacher_steps_start=6))
    one.network.slope.data.fill_(0.4)
    x_t, x_r, t, r, e = one.at(0, 1)
    yield equal(
        "one segment: x_ref is f(x_r, r)", 0.4 * x_r, one.method.reference(x_t, x_r, Segment(t, r, e), {}), 1e-12
    )

    method = _Gaussian(Config(segments=8, anneal_steps=100)).method
    expected = [8.0, round(math.sqrt(64 * 1280) / 8), 160.0, 160.0]
    counts = [float(method.per_segment(k)) for k in (0, 50, 100, 1000)]
    yield equal("N_teacher(i) per segment", torch.tensor(expected), torch.tensor(counts), 0.0)
    grid = game.grid
    yield equal("segments end where the next one begins", grid[1:, 0], grid[:-1, -1], 0.0)

    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    teacher = Denoiser(layers, TrigFlow(), OUTPUTS["sample"], call=lambda module, x, time, cond: module(x))
    method = MultistepConsistency(Teacher(teacher, (2,)), Config())
    t, e = torch.full((16,), 1.0).double(), torch.full((16,), 0.5).double()
    loss = method.following(z, z, Segment(t, t, e), {}, seed=7).shown["distance"]
    yield equal("both passes drop the same units", 0.0, loss, 1e-9, scale=1.0)
