"""Exact checks of f_distill."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.exact.checks import (
    AffineGame,
    Check,
    differs,
    equal,
    gauss_hermite,
    gradient,
    matching_checks,
    mistake,
)
from diffdistill.exact.ratios import DIVERGENCES, EXACT, MU, B, KnownRatio, M, S, derivatives, known_ratio_game
from diffdistill.methods.f_distill import Config, FDistill
from diffdistill.scaffold import matching, ratio

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "Jensen-Shannon": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "student_level": 1.57,
        "gan_weight": 0.1,
        "discriminator_weight": 0.1,
        "divergence": "jensen_shannon",
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2000,
        "batch_size": 128,
    },
}


def _game(parts: AffineGame | None = None, **options: object) -> tuple[FDistill, AffineGame]:
    method, parts = known_ratio_game(lambda *a, **k: FDistill(a[0], Config(**options), **k), parts)  # type: ignore[arg-type]
    assert isinstance(method, FDistill)
    return method, parts


def verify() -> Iterator[Check]:
    """Appendix B's row for f-distill, and those of distribution matching for the divergence that is DMD's."""

    def dmd(parts: AffineGame, normalise: bool) -> FDistill:
        return _game(parts, normalise=normalise, divergence="reverse_kl", **EXACT)[0]

    yield from matching_checks(dmd)
    for name in DIVERGENCES:
        yield from _weight_checks(name)
        for t in (0.5, 1.1):
            yield from _divergence_checks(name, t)
    yield from _mean_checks()


def _weight_checks(name: str) -> Iterator[Check]:
    r = torch.logspace(-1, 1, 9, dtype=torch.float64)
    h, _ = derivatives(DIVERGENCES[name], r)
    yield equal(f"h(r) = r^2 f''(r), {name}", h, ratio.WEIGHTS[name](r), 1e-9)


def _divergence_checks(name: str, t: float) -> Iterator[Check]:
    """The gradient of D_f(p_t || q_t) in the student's mean and scale, by quadrature over z and eps."""
    nodes, weights = gauss_hermite(60)
    z, eps = (part.flatten()[:, None] for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    joint = torch.outer(weights, weights).flatten()
    cos, sin = math.cos(t), math.sin(t)
    angle = torch.full((len(z),), t, dtype=torch.float64)

    def divergence(m: Tensor, b: Tensor) -> Tensor:
        spread = torch.sqrt(cos**2 * b**2 + sin**2)
        x_t = (cos * m + spread * nodes[:, None])[:, 0]
        v = torch.sqrt(cos**2 * S**2 + sin**2)
        log_p = -(((x_t - cos * MU) / v) ** 2) / 2 - v.log()
        log_q = -(((x_t - cos * m) / spread) ** 2) / 2 - spread.log()
        return (weights * DIVERGENCES[name](torch.exp(log_p - log_q))).sum()

    theta = M.clone().requires_grad_(), B.clone().requires_grad_()
    closed = gradient(divergence(*theta), *theta)

    def got(**options: object) -> Tensor:
        method, parts = _game(divergence=name, normalise=False, **(EXACT | options))
        real = matching.gradient_injection

        def weighted(x: Tensor, grad: Tensor) -> Tensor:  # the mean over samples is one over the nodes
            return real(x, joint[:, None] * len(x) * grad)

        with mistake(matching, "gradient_injection", weighted):
            x = method.sampler().one_step(z, {})
            loss = method.matching(x, angle, eps, {}).loss
        return gradient(loss, parts.generator.mean, parts.generator.scale)

    yield equal(f"gradient of D_f(p_t || q_t), {name}, t = {t}", closed, got(), 1e-6)
    if name == "reverse_kl":
        return
    with mistake(ratio, "WEIGHTS", dict.fromkeys(DIVERGENCES, torch.ones_like)):
        yield differs(f"no weight is caught, {name}, t = {t}", closed, got(), 1e-2)
    with mistake(KnownRatio, "logits", lambda self, x, t, eps, cond: -_LOGITS(self, x, t, eps, cond)):
        yield differs(f"q/p for p/q is caught, {name}, t = {t}", closed, got(), 1e-2)
    with mistake(KnownRatio, "logits", lambda self, x, t, eps, cond: _LOGITS(self, x, t * 0, 0 * eps, cond)):
        yield differs(f"the ratio of the images as they are is caught, {name}, t = {t}", closed, got(), 1e-3)
    yield differs(f"a ratio of at most 1 is caught, {name}, t = {t}", closed, got(ratio_high=1.0), 1e-2)


_LOGITS = KnownRatio.logits


def _mean_checks() -> Iterator[Check]:
    """Ratios that are wrong by a factor of their own at each noise, and the means that take it out."""
    t = torch.tensor([0.1, 0.2, 1.0, 1.1, 1.2, 1.5]).double()  # three of four parts have any
    true = torch.tensor([0.5, 1.5, 0.4, 1.6, 1.2, 0.8]).double()  # of mean 1 in each of them
    wrong = (true * torch.tensor([3.0, 3.0, 0.4, 0.4, 2.0, 2.0])).log()

    def module(**options: object) -> ratio.RatioWeight:
        usual = {"ratio_bins": 4, "ratio_ema": 0.0, "ratio_low": 0.01, "ratio_high": 100.0}
        return ratio.RatioWeight(Config(**(usual | options))).double()  # type: ignore[arg-type]

    def after(logits: Tensor, **options: object) -> Tensor:
        """The weights after two steps, each in two passes."""
        weight = module(**options)
        for _ in range(2):
            for part in (slice(0, 3), slice(3, 6)):
                weight(logits[..., part], t[part])
            weight.update()
        return weight(logits, t)

    h = true / (1 + true)
    start = module()(torch.stack([wrong + 0.3, wrong - 0.3]), t)
    yield equal(
        "at first a ratio of 1 has the weight 1; heads count as their mean", 2 * torch.sigmoid(wrong), start, 1e-9
    )
    yield equal("then a factor at each noise is taken out of the ratio", h / h.mean(), after(wrong), 1e-6)
    yield differs("one mean for all noise is caught", h / h.mean(), after(wrong, ratio_bins=1), 1e-2)
    kept = module(ratio_ema=0.75)
    kept(wrong, t)
    kept.update()
    moved = torch.tensor([1.5, 1.0, 0.85, 1.25])
    yield equal("the means are moving averages, of the parts that were seen", moved, kept.ratio, 1e-6)
    kept.update()
    yield equal("a step without the student leaves them", moved, kept.ratio, 1e-6)
    ends = module(divergence="forward_kl", ratio_bins=0, ratio_low=0.1, ratio_high=20.0)
    yield equal(
        "ratios are kept in their range", torch.tensor([0.1, 20.0]), ends(wrong.new_tensor([-50, 50]), t[:2]), 1e-6
    )
