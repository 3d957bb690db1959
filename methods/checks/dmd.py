"""Exact checks of dmd."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import (
    AffineGenerator,
    ClassGaussians,
    GaussianMixture,
    class_gaussians_teacher,
    gaussian_teacher,
)
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    affine_game,
    differs,
    equal,
    gradient,
    matching_checks,
    mistake,
    two_points,
)
from diffdistill.methods.dmd import DMD, Config
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold.method import Batch, Pair

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
        "regression_weight": 0.25,
        "distance": "l2",
        "normalise": True,
        "steps": 2000,
    },
}


def verify() -> Iterator[Check]:
    """Distribution matching, regression and guidance in closed form; what the pairs are for, by quadrature."""

    def make(parts: AffineGame, normalise: bool) -> DMD:
        return _dmd(parts, Config(normalise=normalise))

    yield from matching_checks(make)
    yield from _regression_checks()
    yield from _guidance_checks()
    yield from _mode_checks()
    method = DMD(gaussian_teacher([0.0], 1.0), Config())
    for step in (0, 1):
        same = [turn.player for turn in method.turns(step)] == ["student", "fake_score"]
        yield equal(f"order of turns at step {step}: the student, then the fake score", 1.0, float(same), 0.0)


def _dmd(parts: AffineGame, config: Config) -> DMD:
    method = DMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)
    only_trains("student", trainable(method.players))
    return method


def _regression_checks() -> Iterator[Check]:
    """A student m + b z on the exact pairs of N(mu, s^2), which are (z, mu + s z)."""
    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
    m, b = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
    z, _ = two_points(2)
    y, error = mu + s * z, (m - mu) + (b - s) * z
    norm = torch.sqrt(error.square().sum(1, keepdim=True) + 0.7**2)
    closed = {
        # The mean over two dimensions halves the 2 of the square's derivative; E z = 0 and E z^2 = 1.
        "l2": (((m - mu) ** 2 + (b - s) ** 2).mean(), torch.cat([m - mu, b - s])),
        "huber": ((norm - 0.7).mean(), torch.cat([(error / norm).mean(0), (z * error / norm).mean(0)])),
    }
    for kind, (value, slope) in closed.items():
        parts = affine_game(mu, s, m, b)
        affine = parts.generator
        method = _dmd(parts, Config(distance=kind, huber_c=0.7))  # type: ignore[arg-type]
        loss = method.regression(method.sampler().one_step(z, {}), y)
        yield equal(f"regression on exact pairs, {kind}", value, loss, 1e-12)
        yield equal(f"its gradient, {kind}", slope, gradient(loss, affine.mean, affine.scale), 1e-12)
        strange = method.regression(method.sampler().one_step(z, {}), y.flip(0))
        wrong = gradient(strange, affine.mean, affine.scale)
        yield differs(f"the noise of another pair is caught, {kind}", slope, wrong, 1e-6)

    batch = Batch(len(z), (2,), {}, None, torch.device("cpu"), (0, 0, 0), Pair(z, y, {}))

    def whole(weight: float, mean: Tensor, scale: Tensor) -> Tensor:
        """The gradient of all that the student's turn minimises, for one batch's noise."""
        parts = affine_game(mu, s, mean, scale)
        method = _dmd(parts, Config(normalise=False, regression_weight=weight))
        return gradient(method.student_turn({}, batch).loss, parts.generator.mean, parts.generator.scale)

    for weight in (0.25, 0.5):
        added = whole(2 * weight, m, b) - whole(weight, m, b)
        yield equal(f"the student's turn adds that, weighted, weight {weight}", weight * closed["l2"][1], added, 1e-9)
    yield equal("both terms are zero at the optimum", 0.0, whole(0.25, mu, s), 1e-9, scale=1.0)
    # The divergence does not know the sign of b.
    yield equal("at the student mu - s z the divergence has no gradient", 0.0, whole(0.0, mu, -s), 1e-9, scale=1.0)
    mirrored = 0.25 * torch.cat([torch.zeros(2).double(), -2 * s])
    yield equal("and the pairs turn it round", mirrored, whole(0.25, mu, -s), 1e-9)


def _guidance_checks() -> Iterator[Check]:
    """Two classes and "no class", Gaussians of one variance: guided, the teacher is N(mu_0 + a (mu_c - mu_0), s^2)."""
    mu = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.1, 0.3]]).double()  # the last row is "no class"
    s, m, b = (torch.tensor(v).double() for v in ([0.5, 1.3], [-0.3, 0.5], [0.9, 0.6]))
    z, eps = two_points(2)
    cond, t = {"class_labels": torch.ones(len(z), dtype=torch.long)}, 0.8
    angle = torch.full((len(z),), t).double()
    cos2, sin2 = torch.cos(angle[0]) ** 2, torch.sin(angle[0]) ** 2
    big_v, big_u = cos2 * s**2 + sin2, cos2 * b**2 + sin2
    for scale in (1.0, 3.0):
        teacher, affine = class_gaussians_teacher(mu, s), AffineGenerator(m, b)
        student = Denoiser(affine, teacher.denoiser.schedule, teacher.denoiser.output)
        # Were it guided, its own "no class" would show.
        fake_score = ClassGaussians(torch.stack([m, m, -m]), b).denoiser()
        config = Config(normalise=False, guidance_scale=scale)
        method = DMD(teacher, config, student=student, fake_score=fake_score)
        only_trains("student", trainable(method.players))
        x = method.sampler().one_step(z, cond)
        got = gradient(2 * method.matching(x, angle, eps, cond).loss, affine.mean, affine.scale)
        real = mu[2] + scale * (mu[1] - mu[2])
        exact = torch.cat([cos2 * (m - real) / big_v, cos2 * b * (1 / big_v - 1 / big_u)])
        yield equal(f"gradient with the teacher guided by {scale:g}", exact, got, 1e-9)
        if scale != 1:
            with mistake(method, "fake_score", guided(fake_score, scale)):
                loss = 2 * method.matching(x, angle, eps, cond).loss
            yield differs("a guided fake score is caught", exact, gradient(loss, affine.mean, affine.scale), 1e-6)
            with mistake(method, "teacher", teacher.denoiser):
                loss = 2 * method.matching(x, angle, eps, cond).loss
            yield differs(
                "a teacher that is not guided is caught", exact, gradient(loss, affine.mean, affine.scale), 1e-6
            )


def _mode_checks() -> Iterator[Check]:
    """Figure 3 of the paper in one dimension: a student m + b z, a teacher with modes at -2 and 2.

    Expectations are sums over nodes. The weight of a mode is the share of the student's samples on its side.
    """
    modes = GaussianMixture([[-2.0], [2.0]], 0.4)
    nodes, weights = _gaussian_nodes(400)
    y = modes.flow_map(nodes[:, None], torch.full_like(nodes, math.pi / 2), torch.zeros_like(nodes))  # exact pairs
    # x_t depends on the first alone of two turned axes of (z, eps), and z is linear in the second.
    first, second = nodes.repeat(2), torch.tensor([-1.0, 1.0]).double().repeat_interleave(len(nodes))

    def slope(m: Tensor, b: Tensor, t: float, weight: float) -> Tensor:
        """(2,) the gradient of the student's loss, the fake score being exact."""
        affine, cos, sin = AffineGenerator(m, b), math.cos(t), math.sin(t)
        student = Denoiser(affine, TrigFlow(), OUTPUTS["v_prediction"])
        score = affine.exact_score()
        parts = AffineGame(Teacher(modes.denoiser(), (1,)), affine, student, score, score.denoiser())
        method = _dmd(parts, Config(normalise=False, regression_weight=weight or 1.0))
        spread = torch.sqrt((cos * b) ** 2 + sin**2)
        z, eps = (cos * b * first - sin * second) / spread, (sin * first + cos * b * second) / spread
        x = _weighted(method.sampler().one_step(z[:, None], {}), weights.repeat(2) / 2)
        loss = method.matching(x, torch.full_like(z, t), eps[:, None], {}).loss
        if weight:
            x_ref = _weighted(method.sampler().one_step(nodes[:, None], {}), weights)
            loss = loss + weight * method.regression(x_ref, y)
        return gradient(loss, affine.mean, affine.scale)

    for t, m, b in ((0.4, 1.2, 0.5), (0.4, -0.3, 1.4), (1.0, 1.2, 0.5)):
        mean, scale = (torch.tensor([v]).double().requires_grad_() for v in (m, b))
        exact, got = gradient(_divergence(mean, scale, t), mean, scale), slope(mean, scale, t, 0.0)
        yield equal(f"gradient of KL(q_t || p_t) to two modes, t = {t}, m = {m}, b = {b}", exact, got, 1e-9)

    def settle(t: float, weight: float) -> Tensor:
        """(2,) m and b where descent from near one mode ends."""
        theta = torch.tensor([1.2, 0.5]).double()
        for _ in range(200):
            theta = theta - 0.3 * slope(theta[:1], theta[1:], t, weight)
        return theta

    for t, weight, other_mode, name in (
        (0.4, 0.0, 0.0, "without pairs, little noise: one mode"),
        (1.0, 0.0, 0.5, "without pairs, much noise: both modes"),
        (0.4, 0.25, 0.5, "with pairs, little noise: both modes"),
    ):
        m, b = settle(t, weight)
        lost = torch.special.ndtr(-m / b)
        yield equal(f"{name}; weight of the other one", other_mode, lost, 1e-3, scale=1.0)


def _gaussian_nodes(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of the trapezoidal rule for N(0, 1), which resolves what Hermite's nodes step over."""
    nodes = torch.linspace(-9, 9, n, dtype=torch.float64)
    weights = torch.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """x (n, d), such that the gradient of a mean over it is that of the sum with weights (n,)."""
    return x.detach() + len(x) * weights[:, None] * (x - x.detach())


def _divergence(m: Tensor, b: Tensor, t: float) -> Tensor:
    """KL(q_t || p_t) of N(m, b^2) to half N(-2, 0.4^2) and half N(2, 0.4^2), from the densities."""
    nodes, weights = _gaussian_nodes(600)
    cos, sin = math.cos(t), math.sin(t)
    spread = torch.sqrt(cos**2 * b**2 + sin**2)
    x, std = cos * m + spread * nodes, math.sqrt(cos**2 * 0.16 + sin**2)
    left, right = (-((x - cos * mean) ** 2) / (2 * std**2) for mean in (-2, 2))
    log_p = torch.logaddexp(left, right) - math.log(2 * std)
    return (weights * (-(nodes**2) / 2 - torch.log(spread) - log_p)).sum()
