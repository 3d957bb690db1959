"""Exact checks of a method: what is expected, what was got, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import diffuse, expand
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher, only_trains, trainable
from diffdistill.scaffold.method import Outcome


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


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """The gradients of a scalar with respect to all parameters, flattened into one vector."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) with sum_i w_i f(z_i) = E f(z), z ~ N(0, 1); exact to degree 2n - 1."""
    import numpy

    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(n))
    return nodes, weights / weights.sum()


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
    student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.row)
    score = generator.exact_score()
    score.means.requires_grad_()
    score.stds.requires_grad_()
    return AffineGame(teacher, generator, student, score, score.denoiser())


def two_points(d: int) -> tuple[Tensor, Tensor]:
    """z and eps (4^d, d), all signs: their mean is exact for polynomials of degree 3 in each coordinate."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * (2 * d))
    return signs[:, :d], signs[:, d:]


class Matching(Protocol):
    """What `matching_checks` asks of a method that matches distributions."""

    teacher: nn.Module
    fake_score: Denoiser
    players: dict[str, nn.Module]

    def sampler(self) -> Sampler:
        """How the student draws."""

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """The student's loss for samples x (B, ...) noised with eps (B, ...) to the angles t (B,)."""

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """The fake score's loss on the same, a scalar."""


def matching_checks(make: Callable[[AffineGame, bool], Matching]) -> Iterator[Check]:
    """Distribution matching of an affine student with a Gaussian, where all is known in closed form.

    `make` gives the method of a game, with DMD's normaliser or without.
    """
    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
    m, b = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()

    def game(mean: Tensor, scale: Tensor, normalise: bool = False) -> tuple[Matching, AffineGame]:
        parts = affine_game(mu, s, mean, scale)
        method = make(parts, normalise)
        only_trains("student", trainable(method.players))
        return method, parts

    z, eps = two_points(2)  # everything here has degree 2
    for t in (0.2, 0.8, 1.4):
        angle = torch.full((len(z),), t).double()
        cos2, sin2 = torch.cos(angle[0]) ** 2, torch.sin(angle[0]) ** 2
        big_v, big_u = cos2 * s**2 + sin2, cos2 * b**2 + sin2
        kl = torch.cat([cos2 * (m - mu) / big_v, cos2 * b * (1 / big_v - 1 / big_u)])
        method, parts = game(m, b)
        x = method.sampler().one_step(z, {})
        # gradient_injection averages over the two dimensions; the divergence sums over them.
        loss = 2 * method.matching(x, angle, eps, {}).loss
        affine, score = parts.generator, parts.score
        got = gradient(loss, affine.mean, affine.scale)
        yield equal(f"gradient of KL(q_t || p_t) in mean and scale, t = {t}", kl, got, 1e-6)
        yield differs(f"the opposite sign is caught, t = {t}", kl, -got, 1e-6)
        through = _through_both_networks(method, x, angle, eps)
        yield differs(
            f"a gradient through the two networks is caught, t = {t}",
            kl,
            gradient(through, affine.mean, affine.scale),
            1e-6,
        )

        rate = torch.sqrt(cos2 * sin2) * (1 - b**2) / big_u
        off = rate * cos2.sqrt() + sin2.sqrt()
        expected = ((b * off) ** 2 + (rate * sin2.sqrt() - cos2.sqrt()) ** 2).mean()
        denoising = method.denoising(x, angle, eps, {})
        yield equal(f"the fake score's loss at its optimum, t = {t}", expected, denoising, 1e-9)
        slope = gradient(denoising, score.means, score.stds)
        yield equal(f"its gradient there is zero, t = {t}", 0.0, slope, 1e-9, scale=1.0)

        for normalise in (False, True):
            settled, at_optimum = game(mu, s, normalise)
            x = settled.sampler().one_step(z, {})
            matching = settled.matching(x, angle, eps, {}).loss
            zero = gradient(matching, at_optimum.generator.mean, at_optimum.generator.scale)
            label = "with" if normalise else "without"
            yield equal(f"zero at the optimum, {label} the normaliser, t = {t}", 0.0, zero, 1e-9, scale=1.0)
        method, parts = game(m, b, True)
        x = method.sampler().one_step(z, {})
        got = gradient(method.matching(x, angle, eps, {}).loss, parts.generator.mean, parts.generator.scale)
        cos, x = cos2.sqrt(), x.detach()
        x_t = cos * x + sin2.sqrt() * eps
        teacher, fake = mu + cos * s**2 * (x_t - cos * mu) / big_v, m + cos * b**2 * (x_t - cos * m) / big_u
        pull = (fake - teacher) / (x - teacher).abs().mean(1, keepdim=True)
        closed = torch.cat([pull.mean(0), (pull * z).mean(0)]) / 2  # the mean over two dimensions
        yield equal(f"gradient with the normaliser, t = {t}", closed, got, 1e-9)


def _through_both_networks(method: Matching, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The mistake of leaving both networks in the graph: 2 x the same loss without its stop-gradients."""
    x_t = diffuse(x, t, eps)
    gap = method.fake_score(x_t, t, {}).x0 - method.teacher(x_t, t, {}).x0
    return (expand(torch.tan(t) ** -2, gap) * gap * x).sum(1).mean()


def run_checks(checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """All rows, computed in double precision with a fixed seed."""
    torch.manual_seed(0)
    return list(checks())
