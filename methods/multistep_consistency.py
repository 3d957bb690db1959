"""Multistep consistency: Multistep Consistency Models.

Heek, Hoogeboom, Salimans, 2024, arXiv:2403.06807 (v3; no official code).

The noise levels are cut into `segments`, and f has to be the same along a trajectory only within a segment: it
says where the trajectory leaves it. One segment is a consistency model, as many as the teacher's steps are a
diffusion model. From x_t one step of the teacher gives x_r; f(x_r, r) and a DDIM step give z_e at the segment's
end e; the x0 whose DDIM step from x_t lands there as well is what f(x_t, t) is pulled to. The teacher's step is
adjusted DDIM, which lengthens the noise by the variance that DDIM leaves out. Sampling is DDIM, one step a segment.

Deviations: the paper cuts the time of its cosine schedule evenly. Here the segments lie between the levels of the
teacher's own sampler (`schedule.student_levels`), so that a stock sampler repeats the student, and are cut into
steps evenly in the angle, which is the cosine schedule's time. Points below the least level that the network knows
are moved there. The
last step of a segment that ends at 0 takes x_r itself for z_e. `snr_plus_one` weighs the norm of the error in x0,
as Algorithm 1 prints it; the text calls it equivalent to a v-loss, which for a norm that is not squared would be
`v`. The variance is eta |x0_teacher - x0|^2/d of each sample, as in Algorithm 1, which leaves out the eta of
Algorithm 3. The paper gives no learning rate. `huber_c` counts in the data's own units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.guidance import guided
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import addim_step, inverse_ddim
from diffdistill.core.prediction import ROWS, Prediction, diffuse, expand
from diffdistill.core.schedule import TrigFlow, student_levels
from diffdistill.errors import UserError
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture
from diffdistill.exact.checks import Check, differs, equal, gradient, two_points
from diffdistill.options import option
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Optimizer, Turn

PAPER = "Heek et al. 2024, arXiv:2403.06807"
DATA = "real images, to place x_t where the trajectories pass"
EQUATIONS = {
    "multistep consistency loss in x0 (eq. 7, Algorithm 1)": "MultistepConsistency.consistency",
    "z_ref and its x0 (eq. 5, Algorithm 1)": "MultistepConsistency.reference, ode.inverse_ddim",
    "adjusted DDIM (eq. 14, Algorithm 3)": "ode.addim_step, MultistepConsistency.less_noisy",
    "N_teacher(i), log-linear (appendix A.1)": "MultistepConsistency.per_segment",
    "sampling (Algorithm 2)": "players.FewStepSampler",
}
PRESETS = {
    "digits": {
        "teacher": "digits",
        "data": "digits",
        "steps": 250,
        "batch_size": 64,
        "segments": 2,
        "eta": 0.0,
        "teacher_steps_start": 16,
        "teacher_steps_end": 32,
        "anneal_steps": 200,
        "loss_weight": "v",
        "student_lr": 5e-4,
        "lr_schedule": "cosine",
        "ema": 0.99,
    },
    "imagenet64": {
        "steps": 200000,
        "batch_size": 2048,
        "segments": 8,
        "eta": 0.75,
        "teacher_steps_start": 64,
        "teacher_steps_end": 1280,
        "anneal_steps": 100000,
        "huber_c": 1e-4,
    },
    "text-to-image": {
        "steps": 30000,
        "batch_size": 2048,
        "segments": 16,
        "eta": 0.75,
        "teacher_steps_start": 256,
        "teacher_steps_end": 256,
        "huber_c": 1.0,
    },
}
PASSES = {"digits": 3}
SCALES = ["anneal_steps"]
END_TO_END = {
    "kind": "trajectory",
    "options": {
        "segments": 2,
        "eta": 0.0,
        "teacher_steps_start": 32,
        "teacher_steps_end": 32,
        "loss_weight": "v",
        "steps": 2000,
        "student_lr": 1e-3,
    },
}


@dataclass(frozen=True)
class Config:
    """The options of multistep consistency models."""

    mode: Literal["distillation", "training"] = option(
        "distillation", "training: x_r has the noise of x_t, and no teacher takes part"
    )
    segments: int = option(4, "parts of the noise levels, each left with one sampling step", at_least=1)
    eta: float = option(0.75, "the share of |x0_teacher - x0|^2 that adjusted DDIM adds; 0: DDIM", at_least=0)
    teacher_steps_start: int = option(64, "the teacher's steps over all segments at the start", at_least=1)
    teacher_steps_end: int = option(1280, "... and at the end of the annealing", at_least=1)
    anneal_steps: int = option(100000, "training steps from the one to the other, evenly in the logarithm", at_least=1)
    distance: Literal["huber", "l2"] = option("huber", "huber: close to the norm of the whole sample; l2: squared")
    huber_c: float = option(1e-4, "pseudo-Huber's c", above=0)
    loss_weight: Literal["snr_plus_one", "v", "uniform"] = option(
        "snr_plus_one", "of the distance in x0; v: the distance in v"
    )
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    student_lr: float = option(1e-4, "AdamW's learning rate", above=0)
    beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)


class MultistepConsistency:
    """One player, which is its own target."""

    needs_data, needs_pairs = True, False

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        if config.guidance_scale != 1 and config.mode == "training":
            raise UserError(
                f"guidance_scale: {config.guidance_scale} guides the teacher's step, and this mode has none"
            )
        self.config = config
        self.schedule = teacher.denoiser.schedule
        guided(teacher.denoiser, config.guidance_scale)  # a teacher without a null condition is refused
        self.teacher = frozen(teacher.denoiser)
        self.student = student or teacher.player("student")
        self.distance = distance(config.distance, teacher.shape, self.schedule.data_std, config.huber_c)
        self.players: dict[str, nn.Module] = {"student": self.student}
        self.state: dict[str, nn.Module] = {}

    def optimizer(self, player: str) -> Optimizer:
        return Optimizer(self.config.student_lr, (self.config.beta1, 0.999), self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", partial(self.student_turn, step))]

    def after_step(self, step: int) -> None:
        pass

    def sampler(self) -> FewStepSampler:
        levels = student_levels(self.schedule, self.config.segments)
        return FewStepSampler(self.student, levels.tolist(), renoise=False)

    # -- times ---------------------------------------------------------------------------------------------

    def per_segment(self, step: int) -> int:
        """The teacher's steps in a segment at that training step."""
        c = self.config
        done = min(step / c.anneal_steps, 1)
        return max(1, round(c.teacher_steps_start ** (1 - done) * c.teacher_steps_end**done / c.segments))

    def grid(self, step: int) -> Tensor:
        """(segments, per_segment + 1) descending angles, each row from a level of the sampler to its segment's end."""
        tops = torch.stack([self.schedule.angle(level) for level in self.sampler().levels])
        ends = torch.cat([tops[1:], torch.zeros(1, dtype=torch.float64)])
        part = torch.linspace(0, 1, self.per_segment(step) + 1, dtype=torch.float64)
        grid = torch.lerp(tops[:, None], ends[:, None], part).clamp_min(self.schedule.t_min)
        grid[:, -1] = ends
        return grid

    def times(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t, the less noisy r and the segment's end e, all (B,)."""
        draw = batch.generator("student/t")
        grid = self.grid(step).to(draw.device)
        row = torch.randint(len(grid), (batch.size,), generator=draw, device=draw.device)
        i = torch.randint(grid.shape[1] - 1, (batch.size,), generator=draw, device=draw.device)
        return grid[row, i], grid[row, i + 1], grid[row, -1]

    # -- the loss ------------------------------------------------------------------------------------------

    def student_turn(self, step: int, batch: Batch) -> dict[str, Tensor]:
        assert batch.x0 is not None
        t, r, e = self.times(step, batch)
        eps = batch.randn("student/eps")
        x_t = diffuse(batch.x0, t, eps)
        x_r = self.less_noisy(x_t, batch.x0, eps, t, r, batch.cond)
        return self.consistency(x_t, x_r, t, r, e, batch.cond, seed_for(*batch.key, "student/dropout"))

    @torch.no_grad()
    def less_noisy(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_r: adjusted DDIM with the teacher from x_t, or x0 under the same noise as x_t."""
        if self.config.mode == "training":
            return diffuse(x0, r, eps)
        pred, conditional = self.predictions(x_t, t, cond)
        x_var = self.config.eta * per_sample_mean((conditional.x0 - x0).square())
        return addim_step(pred, r, x_var)

    def predictions(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """The teacher's guided prediction, and the conditional one, of which the variance is taken; one call."""
        if self.config.guidance_scale == 1:
            pred = self.teacher(x_t, t, cond)
            return pred, pred
        assert self.teacher.null is not None
        null = self.teacher.null(cond)
        both = self.teacher(
            torch.cat([x_t, x_t]), torch.cat([t, t]), {key: torch.cat([cond[key], null[key]]) for key in cond}
        )
        y, y_null = both.y.chunk(2)
        conditional = Prediction(x_t, both.t[: len(t)], y, both.a[: len(t)], both.b[: len(t)])
        return conditional.with_output(y_null + self.config.guidance_scale * (y - y_null)), conditional

    @torch.no_grad()
    def reference(self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, e: Tensor, cond: Cond) -> Tensor:
        """(B, ...) x_ref: its DDIM step from x_t to e lands where the student's from x_r does."""
        z_e = torch.where(expand(r - e, x_r) <= 0, x_r, self.student(x_r, r, cond).at(e))
        return inverse_ddim(z_e, x_t, t, e)

    def consistency(
        self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, e: Tensor, cond: Cond, seed: int = 0
    ) -> dict[str, Tensor]:
        """w(t) d(f(x_t, t), sg x_ref); both passes of the student drop the same units."""
        with seeded(seed, x_t.device):
            x0 = self.student(x_t, t, cond).x0
        with seeded(seed, x_t.device):
            x_ref = self.reference(x_t, x_r, t, r, e, cond)
        if self.config.loss_weight == "v":  # v is (cos(t) x_t - x0)/sin(t)
            d = self.distance(x0 / expand(torch.sin(t), x0), x_ref / expand(torch.sin(t), x0))
        else:
            d = self.distance(x0, x_ref)
        snr_plus_one = (torch.sin(t) ** -2).to(d)
        weighted = snr_plus_one * d if self.config.loss_weight == "snr_plus_one" else d
        return {"loss": weighted.mean(), "distance": d.mean()}


METHOD = MultistepConsistency


class _Gaussian:
    """A Gaussian teacher and an affine student per angle; in VE coordinates x_t/cos(t) all maps are affine about mu."""

    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.0]).double()

    def __init__(self, config: Config):
        self.exact = GaussianMixture(self.mu[None], self.s[None])
        schedule = TrigFlow(t_max=1.5)
        teacher = Teacher(Denoiser(self.exact, schedule, ROWS["v_prediction"]), (2,))
        empty = Denoiser(AffinePerAngle(torch.zeros(1), 2), schedule, ROWS["sample"])
        self.grid = MultistepConsistency(teacher, config, student=empty).grid(0)
        self.network = AffinePerAngle(self.grid[:, :-1].flatten(), 2)
        self.method = MultistepConsistency(teacher, config, student=Denoiser(self.network, schedule, ROWS["sample"]))

    def node(self, row: int, i: int) -> int:
        return row * (self.grid.shape[1] - 1) + i

    def at(self, row: int, i: int) -> tuple[Tensor, ...]:
        """x_t, x_r (16, 2) and t, r, e (16,) of one step of a segment, from data that has the two first moments."""
        z, eps = two_points(2)
        x0 = self.mu + self.s * z
        t, r, e = (self.grid[row, k].expand(16) for k in (i, i + 1, -1))
        x_t = diffuse(x0, t, eps)
        return x_t, self.method.less_noisy(x_t, x0, eps, t, r, {}), t, r, e

    def minimise(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient after each angle was fitted to x_ref, from the end of its segment upwards."""
        losses = []
        for row in range(len(self.grid)):
            for i in reversed(range(self.grid.shape[1] - 1)):
                x_t, x_r, t, r, e = self.at(row, i)
                self.network.fit(self.node(row, i), x_t, self.method.reference(x_t, x_r, t, r, e, {}))
                losses.append(self.method.consistency(x_t, x_r, t, r, e, {})["loss"])
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
        got = _Gaussian(Config(eta=eta)).method.less_noisy(x_t, x0, eps, t, s, {})
        yield equal(f"adjusted DDIM, eq. 14, eta = {eta}", closed, got, 1e-12)
    plain = alpha_s * mean + sigma_s * noise
    yield differs("which is more than DDIM", plain, got, 1e-3)
    shared = _Gaussian(Config(mode="training")).method.less_noisy(x_t, x0, eps, t, s, {})
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
            exact = game.exact.flow_map(x_t, t, e)
            yield differs(f"which is not yet the exact map, segment {row + 1} of {segments}", exact, got, 1e-4)
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
    x_ref = game.method.reference(x_t, x_r, t, r, e, {})
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
    loss = game.method.consistency(x_t, x_r, t, r, e, {})["loss"]
    yield equal(f"the loss, {label}", outside * value.mean(), loss, 1e-10)
    got = gradient(loss, network.slope, network.offset)
    yield equal(f"its gradient, through the noisier point alone, {label}", expected, got, 1e-10)


def _limits() -> Iterator[Check]:
    """As many segments as steps is diffusion; one segment is a consistency model; N_teacher(i); dropout."""
    game = _Gaussian(Config(segments=4, teacher_steps_start=4, mode="training", loss_weight="v", distance="l2"))
    z, eps = two_points(2)
    x0 = game.mu + game.s * z
    for row in (0, 2, 3):
        t, r = game.grid[row, 0].expand(16), game.grid[row, 1].expand(16)
        x_t = diffuse(x0, t, eps)
        x_r = game.method.less_noisy(x_t, x0, eps, t, r, {})
        got = game.method.reference(x_t, x_r, t, r, r, {})
        yield equal(
            f"training with as many segments as steps: x_ref is the data, eq. 9, segment {row + 1}", x0, got, 1e-12
        )
    one = _Gaussian(Config(segments=1, teacher_steps_start=6))
    one.network.slope.data.fill_(0.4)
    x_t, x_r, t, r, e = one.at(0, 1)
    yield equal("one segment: x_ref is f(x_r, r)", 0.4 * x_r, one.method.reference(x_t, x_r, t, r, e, {}), 1e-12)

    method = _Gaussian(Config(segments=8, anneal_steps=100)).method
    expected = [8.0, round(math.sqrt(64 * 1280) / 8), 160.0, 160.0]
    counts = [float(method.per_segment(k)) for k in (0, 50, 100, 1000)]
    yield equal("N_teacher(i) per segment", torch.tensor(expected), torch.tensor(counts), 0.0)
    grid = game.grid
    yield equal("segments end where the next one begins", grid[1:, 0], grid[:-1, -1], 0.0)

    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    teacher = Denoiser(layers, TrigFlow(), ROWS["sample"], call=lambda module, x, time, cond: module(x))
    method = MultistepConsistency(Teacher(teacher, (2,)), Config())
    t, e = torch.full((16,), 1.0).double(), torch.full((16,), 0.5).double()
    loss = method.consistency(z, z, t, t, e, {}, seed=7)["distance"]
    yield equal("both passes drop the same units", 0.0, loss, 1e-9, scale=1.0)
