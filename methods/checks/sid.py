"""Exact checks of sid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core import losses
from diffdistill.core.denoiser import Cond
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import EDM
from diffdistill.core.times import edm_log_normal
from diffdistill.exact.analytic import GaussianMixture, mixture_teacher
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    at_half_the_angle,
    differs,
    equal,
    gradient,
    mistake,
    two_points,
)
from diffdistill.methods.sid import Config, SiD
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "alpha": 1.0,
        "time_low": 0.2,
        "time_high": 0.8,
        "student_level": 1.373,
        "steps": 2000,
    },
}


@dataclass(frozen=True)
class _Exact:
    """Closed forms, per dimension, for a teacher N(mu, s^2) and a student N(m, b^2) at the angle t.

    x_t = cos m + sqrt(U) w with U = cos^2 b^2 + sin^2, and D = mean + k (x_t - cos mean), k = cos std^2/variance.
    """

    mu: Tensor
    s: Tensor
    m: Tensor
    b: Tensor
    t: float

    def coefficients(self, m: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(offset, slope) of Delta = offset + slope x_t, where the fake score is that of a student (m, b)."""
        cos, sin2 = math.cos(self.t), math.sin(self.t) ** 2
        k_phi = cos * self.s**2 / (cos**2 * self.s**2 + sin2)
        k_psi = cos * b**2 / (cos**2 * b**2 + sin2)
        return self.mu * (1 - k_phi * cos) - m * (1 - k_psi * cos), k_phi - k_psi

    def fisher(self, sampling: tuple[Tensor, Tensor], score: tuple[Tensor, Tensor]) -> Tensor:
        """E|Delta|^2 over the dimensions' mean, x_t from the student `sampling`, the fake score of `score`."""
        cos, sin2 = math.cos(self.t), math.sin(self.t) ** 2
        offset, slope = self.coefficients(*score)
        m, b = sampling
        return ((offset + slope * cos * m) ** 2 + slope**2 * (cos**2 * b**2 + sin2)).mean()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of F in full, along the samples alone, and along the fake score alone (frozen distribution)."""
        theta = self.m.clone().requires_grad_(), self.b.clone().requires_grad_()
        now = self.m, self.b
        parts = self.fisher(theta, theta), self.fisher(theta, now), self.fisher(now, theta)
        full, path, frozen_distribution = (gradient(f, *theta) for f in parts)
        return full, path, frozen_distribution

    def diff_instruct(self) -> Tensor:
        """sin^2/cos^2 times the gradient of KL(q_t || p_t), a mean over two dimensions: Diff-Instruct's."""
        cos2, sin2 = math.cos(self.t) ** 2, math.sin(self.t) ** 2
        big_v, big_u = cos2 * self.s**2 + sin2, cos2 * self.b**2 + sin2
        return torch.cat([sin2 * (self.m - self.mu) / big_v, sin2 * self.b * (1 / big_v - 1 / big_u)]) / 2


MU, S = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)  # the teacher's
M, B = torch.tensor([-0.3, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.6], dtype=torch.float64)  # the student's


def verify() -> Iterator[Check]:
    """Appendix B's row for SiD, on Gaussians whose every quantity is known."""
    for t in (0.2, 0.8, 1.4):
        exact = _Exact(MU, S, M, B, t)
        for alpha in (0.0, 0.5, 1.0, 1.2):
            yield from _loss_checks(exact, alpha)
        yield from _optimum_checks(t)
        yield from _normaliser_checks(exact)
        yield from _denoising_checks(t)
    order = [turn.player for turn in _game(M, B, Config())[0].turns(0)]
    yield equal("the fake score moves first", 1.0, float(order == ["fake_score", "student"]), 0.0)
    yield from _level_checks()
    yield from _flow_checks()
    yield from _guidance_checks()


def _game(mean: Tensor, scale: Tensor, config: Config) -> tuple[SiD, AffineGame]:
    parts = affine_game(MU, S, mean, scale)
    method = SiD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
    only_trains("student", trainable(method.players))
    return method, parts


def _points(t: float) -> tuple[Tensor, Tensor, Tensor]:
    """z, eps and the angles; without the normaliser everything here has degree 2."""
    z, eps = two_points(2)
    return z, eps, torch.full((len(z),), t, dtype=torch.float64)


def _slope(method: SiD, parts: AffineGame, t: float) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in (mean, scale)."""
    z, eps, angle = _points(t)
    loss = method.matching(method.sampler().one_step(z, {}), angle, eps, {}).loss
    return loss, gradient(loss, parts.generator.mean, parts.generator.scale)


def _loss_checks(exact: _Exact, alpha: float) -> Iterator[Check]:
    """The student's loss without the normaliser, and its gradient."""
    t = exact.t
    fisher = exact.fisher((M, B), (M, B))
    full, path, frozen_distribution = exact.gradients()
    method, parts = _game(M, B, Config(alpha=alpha, normalise=False))
    loss, got = _slope(method, parts, t)
    yield equal(f"E[L] = (1 - a) F, a = {alpha}, t = {t}", (1 - alpha) * fisher, loss, 1e-9, scale=1e-3)
    expected = full / 2 + (0.5 - alpha) * path
    yield equal(f"gradient of the loss, a = {alpha}, t = {t}", expected, got, 1e-9)
    if alpha == 0.5:
        yield equal(f"half the Fisher divergence's gradient at a = 1/2, t = {t}", full / 2, got, 1e-9)
    if alpha == 1.0:
        yield equal(f"the frozen distribution's gradient at a = 1, t = {t}", frozen_distribution / 2, got, 1e-9)
        other, parts_of_other = _game(M, B, Config(alpha=0.5, normalise=False))
        wrong = _slope(other, parts_of_other, t)[1]
        yield differs(f"alpha left out is caught, t = {t}", expected, wrong, 1e-3)
    teacher, (evaluated,) = method.teacher, method.evaluated
    for name, network, other_one in (("teacher", teacher, evaluated), ("evaluated", evaluated, teacher)):

        def held(network: Any, name: str = name) -> Any:
            return [network] if name == "evaluated" else network  # one for each level

        with mistake(method, name, held(at_half_the_angle(network))):
            wrong = _slope(method, parts, t)[1]
            yield differs(f"{name} asked at another level is caught, a = {alpha}, t = {t}", expected, wrong, 1e-3)
        with mistake(method, name, held(other_one)):
            wrong = _slope(method, parts, t)[1]
            yield differs(f"{name} in place of the other is caught, a = {alpha}, t = {t}", expected, wrong, 1e-3)
    method.teacher, method.evaluated = _Detached(teacher), [_Detached(evaluated)]
    detached = _slope(method, parts, t)[1]
    name = f"a = {alpha}, t = {t}"
    yield equal(f"both networks detached: Diff-Instruct, {name}", exact.diff_instruct(), detached, 1e-9)
    yield differs(f"that this is not SiD is caught, {name}", expected, detached, 1e-3)

    same_width, parts = _game(M, S, Config(alpha=alpha, normalise=False))
    got = gradient(_slope(same_width, parts, t)[0], parts.generator.mean)
    sin2 = torch.sin(torch.tensor(t, dtype=torch.float64)) ** 2
    pull = (sin2 / ((1 - sin2) * S**2 + sin2)) ** 2 * (M - MU) / 2
    yield equal(f"the mean's gradient at the teacher's width, {name}", pull, got, 1e-9)


def _optimum_checks(t: float) -> Iterator[Check]:
    for normalise in (False, True):
        method, parts = _game(MU, S, Config(normalise=normalise))
        label = "with" if normalise else "without"
        zero = _slope(method, parts, t)[1]
        yield equal(f"zero at the optimum, {label} the normaliser, t = {t}", 0.0, zero, 1e-9, scale=1.0)


def _normaliser_checks(exact: _Exact) -> Iterator[Check]:
    z, eps, _ = _points(exact.t)
    method, parts = _game(M, B, Config())
    got = _slope(method, parts, exact.t)[1]
    expected = _normalised(exact, z, eps)
    yield equal(f"each sample's gradient is divided by n, t = {exact.t}", expected, got, 1e-9)

    def not_detached(x: Tensor, x0_teacher: Tensor) -> Tensor:
        return (x - x0_teacher).abs().mean(1)

    with mistake(losses, "l1_normaliser", not_detached):
        wrong = _slope(method, parts, exact.t)[1]
    yield differs(f"a gradient through n is caught, t = {exact.t}", expected, wrong, 1e-3)


def _denoising_checks(t: float) -> Iterator[Check]:
    """The fake score is exact, and so at the optimum of its own loss."""
    z, eps, angle = _points(t)
    method, parts = _game(M, B, Config())
    only_trains("fake_score", trainable(method.players))
    cos2, sin2 = torch.cos(angle[0]) ** 2, torch.sin(angle[0]) ** 2
    rate = torch.sqrt(cos2 * sin2) * (1 - B**2) / (cos2 * B**2 + sin2)  # of the exact velocity
    residual = (B * (rate * cos2.sqrt() + sin2.sqrt())) ** 2 + (rate * sin2.sqrt() - cos2.sqrt()) ** 2
    denoising = method.denoising(method.sampler().one_step(z, {}), angle, eps, {})
    yield equal(f"the fake score's loss at its optimum, t = {t}", residual.mean(), denoising, 1e-9)
    zero = gradient(denoising, parts.score.means, parts.score.stds)
    yield equal(f"its gradient there is zero, t = {t}", 0.0, zero, 1e-9, scale=1.0)


def _level_checks() -> Iterator[Check]:
    """Both players' levels are the same angles for all schedules."""
    method, _ = _game(M, B, Config())
    batch = Batch(1, (2,), {}, None, torch.device("cpu"), (0, 0, 0))
    for schedule in (EDM(), EDM(data_std=1.0, sigma_min=1e-9, sigma_max=1e9)):
        method.schedule = schedule
        for fraction, sigma in ((0.0, 0.002), (0.8, 24.40834178658), (1.0, 80.0)):
            # A range without width, which a Config refuses: every level that is drawn is its end.
            method.config = SimpleNamespace(times="karras", time_low=fraction, time_high=fraction)
            drawn = torch.tan(method.times("student", batch))
            yield equal(f"sigma at {fraction} of the grid, data_std {schedule.data_std}", 2 * sigma, drawn, 1e-9)
        drawn = torch.tan(edm_log_normal(schedule, 1, torch.Generator(), -1.2, 0.0))
        yield equal(f"the fake score's median sigma, data_std {schedule.data_std}", 2 * math.exp(-1.2), drawn, 1e-9)


def _flow_checks() -> Iterator[Check]:
    """SiD-DiT's levels and weight, of a flow's time; the optimum stays."""
    plain, flow = Config(normalise=False, alpha=1.0), Config(normalise=False, alpha=1.0, times="flow")
    for t in (0.2, 0.8, 1.4):
        weight = math.cos(t) / (math.cos(t) + math.sin(t))
        closed, got = (_slope(*_game(M, B, config), t)[1] for config in (plain, flow))
        yield equal(f"the flow's weight is 1 - its time, t = {t}", weight * closed, got, 1e-9)
        yield equal(f"... zero at the optimum, t = {t}", 0.0, _slope(*_game(MU, S, flow), t)[1], 1e-9, scale=1.0)
        for name, mean in (("above", MU + 0.2), ("below", MU - 0.2)):
            pull = (_slope(*_game(mean, S, flow), t)[1][:2] * (mean - MU) > 0).double()
            yield equal(f"... and draws samples back from {name}, t = {t}", torch.ones(2), pull, 0.0)
    method, _ = _game(M, B, flow)
    batch = Batch(20000, (2,), {}, None, torch.device("cpu"), (0, 0, 0))
    for player in ("student", "fake_score"):
        logit = torch.log(torch.tan(method.times(player, batch)))
        got = torch.stack([logit.mean(), logit.std()])
        yield equal(
            f"mean and deviation of the logit of the {player}'s flow times", torch.tensor([math.log(2), 1.6]), got, 0.02
        )


class _Detached(nn.Module):
    """The mistake of detaching a network's output where only its parameters should be fixed."""

    def __init__(self, denoise: nn.Module):
        super().__init__()
        self.denoise = denoise

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        pred = self.denoise(x_t, t, cond)
        return replace(pred, x_t=pred.x_t.detach(), y=pred.y.detach())


def _normalised(exact: _Exact, z: Tensor, eps: Tensor) -> Tensor:
    """The gradient of mean L_i/n_i at a = 1.2, from the Gaussians' formulas alone."""
    cos, sin = math.cos(exact.t), math.sin(exact.t)
    m, b = exact.m.clone().requires_grad_(), exact.b.clone().requires_grad_()
    x = m + b * z
    x_t = cos * x + sin * eps
    k = cos * exact.s**2 / (cos**2 * exact.s**2 + sin**2)
    from_x = exact.mu + k * (x_t - cos * exact.mu) - x
    offset, slope = exact.coefficients(exact.m, exact.b)
    delta = offset + slope * x_t
    loss = (delta * (from_x - 1.2 * delta)).mean(1) / from_x.abs().mean(1).detach()
    return gradient(loss.mean(), m, b)


def _guidance_checks() -> Iterator[Check]:
    """Guidance on two classes in one dimension: D_null + kappa (D_class - D_null), from the exact scores."""
    p = GaussianMixture([[-0.8], [0.9]], [0.5, 0.3], labels=[0, 1])
    q = GaussianMixture([[-0.2], [0.4]], [0.8, 0.6], labels=[0, 1])
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(6, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.3, 1.3, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    cond = {"class_labels": labels}
    x_t = torch.cos(t)[:, None] * x + torch.sin(t)[:, None] * eps

    def denoised(network: GaussianMixture, kappa: float) -> Tensor:
        own, none = (network.score(x_t, t, c) for c in (labels, torch.full_like(labels, 2)))
        score = none + kappa * (own - none)
        return (x_t + torch.sin(t)[:, None] ** 2 * score) / torch.cos(t)[:, None]

    teacher = mixture_teacher(p.means, p.stds, labels=[0, 1])
    for kappas in ((1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.5), (2.0, 1.5, 4.0)):
        training, fake, real = kappas
        config = Config(
            guidance_scale=real,
            fake_score_guidance=fake,
            fake_score_training_guidance=training,
            normalise=False,
        )
        method = SiD(teacher, config, student=teacher.denoiser, fake_score=q.denoiser())
        real_x0, fake_x0 = denoised(p, real), denoised(q, fake)
        delta = real_x0 - fake_x0
        expected = (delta * (real_x0 - x - 1.2 * delta)).mean()
        name = f"kappa_1, kappa_2 = kappa_3, kappa_4 = {training}, {fake}, {real}"
        yield equal(f"the student's loss at {name}", expected, method.matching(x, t, eps, cond).loss, 1e-9)
        fit = ((denoised(q, training) - x) / torch.sin(t)[:, None]).square().mean()
        yield equal(f"the fake score's loss at {name}", fit, method.denoising(x, t, eps, cond), 1e-9)
