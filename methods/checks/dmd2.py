"""Exact checks of dmd2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import student_levels
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture, LearnedGaussian, gaussian_teacher
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    differs,
    equal,
    gauss_hermite,
    gradient,
    matching_checks,
    mistake,
)
from diffdistill.exact.midpoints import midpoint_checks
from diffdistill.methods.dmd2 import DMD2, Config
from diffdistill.players.teacher import trainable_copy
from diffdistill.scaffold import matching
from diffdistill.scaffold.adversary import Adversary
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.simulation import drawn_level

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "student_level": 1.57,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2500,
    },
    "two steps": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "student_steps": 2,
        "fake_scores": "per_level",
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2500,
    },
    "with a GAN": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.0,
        "student_level": 1.57,
        "gan_weight": 1.0,
        "discriminator_weight": 0.1,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2000,
        "batch_size": 128,
    },
}


def verify() -> Iterator[Check]:
    """Appendix B's rows for distribution matching, on Gaussians whose every quantity is known."""

    def make(parts: AffineGame, normalise: bool) -> DMD2:
        config = Config(normalise=normalise)
        return DMD2(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from matching_checks(make)
    yield from _gan_checks()
    yield from _simulation_checks()
    yield from _level_checks()
    for t in (0.5, 1.1):
        yield from _reward_checks(t)
    yield from _alignment_checks()
    yield from _anchor_checks()
    yield from midpoint_checks(DMD2, Config)
    teacher = gaussian_teacher([0.0], 1.0)
    for ratio in (1, 3):
        method = DMD2(teacher, Config(update_ratio=ratio))
        order = [[turn.player for turn in method.turns(k)] for k in range(2 * ratio)]
        expected_order = [(["student"] if k % ratio == 0 else []) + ["fake_score"] for k in range(2 * ratio)]
        same = float(order == expected_order)
        yield equal(f"order of turns, update_ratio {ratio}: the student first, every {ratio}", 1.0, same, 0.0)


def _simulation_checks() -> Iterator[Check]:
    """Backward simulation with the exact map to data, x0 = mu + s (x_t - cos(t) mu)/sqrt(V), at each of four levels."""
    mu, s = torch.tensor([0.7]).double(), torch.tensor([0.5]).double()
    teacher = gaussian_teacher(mu.tolist(), s)
    schedule = teacher.denoiser.schedule
    angles = schedule.angle(student_levels(schedule, 4))
    network = AffinePerAngle(angles, 1)
    variance = torch.cos(angles) ** 2 * s**2 + torch.sin(angles) ** 2
    network.slope.data[:] = (s / variance.sqrt())[:, None]
    network.offset.data[:] = mu - network.slope.data * (torch.cos(angles) * mu)[:, None]
    student = Denoiser(network, schedule, OUTPUTS["sample"])
    method = DMD2(teacher, Config(student_steps=4), student=student, fake_score=student)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4).unsqueeze(-1)  # (16, 4, 1): z and 3 noises
    for k in range(4):
        with torch.no_grad():
            x_t, _ = method.sampler().input_at(k, signs[:, 0], {}, lambda j: signs[:, j])
        got = torch.cat([x_t.mean(0), x_t.var(0, unbiased=False)])
        closed = torch.stack([torch.cos(angles[k]) * mu[0], variance[k]])
        yield equal(f"mean and variance of what level {k} reads are the teacher's", closed, got, 1e-12)
        if k:
            same = method.sampler().input_at(k, signs[:, 0], {}, lambda j: signs[:, 0])[0].detach()
            yield differs(f"the first noise again at level {k} is caught", variance[k], same.var(unbiased=False), 1e-3)
    trained = torch.zeros(4, 1, dtype=torch.float64)
    alone = 0
    for step in range(24):
        batch = Batch(8, (1,), {}, None, torch.device("cpu"), (0, step, 0))
        slope = gradient(method.generate(batch, "student").sum(), network.slope).view(4, 1)
        trained += (slope != 0).double()
        alone += int((slope != 0).sum() == 1)
    yield equal("gradients flow through one level's pass, not through the simulation", 24.0, float(alone), 0.0)
    yield equal("every level gets its turn", 4.0, float((trained > 0).sum()), 0.0)


class _Signs(Batch):
    """z, the three noises of a simulation, and eps as all 2^5 signs, which are exact for moments of second order."""

    def randn(self, purpose: str) -> Tensor:
        """(32, 1), another column for each purpose."""
        column = ["z", "z 1", "z 2", "z 3"].index(purpose) if purpose.startswith("z") else 4
        return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 5)[:, column : column + 1]


class _AtOneTime(DMD2):
    def times(self, player: str, batch: Batch) -> Tensor:
        return torch.full((batch.size,), 0.8, dtype=torch.float64)


def _level_checks() -> Iterator[Check]:
    """Four levels whose samples are four Gaussians, the last of them the teacher's: a fake score for each, or one."""
    teacher = gaussian_teacher([0.7], 0.5)
    schedule = teacher.denoiser.schedule
    angles = schedule.angle(student_levels(schedule, 4))
    network = AffinePerAngle(angles, 1)
    means, stds = torch.tensor([[0.3, 0.5, 0.6, 0.7], [0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    read_mean, read_variance = torch.zeros(()).double(), torch.ones(()).double()  # of what a level reads
    for k in range(4):
        network.slope.data[k] = stds[k] / read_variance.sqrt()
        network.offset.data[k] = means[k] - network.slope.data[k] * read_mean
        if k < 3:
            cos, sin = torch.cos(angles[k + 1]), torch.sin(angles[k + 1])
            read_mean, read_variance = cos * means[k], cos**2 * stds[k] ** 2 + sin**2

    def game(kind: str, mean: Tensor, std: Tensor) -> DMD2:
        """With the Gaussians (n,) as the fake scores."""
        student = Denoiser(network, schedule, OUTPUTS["sample"])
        fake_score = Denoiser(LearnedGaussian(1).double(), schedule, OUTPUTS["v_prediction"])
        config = Config(student_steps=4, fake_scores=kind, update_ratio=1, normalise=False)  # type: ignore[arg-type]
        method = _AtOneTime(teacher, config, student=student, fake_score=fake_score)
        for each, m, b in zip(method.fake_scores, mean, std, strict=True):
            gaussian = each.network
            assert isinstance(gaussian, LearnedGaussian)
            gaussian.mean.data[:], gaussian.log_std.data[:] = m, b.log()
        return method

    def batch(step: int) -> Batch:
        return _Signs(32, (1,), {}, None, torch.device("cpu"), (0, step, 0))

    def slope(method: DMD2, step: int, k: int = 0) -> Tensor:
        """The k-th fake score's gradient in that step's turn."""
        return gradient(method.turns(step)[1].loss(batch(step)).loss, *method.fake_scores[k].parameters())

    def pull(method: DMD2, step: int) -> Tensor:
        """The student's gradient in the last level's slope and offset."""
        loss = method.turns(step)[0].loss(batch(step)).loss
        return gradient(loss, network.slope, network.offset).view(2, 4)[:, 3]

    own, others = game("per_level", means, stds), game("per_level", means.roll(1), stds.roll(1))
    for k in range(4):
        name = f"fake score is at rest on the samples of level {k}"
        yield equal(f"its own {name}", 0.0, slope(own, k, k), 1e-9, scale=1.0)
        yield differs(f"that another level's {name} is caught", 0.0, slope(others, k, k), 1e-2, scale=1.0)
    mixture = means.mean()[None], (stds.square().mean() + means.var(unbiased=False)).sqrt()[None]
    shared = game("shared", *mixture)
    steps = [next((step for step in range(100) if drawn_level(4, batch(step)) == k), 0) for k in range(4)]
    slopes = [slope(shared, step) for step in steps]
    yield equal("a shared one is at rest on the samples of all levels", 0.0, sum(slopes), 1e-9, scale=1.0)
    yield differs("and not on the last level's", 0.0, slopes[3], 1e-2, scale=1.0)
    name = "a last level that draws the teacher's distribution"
    yield equal(f"{name} stays, with its own fake score", 0.0, pull(own, 3), 1e-9, scale=1.0)
    yield differs(f"{name} is pushed away by a shared one", 0.0, pull(shared, steps[3]), 1e-2, scale=1.0)


class _Nodes(Batch):
    """z at the nodes of a quadrature, each with eps = 1 and -1."""

    def randn(self, purpose: str) -> Tensor:
        """(2n, 1)."""
        nodes = gauss_hermite(self.size // 2)[0]
        return torch.cat([nodes, nodes] if purpose == "z" else [torch.ones_like(nodes), -torch.ones_like(nodes)])[
            :, None
        ]


def _reward_checks(t: float) -> Iterator[Check]:
    """Re-DMD with the reward x: each sample counts exp(x/beta) times, under which z has the mean b/beta."""
    mu, s, m, b = (torch.tensor([v]).double() for v in (0.7, 0.5, -0.3, 0.9))
    beta, n, cos, sin = 0.8, 60, math.cos(t), math.sin(t)
    weights = 2 * n * gauss_hermite(n)[1].repeat(2)[:, None] / 2  # the loss is a mean over them

    def got(mean: Tensor = m, scale: Tensor = b, reward: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        parts = affine_game(mu, s, mean, scale)
        config, players = Config(reward_beta=beta, normalise=False), {"fake_score": parts.fake_score}
        method = DMD2(parts.teacher, config, student=parts.student, **players)
        method.reward = lambda x, batch: reward(x.detach())[:, 0]
        at, real = torch.full((2 * n,), t, dtype=torch.float64), matching.gradient_injection
        with (
            mistake(method, "times", lambda player, batch: at),
            mistake(matching, "gradient_injection", lambda x, grad: real(x, weights * grad)),
        ):
            loss = method.student_turn({}, _Nodes(2 * n, (1,), {}, None, torch.device("cpu"), (0, 0, 0))).loss
        return gradient(loss, parts.generator.mean, parts.generator.scale)

    big_v, big_u = (cos**2 * width**2 + sin**2 for width in (s, b))
    constant, slope = cos**2 * (m / big_u - mu / big_v), cos**2 * (1 / big_v - 1 / big_u)  # of the gap, in x
    size, shift = torch.exp(m / beta + b**2 / (2 * beta**2)), b / beta
    pull = constant + slope * (m + b * shift)
    widening = (constant + slope * m) * shift + slope * b * (1 + shift**2)
    closed = size * torch.cat([pull, widening])
    yield equal(f"gradient weighted by exp(reward/beta), t = {t}", closed, got(), 1e-9)
    plain = torch.cat([constant + slope * m, slope * b])
    fixed = got(reward=lambda x: torch.full_like(x, 0.4))
    yield equal(f"a reward that is the same for all is a factor, t = {t}", math.exp(0.4 / beta) * plain, fixed, 1e-9)
    yield differs(f"the reward's sign is caught, t = {t}", closed, got(reward=lambda x: -x), 1e-2)
    yield differs(f"no reward is caught, t = {t}", closed, plain, 1e-2)
    at_rest = got(mu, s)
    yield equal(
        f"it does not tilt: at rest at the teacher's, whatever the reward, t = {t}", 0.0, at_rest, 1e-9, scale=1
    )
    tilted = got(mu + s**2 / beta, s)
    yield differs(f"... and not at the density times exp(reward/beta), t = {t}", 0.0, tilted, 1e-2, scale=1.0)


def _alignment_checks() -> Iterator[Check]:
    """SenseFlow's alignment has a bias, d q (1 - l)/(1 - q l), where l is what the fake score keeps of itself.

    d is by how much the student's weights differ from those of its exact fake score, which it is not itself, and q what
    of the fake score's error its own steps leave from one of the student's to the next.
    """
    teacher, gap = gaussian_teacher([0.0], 1.0), 0.7
    schedule = teacher.denoiser.schedule

    def weights(value: float) -> Denoiser:
        network = LearnedGaussian(1).double()
        for p in network.parameters():
            p.data.fill_(value)
        return Denoiser(network, schedule, OUTPUTS["v_prediction"])

    def steady(share: float, left: float, n: int) -> Tensor:
        """The fake score's error (2,) as the student's turn finds it, after many steps; the exact one is at 0."""
        config = Config(alignment=share, update_ratio=n)
        method = DMD2(teacher, config, student=weights(gap), fake_score=weights(0.3))
        network = method.fake_score.network
        for step in range(300 * n):
            method.after_step(step)
            for p in network.parameters():
                p.data.mul_(left)
        return torch.cat([p.data for p in network.parameters()])

    for n, left in ((1, 0.9), (5, 0.9), (1, 0.99), (5, 0.99)):
        q, kept = left**n, 0.97
        bias = torch.full((2,), gap * q * (1 - kept) / (1 - q * kept), dtype=torch.float64)
        name = f"{n} steps of the fake score, each leaving {left}"
        yield equal(f"the bias of alignment is {float(bias[0]) / gap:.0%}: {name}", bias, steady(0.03, left, n), 1e-2)
    yield equal("without it there is none", 0.0, steady(0.0, 0.9, 1), 1e-6, scale=1.0)


def _anchor_checks() -> Iterator[Check]:
    """The anchor is zero where the student's first step is the teacher's steps, a product of linear factors."""
    batch, nothing = _Signs(32, (1,), {}, None, torch.device("cpu"), (0, 0, 0)), Outcome(torch.zeros(()))
    for n in (1, 4, 10):
        (method, _), (wrong, moved) = _anchored(n), _anchored(n, off=0.2)
        t, r = method.schedule.angle(torch.tensor(method.sampler().levels, dtype=torch.float64))
        shown = method.with_anchor(nothing, batch).shown["anchor"]
        yield equal(f"the anchor is zero at the end of the teacher's {n} steps", 0.0, shown, 1e-9, scale=1.0)
        method.config = replace(method.config, anchor_steps=n + 3)
        other = method.with_anchor(nothing, batch).shown["anchor"]
        yield differs(f"another number of steps than {n} is caught", 0.0, other, 1e-6, scale=1.0)
        apart = 0.2 * (torch.cos(r) - torch.sin(r) / torch.tan(t)) / torch.sin(t - r)
        far = wrong.with_anchor(nothing, batch).loss
        yield equal(f"its size by an error of x0, {n} steps", 0.3 * apart**2, far, 1e-9)
        closed = torch.stack([2 * 0.3 * apart**2 / 0.2, torch.zeros(()).double()])
        yield equal(f"its gradient is in the first step alone, {n} steps", closed, gradient(far, moved.offset), 1e-9)
        levels = {method.level(replace(batch, key=(0, step, 0))) for step in range(20)}
        yield equal(f"the first level is not matched, {n} steps", 1.0, float(levels == {1}), 0.0)


def _anchored(n: int, off: float = 0.0) -> tuple[DMD2, AffinePerAngle]:
    """A student x0 = slope x_t + offset (+ off) in two steps, of which the first leads where n of the teacher's do."""
    mu, s = torch.tensor([0.7]).double(), torch.tensor([0.5]).double()
    teacher = gaussian_teacher(mu.tolist(), s)
    schedule = teacher.denoiser.schedule
    angles = schedule.angle(student_levels(schedule, 2))

    def ddim(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """How much x0 and x_t count in x_r."""
        return torch.cos(r) - torch.sin(r) / torch.tan(t), torch.sin(r) / torch.sin(t)

    slope, offset = torch.ones(1).double(), torch.zeros(1).double()  # of x at the end, in x at the start
    first, last = schedule.fraction(angles)
    grid = schedule.at_fraction(torch.lerp(first, last, torch.linspace(0, 1, n + 1).double()))
    for t, r in itertools.pairwise(grid):
        gain = torch.cos(t) * s**2 / (torch.cos(t) ** 2 * s**2 + torch.sin(t) ** 2)
        of_x0, of_x = ddim(t, r)
        step = of_x + of_x0 * gain
        slope, offset = step * slope, step * offset + of_x0 * (mu - gain * torch.cos(t) * mu)
    network, (of_x0, of_x) = AffinePerAngle(angles, 1), ddim(*angles)
    network.slope.data[:], network.offset.data[:] = (slope - of_x) / of_x0, offset / of_x0 + off
    config = Config(student_steps=2, anchor_weight=0.3, anchor_steps=n, update_ratio=1)
    student = Denoiser(network, schedule, OUTPUTS["sample"])
    return DMD2(teacher, config, student=student, fake_score=trainable_copy(teacher.denoiser)), network


class _Logits(Adversary):
    """The method's own adversary on samples (B,) that are the discriminator's logits of themselves."""

    def __init__(self) -> None:
        self.fake_score = gaussian_teacher([0.0], 1.0).denoiser  # its schedule alone is read

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return x

    def of_critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.critic_loss(fake, self._batch(real))

    def of_student(self, fake: Tensor) -> Tensor:
        return self.student_loss(fake, self._batch(fake))

    def _batch(self, images: Tensor) -> Batch:
        return Batch(len(images), (), {}, images, images.device, (0, 0, 0))


def _gan_checks() -> Iterator[Check]:
    """The GAN losses with the optimal discriminator d = log p_t/q_t, by quadrature over z."""
    t, nodes, weights = 0.8, *gauss_hermite(80)
    angle = torch.full((len(nodes),), t).double()
    p, q, gan = GaussianMixture([[0.7]], [0.5]), GaussianMixture([[0.2]], [0.9]), _Logits()

    def points(mean: Tensor | float, std: float) -> Tensor:
        """(n, 1) nodes of the marginal at t of N(mean, std^2)."""
        spread = (torch.cos(angle) ** 2 * std**2 + torch.sin(angle) ** 2).sqrt()
        return (torch.cos(angle) * mean + spread * nodes)[:, None]

    def logit(x_t: Tensor) -> Tensor:
        return p.log_density(x_t, angle) - q.log_density(x_t, angle)

    def expected(loss_of: Callable[..., Tensor], *logits: Tensor) -> Tensor:
        terms = [loss_of(*(d[i : i + 1] for d in logits)) for i in range(len(nodes))]
        return (weights * torch.stack(terms)).sum()

    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    real, fake = points(0.7, 0.5), points(0.2, 0.9)
    for name, bump in (("x", lambda x: x[:, 0]), ("cos x", lambda x: torch.cos(x[:, 0]))):
        loss = expected(gan.of_critic, logit(real) + h * bump(real), logit(fake) + h * bump(fake))
        slope = gradient(loss, h)
        yield equal(f"log p_t/q_t minimises the discriminator's loss along {name}", 0.0, slope, 1e-6, scale=1)
        swapped = expected(gan.of_critic, logit(fake) + h * bump(fake), logit(real) + h * bump(real))
        yield differs("real and generated swapped are caught", 0.0, gradient(swapped, h), 1e-6, scale=1.0)

    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    got = gradient(expected(gan.of_student, logit(points(mean, 0.9))), mean)
    pull = (p.score(fake, angle) - q.score(fake, angle))[:, 0] * torch.cos(angle)
    closed = -(weights * torch.sigmoid(-logit(fake)) * pull).sum()
    yield equal("the student's GAN gradient is -E[q/(p+q) (s_p - s_q)]", closed, got, 1e-9)
    level = torch.zeros(4, dtype=torch.float64)
    yield equal("the GAN loss at p = q is 2 log 2", 2 * math.log(2), gan.of_critic(level, level), 1e-12)
