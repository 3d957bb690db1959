"""Exact checks of a method: what is expected, what was got, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.ode import Denoise
from diffdistill.core.prediction import Prediction
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold import matching
from diffdistill.scaffold.matching import MatchingMethod


@dataclass(frozen=True)
class Check:
    """One row of `diffdistill verify`.

    kind 'equal' holds when the error is at most the tolerance; 'differs', a negative test, when the error is
    greater: a known mistake must be caught.
    """

    name: str
    expected: float
    got: float
    error: float
    tolerance: float
    kind: Literal["equal", "differs"] = "equal"

    @property
    def ok(self) -> bool:
        """Whether the row holds."""
        return self.error <= self.tolerance if self.kind == "equal" else self.error > self.tolerance


def equal(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The relative error |got - expected| / max(|expected|, scale) in the l2 norm is within the tolerance.

    `scale` is what the quantity is measured against where the expected value is zero.
    """
    return _check(name, expected, got, tolerance, scale, "equal")


def differs(name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, *, scale: float = 0.0) -> Check:
    """The same comparison must fail: `got` comes from a known mistake."""
    return _check(name, expected, got, tolerance, scale, "differs")


def _check(
    name: str, expected: Tensor | float, got: Tensor | float, tolerance: float, scale: float,
    kind: Literal["equal", "differs"],
) -> Check:  # fmt: skip
    want, have = (torch.as_tensor(v, dtype=torch.float64).detach().flatten() for v in (expected, got))
    size = max(float(want.norm()), scale) or 1.0
    error = float((have - want).norm()) / size
    return Check(name, float(want.norm()), float(have.norm()), error, tolerance, kind)


@contextmanager
def mistake(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block an attribute of a module, class or object is another: a method's own code with that mistake."""
    own, kept = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept) if own else delattr(owner, name)


@contextmanager
def without_stop_gradients(module: Any) -> Iterator[None]:
    """The mistake of leaving both networks in the graph, in the code of a module that calls `gradient_injection`."""

    def not_detached(x: Tensor, grad: Tensor) -> Tensor:
        return (grad * x).mean()

    with mistake(torch, "no_grad", nullcontext), mistake(module, "gradient_injection", not_detached):
        yield


def at_half_the_angle(denoise: Denoise) -> Denoise:
    """The mistake of asking a network at another angle than that to which its input was noised."""

    def asked(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        # Its x0 is taken for that at t, as an "x0" network's would be.
        x0 = denoise(x_t, t / 2, cond).x0
        return Prediction(x_t, t, x0, torch.ones_like(t), torch.zeros_like(t))

    return asked


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """The gradients of a scalar with respect to all parameters, flattened into one vector."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) with sum_i w_i f(z_i) = E f(z), z ~ N(0, 1); exact to degree 2n - 1."""
    import numpy

    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(n))
    return nodes, weights / weights.sum()


class AnyField(nn.Module):
    """A smooth network of two dimensions and the time, with weights of its own."""

    def __init__(self, time_scale: float = 1.0):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        self.time_scale = time_scale

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2) for x_t (B, 2) and the times t (B,)."""
        time = t.to(x_t)[:, None] / self.time_scale
        return self.layers(torch.cat([x_t, torch.sin(time), torch.cos(2 * time)], 1))


@dataclass(frozen=True)
class AffineGame:
    """A teacher N(mu, s^2), an affine student N(m, b^2) of it, and the student's exact fake score, per dimension.

    The score's own means and stds require gradients, so that its training can be checked too.
    """

    teacher: Teacher
    generator: AffineGenerator
    student: Denoiser
    score: GaussianMixture
    fake_score: Denoiser


def affine_game(mu: Tensor, s: Tensor, m: Tensor, b: Tensor) -> AffineGame:
    """All four are (d,) float64."""
    teacher = gaussian_teacher(mu.tolist(), s)
    generator = AffineGenerator(m, b)
    student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.output)
    score = generator.exact_score()
    score.means.requires_grad_()
    score.stds.requires_grad_()
    return AffineGame(teacher, generator, student, score, score.denoiser())


def two_points(d: int) -> tuple[Tensor, Tensor]:
    """z and eps (4^d, d), all signs: their mean is exact for polynomials of degree 3 in each coordinate."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * (2 * d))
    return signs[:, :d], signs[:, d:]


class _Moments:
    """A teacher N(mu, s^2) and a student N(m, b^2) in two dimensions, seen at the angle t."""

    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
    m, b = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()

    def __init__(self, t: float):
        self.t = t
        self.z, self.eps = two_points(2)  # everything here has degree 2
        self.angle = torch.full((len(self.z),), t).double()
        self.cos2, self.sin2 = torch.cos(self.angle[0]) ** 2, torch.sin(self.angle[0]) ** 2
        self.big_v = self.cos2 * self.s**2 + self.sin2  # the variance of the teacher's x_t
        self.big_u = self.cos2 * self.b**2 + self.sin2  # the variance of the student's


MakeMethod = Callable[[AffineGame, bool], MatchingMethod]
"""The method of a game, with DMD's normaliser or without."""


def matching_checks(make: MakeMethod) -> Iterator[Check]:
    """Distribution matching of an affine student with a Gaussian, where all is known in closed form."""
    for t in (0.2, 0.8, 1.4):
        at = _Moments(t)
        yield from _divergence_checks(make, at)
        yield from _denoising_checks(make, at)
        yield from _optimum_checks(make, at)
        yield _normaliser_check(make, at)


def _game(make: MakeMethod, mean: Tensor, scale: Tensor, normalise: bool = False) -> tuple[MatchingMethod, AffineGame]:
    parts = affine_game(_Moments.mu, _Moments.s, mean, scale)
    method = make(parts, normalise)
    only_trains("student", trainable(method.players))
    return method, parts


def _divergence_checks(make: MakeMethod, at: _Moments) -> Iterator[Check]:
    pull = at.cos2 * (at.m - at.mu) / at.big_v
    kl = torch.cat([pull, at.cos2 * at.b * (1 / at.big_v - 1 / at.big_u)])
    method, parts = _game(make, at.m, at.b)
    x = method.sampler().one_step(at.z, {})
    affine = parts.generator
    # gradient_injection averages over the two dimensions; the divergence sums over them.
    got = gradient(2 * method.matching(x, at.angle, at.eps, {}).loss, affine.mean, affine.scale)
    yield equal(f"gradient of KL(q_t || p_t) in mean and scale, t = {at.t}", kl, got, 1e-6)

    def mistaken() -> Tensor:
        return gradient(2 * method.matching(x, at.angle, at.eps, {}).loss, affine.mean, affine.scale)

    teacher, fake_score = method.teacher, method.fake_score
    with mistake(method, "teacher", fake_score), mistake(method, "fake_score", teacher):
        yield differs(f"the two scores swapped are caught, t = {at.t}", kl, mistaken(), 1e-6)
    with without_stop_gradients(matching):
        yield differs(f"a gradient through the two networks is caught, t = {at.t}", kl, mistaken(), 1e-6)
    for name, network in (("teacher", teacher), ("fake_score", fake_score)):
        with mistake(method, name, at_half_the_angle(network)):
            yield differs(f"the {name} asked at another level is caught, t = {at.t}", kl, mistaken(), 1e-6)


def _denoising_checks(make: MakeMethod, at: _Moments) -> Iterator[Check]:
    """The fake score is exact, and so at the optimum of its own loss."""
    method, parts = _game(make, at.m, at.b)
    rate = torch.sqrt(at.cos2 * at.sin2) * (1 - at.b**2) / at.big_u
    off = rate * at.cos2.sqrt() + at.sin2.sqrt()
    expected = ((at.b * off) ** 2 + (rate * at.sin2.sqrt() - at.cos2.sqrt()) ** 2).mean()
    denoising = method.denoising(method.sampler().one_step(at.z, {}), at.angle, at.eps, {})
    yield equal(f"the fake score's loss at its optimum, t = {at.t}", expected, denoising, 1e-9)
    slope = gradient(denoising, parts.score.means, parts.score.stds)
    yield equal(f"its gradient there is zero, t = {at.t}", 0.0, slope, 1e-9, scale=1.0)


def _optimum_checks(make: MakeMethod, at: _Moments) -> Iterator[Check]:
    for normalise in (False, True):
        method, parts = _game(make, at.mu, at.s, normalise)
        loss = method.matching(method.sampler().one_step(at.z, {}), at.angle, at.eps, {}).loss
        zero = gradient(loss, parts.generator.mean, parts.generator.scale)
        label = "with" if normalise else "without"
        yield equal(f"zero at the optimum, {label} the normaliser, t = {at.t}", 0.0, zero, 1e-9, scale=1.0)


def _normaliser_check(make: MakeMethod, at: _Moments) -> Check:
    method, parts = _game(make, at.m, at.b, True)
    x = method.sampler().one_step(at.z, {})
    loss = method.matching(x, at.angle, at.eps, {}).loss
    got = gradient(loss, parts.generator.mean, parts.generator.scale)
    cos, x = at.cos2.sqrt(), x.detach()
    x_t = cos * x + at.sin2.sqrt() * at.eps
    teacher = at.mu + cos * at.s**2 * (x_t - cos * at.mu) / at.big_v
    fake = at.m + cos * at.b**2 * (x_t - cos * at.m) / at.big_u
    pull = (fake - teacher) / (x - teacher).abs().mean(1, keepdim=True)
    closed = torch.cat([pull.mean(0), (pull * at.z).mean(0)]) / 2  # the mean over two dimensions
    return equal(f"gradient with the normaliser, t = {at.t}", closed, got, 1e-9)


def run_checks(checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """All rows, computed in double precision with a fixed seed."""
    torch.manual_seed(0)
    return list(checks())
