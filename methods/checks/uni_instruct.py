"""Exact checks of uni_instruct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy
import torch
from torch import Tensor

from diffdistill.core.schedule import EDM
from diffdistill.exact.analytic import AffineGenerator
from diffdistill.exact.checks import Check, affine_game, differs, equal, gauss_hermite, gradient, mistake
from diffdistill.exact.ratios import DIVERGENCES, EXACT, MU, B, M, S, derivatives, known_ratio_game
from diffdistill.methods import uni_instruct
from diffdistill.methods.uni_instruct import Config, UniInstruct
from diffdistill.scaffold import ratio
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "forward KL": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "gan_weight": 0.01,
        "discriminator_weight": 0.1,
        "divergence": "forward_kl",
        "time_low": 0.2,
        "time_high": 0.8,
        "student_level": 1.373,
        "steps": 2000,
        "batch_size": 128,
    },
}


def _game(m: Tensor, b: Tensor, **options: object) -> tuple[UniInstruct, AffineGenerator]:
    config = Config(**(EXACT | {"normalise": False} | options))
    method, parts = known_ratio_game(lambda *a, **k: UniInstruct(a[0], config, **k), affine_game(MU, S, m, b))
    assert isinstance(method, UniInstruct)
    return method, parts.generator


def verify() -> Iterator[Check]:
    """Section 3.10's sanity item: at each noise, and integrated over it."""
    for name in DIVERGENCES:
        yield from _weight_checks(name)
        for t in (0.5, 1.1):
            yield from _noise_checks(name, t)
        yield from _integral_checks(name)
        for t in (0.2, 0.8, 1.4):
            method, generator = _game(MU, S, divergence=name)
            at_rest = _slope(method, generator, t)
            yield equal(f"zero at the optimum, {name}, t = {t}", 0.0, at_rest, 1e-9, scale=1.0)
    yield from _game_checks()


def _weight_checks(name: str) -> Iterator[Check]:
    r = torch.logspace(-1, 1, 9, dtype=torch.float64)
    _, path = derivatives(DIVERGENCES[name], r)
    yield equal(f"h(r) - r h'(r), {name}", path, ratio.PATHS[name](r), 1e-9, scale=1.0)


def _weighted_gap(name: str, t: float, m: Tensor, b: Tensor) -> Tensor:
    """E_q[h(r) (D_p - D_q)^2] at the angle t in closed form but for one quadrature; (m, b) may require gradients."""
    nodes, weights = gauss_hermite(60)
    cos, sin = math.cos(t), math.sin(t)
    v, u = torch.sqrt(cos**2 * S**2 + sin**2), torch.sqrt(cos**2 * b**2 + sin**2)
    x_t = cos * m + u * nodes
    p, q = (x_t - cos * MU) / v, (x_t - cos * m) / u
    r = torch.exp((q**2 - p**2) / 2 + u.log() - v.log())
    gap = sin**2 / cos * (q / u - p / v)
    return (weights * ratio.WEIGHTS[name](r) * gap**2).sum()


def _slope(method: UniInstruct, generator: AffineGenerator, t: float, n: int = 60) -> Tensor:
    """The gradient of the method's loss in mean and scale, by quadrature over z and eps."""
    nodes, weights = gauss_hermite(n)
    z, eps = (part.flatten()[:, None] for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    joint = torch.outer(weights, weights).flatten()
    real = uni_instruct.uni_loss
    with mistake(uni_instruct, "uni_loss", lambda *a: len(z) * joint * real(*a)):
        x = method.sampler().one_step(z, {})
        loss = method.matching(x, torch.full((len(z),), t).double(), eps, {}).loss
    return gradient(loss, generator.mean, generator.scale)


def _noise_checks(name: str, t: float) -> Iterator[Check]:
    theta = M.clone().requires_grad_(), B.clone().requires_grad_()
    closed = gradient(_weighted_gap(name, t, *theta), *theta)

    def got() -> Tensor:
        return _slope(*_game(M, B, divergence=name), t)

    yield equal(f"gradient of E_q[h(r) |Delta|^2], {name}, t = {t}", closed, got(), 1e-6)
    real, exp = uni_instruct.uni_loss, torch.exp
    if name not in ("reverse_kl", "squared_hellinger"):
        with mistake(torch, "exp", lambda value: exp(value.detach() if value.ndim == 1 else value)):
            yield differs(f"a ratio that stays is caught, {name}, t = {t}", closed, got(), 1e-4)
    with mistake(uni_instruct, "uni_loss", lambda x, p, q, h, path: real(x, p.detach(), q.detach(), h, path)):
        yield differs(f"networks that are detached are caught, {name}, t = {t}", closed, got(), 1e-2)
    if name != "reverse_kl":
        with mistake(uni_instruct, "uni_loss", lambda x, p, q, h, path: real(x, p, q, h, h)):
            yield differs(f"h in both terms is caught, {name}, t = {t}", closed, got(), 1e-6)


def _integral_checks(name: str) -> Iterator[Check]:
    """Over all noise, with the weight sigma^-2 of d ln sigma, it is the gradient of D_f of the clean distributions."""
    theta = M.clone().requires_grad_(), B.clone().requires_grad_()
    nodes, weights = gauss_hermite(80)
    m, b = theta
    x = m + b * nodes
    p, q = (x - MU) / S, (x - m) / b
    closed = gradient((weights * DIVERGENCES[name](torch.exp((q**2 - p**2) / 2 + b.log() - S.log()))).sum(), *theta)
    points, steps = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(40))
    low, high = -7.0, 6.0
    total = torch.zeros(2, dtype=torch.float64)
    for point, step in zip(points.tolist(), steps.tolist(), strict=True):
        log_sigma = (high + low) / 2 + (high - low) / 2 * point
        slope = _slope(*_game(M, B, divergence=name), math.atan(math.exp(log_sigma)), 24)
        total += step * (high - low) / 2 * math.exp(-2 * log_sigma) * slope
    yield equal(f"integrated over noise, gradient of D_f(p || q), {name}", closed, total, 1e-3)


def _game_checks() -> Iterator[Check]:
    method, _ = _game(M, B)
    batch = Batch(1, (1,), {}, None, torch.device("cpu"), (0, 0, 0))
    method.schedule = EDM()
    for fraction, sigma in ((0.0, 0.002), (0.8, 24.40834178658), (1.0, 80.0)):
        # A range without width, which a Config refuses: every level that is drawn is its end.
        method.config = SimpleNamespace(time_low=fraction, time_high=fraction)
        drawn = torch.tan(method.times("student", batch))
        yield equal(f"sigma at {fraction} of the grid", 2 * sigma, drawn, 1e-9)
