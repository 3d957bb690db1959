"""Exact checks of ladd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gauss_hermite, gradient, mistake
from diffdistill.methods.ladd import LADD, Config
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import adversary
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.0002,
        "discriminator_lr": 0.002,
        "beta1": 0.0,
        "student_steps": 1,
        "depths": "0.2, 0.5, 0.7",
        "gan_loss": "logistic",
        "gan_time_mean": -0.5,
        "gan_time_std": 1.5,
        "misaligned": False,
        "update_ratio": 2,
        "steps": 2500,
    },
}

T, SLOPE = 0.8, torch.tensor([0.4, -1.1]).double()
MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()


def verify() -> Iterator[Check]:
    """Section 13.3's sanity items, and the mistakes that they must catch."""
    yield from _optimal_discriminator()
    yield from _hinge()
    yield from _student()
    yield from _levels()
    yield from _turns()


class _Known(LatentAdversary):
    """The method's own adversary with a discriminator that is a function of the noised image, at one time."""

    def __init__(self, teacher: Teacher, options: Any, function: Callable[[Tensor], Tensor] | None = None):
        self.teacher, self.options, self.samples = teacher.denoiser, options, {}
        self.heads, self.function = nn.ModuleList(), function or (lambda x_t: x_t @ SLOPE)

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return self.function(diffuse(x, t, eps))[None]


class _Logits(_Known):
    """On samples (n,) that are their own logits."""

    def __init__(self, **options: Any):
        super().__init__(gaussian_teacher([0.0], 1.0), Config(**options))

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return x[None]

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.critic_loss(fake, _batch(real))


def _batch(images: Tensor, step: int = 0) -> Batch:
    return Batch(len(images), images.shape[1:], {}, images, images.device, (0, step, 0))


def _optimal_discriminator() -> Iterator[Check]:
    """The logistic losses with d = log p_t/q_t, by quadrature: whatever the time, p = q is the optimum."""
    nodes, weights = gauss_hermite(80)
    gan = _Logits(gan_loss="logistic")
    p = GaussianMixture([[0.7]], [0.5])

    def expected(loss: Callable[..., Tensor], *logits: Tensor) -> Tensor:
        return (weights * torch.stack([loss(*(d[None] for d in each)) for each in zip(*logits, strict=True)])).sum()

    for t in (0.3, 1.2):
        angle = torch.full((len(nodes),), t, dtype=torch.float64)
        cos, sin = math.cos(t), math.sin(t)
        for name, m, b in (("another Gaussian", 0.2, 0.9), ("the teacher's", 0.7, 0.5)):
            q, mean = GaussianMixture([[m]], [b]), torch.tensor(m, dtype=torch.float64, requires_grad=True)
            x, real = (
                (cos * centre + math.sqrt(cos**2 * std**2 + sin**2) * nodes)[:, None]
                for centre, std in ((mean, b), (0.7, 0.5))
            )
            logit, of_real = (p.log_density(at, angle) - q.log_density(at, angle) for at in (x, real))
            got = gradient(expected(lambda d: gan.student_loss(d, _batch(d)), logit), mean)
            pull = (p.score(x, angle) - q.score(x, angle))[:, 0] * cos
            closed = -(weights * torch.sigmoid(-logit) * pull).sum()
            yield equal(f"the student's gradient, {name}, t = {t}", closed, got, 1e-9, scale=1.0)
            if name == "the teacher's":
                yield equal(f"... is zero, t = {t}", 0.0, got, 1e-12, scale=1.0)
                continue
            yield differs(f"... is not zero, t = {t}", 0.0, got, 1e-3, scale=1.0)
            h = torch.zeros((), dtype=torch.float64, requires_grad=True)
            ends = of_real.detach() + h * real[:, 0].detach(), logit.detach() + h * x[:, 0].detach()
            yield equal(f"log p/q is at rest, t = {t}", 0.0, gradient(expected(gan.critic, *ends), h), 1e-6, scale=1.0)
            swapped = gradient(expected(gan.critic, *ends[::-1]), h)
            yield differs(f"... and not with real and generated swapped, t = {t}", 0.0, swapped, 1e-3, scale=1.0)
    level = torch.zeros(4, dtype=torch.float64)
    yield equal("the logistic loss at p = q is 2 log 2", 2 * math.log(2), gan.critic(level, level), 1e-12)


def _hinge() -> Iterator[Check]:
    """The hinge with d = sign(p - q) is 2 (1 - total variation), the least that there is."""
    gan, apart = _Logits(gan_loss="hinge"), 1.3
    grid = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    p, q = (torch.exp(-((grid - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (apart / 2, -apart / 2))

    def expected(d: Tensor) -> Tensor:
        real = torch.stack([gan.critic(v[None], torch.full((1,), -9.0).double()) for v in d.unique()])
        fake = torch.stack([gan.critic(torch.full((1,), 9.0).double(), v[None]) for v in d.unique()])
        chosen = torch.searchsorted(d.unique(), d)
        return torch.trapezoid(p * real[chosen] + q * fake[chosen], grid)

    variation = 2 * torch.special.ndtr(torch.tensor(apart / 2).double()) - 1
    sign = torch.sign(p - q)
    yield equal("the hinge of the best discriminator is 2 (1 - TV)", 2 * (1 - variation), expected(sign), 1e-4)
    yield differs("... and not of it swapped", 2 * (1 - variation), expected(-sign), 1e-2)
    yield differs("... nor of half of it", 2 * (1 - variation), expected(sign / 2), 1e-2)
    small = torch.tensor([-0.6, 0.2, 0.9]).double()
    yield equal("at p = q it is 2, whatever d in [-1, 1]", 2.0, gan.critic(small, small), 1e-12)
    batch, mixed = _batch(small), _Logits(gan_loss="hinge", misaligned=True)
    with mistake(mixed, "logits", lambda x, t, eps, cond: x[None] + eps.mean() * 0):
        got = mixed.critic_loss(small - 1, batch)
    closed = (1 - small).mean() + torch.cat([small.clamp_min(0), 1 + small]).mean()
    yield equal("misaligned images count as generated ones", closed, got, 1e-12)


def _method(**options: Any) -> LADD:
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = Denoiser(AffineGenerator(MEAN, STD), TrigFlow(), OUTPUTS["v_prediction"])
    with mistake(adversary, "LatentAdversary", _Known):
        return LADD(teacher, Config(**options), student=student)


def _student() -> Iterator[Check]:
    """With a linear discriminator d(x_t) = a x_t the student's gradient in its mean is -a cos(t)."""
    for loss in ("hinge", "logistic"):
        method = _method(gan_loss=loss)
        parameters = list(method.student.parameters())
        batch = _batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).double())
        fixed = lambda schedule, n, *rest: torch.full((n,), T, dtype=torch.float64)  # noqa: E731
        with mistake(adversary, "edm_log_normal", fixed):
            got = gradient(method.turns(0)[0].loss(batch).loss, *parameters)
            clean = gradient(_without_noise(method, batch), *parameters)
        z, eps = batch.randn("z").double(), batch.randn("student/gan eps").double()
        d = (math.cos(T) * (MEAN + STD * z) + math.sin(T) * eps) @ SLOPE
        share = torch.ones_like(d) if loss == "hinge" else torch.sigmoid(-d)
        closed = torch.cat([-math.cos(T) * SLOPE * share.mean(), -math.cos(T) * SLOPE * (share[:, None] * z).mean(0)])
        yield equal(f"the student's gradient with a linear discriminator, {loss}", closed, got, 1e-9)
        yield differs(f"... is another where nothing is noised, {loss}", closed, clean, 1e-2)
        x = method.student(*method.read(batch), {}).x0.detach()
        critic = method.turns(0)[1].loss(batch)
        yield equal(f"the discriminator reads the student's samples, {loss}", 2, x.ndim, 0.0)
        yield equal(f"... without a gradient, {loss}", 0.0, float(critic.loss.requires_grad), 0.0)


def _without_noise(method: LADD, batch: Batch) -> Tensor:
    with mistake(method.adversary, "logits", lambda x, t, eps, cond: (x @ SLOPE)[None]):
        return method.turns(0)[0].loss(batch).loss


def _levels() -> Iterator[Check]:
    """What the student reads: noise at the first level, and elsewhere images noised to the level of their time."""
    method = _method(student_steps=4, noisiest_share=0.7)
    draw = torch.Generator().manual_seed(3)
    batch = _batch(MEAN + STD * torch.randn(20000, 2, generator=draw, dtype=torch.float64))
    x_t, t = method.read(batch)
    angles = method.schedule.angle(method.levels)
    shares = torch.stack([(t == angle).double().mean() for angle in angles])
    yield equal("shares of the levels", torch.tensor([0.7, 0.1, 0.1, 0.1]), shares, 0.03)
    even = _method(student_steps=4)
    _, drawn = even.read(batch)
    shares = torch.stack([(drawn == angle).double().mean() for angle in angles])
    yield equal("shares of the levels without a share", torch.full((4,), 0.25), shares, 0.03)
    for angle in angles.tolist():
        x = x_t[t == angle]
        cos, sin = math.cos(angle), math.sin(angle)
        closed = torch.cat([cos * MEAN, (cos**2 * STD**2 + sin**2).sqrt()])
        yield equal(f"mean and deviation of what is read at {angle:.2f}", closed, torch.cat([x.mean(0), x.std(0)]), 0.1)
    z = batch.randn("z").to(x_t)
    yield equal("the first level reads noise alone", z[t == angles[0]], x_t[t == angles[0]], 1e-12)


def _turns() -> Iterator[Check]:
    for ratio in (1, 3):
        method = _method(update_ratio=ratio)
        order = [[turn.player for turn in method.turns(k)] for k in range(2 * ratio)]
        expected = [(["student"] if k % ratio == 0 else []) + ["discriminator"] for k in range(2 * ratio)]
        yield equal(f"order of turns, update_ratio {ratio}", 1.0, float(order == expected), 0.0)
