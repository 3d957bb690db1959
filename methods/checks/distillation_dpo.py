"""Exact checks of distillation_dpo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods import distillation_dpo
from diffdistill.methods.distillation_dpo import Config, DistillationDPO
from diffdistill.scaffold.method import Batch

# A teacher N(mu, s^2) and a student m + b z on a line. Of two samples with z = 1 or -1 the greater has a mean z of 1/2.
MU, S, M, B = (torch.tensor([value]).double() for value in (0.7, 0.5, -0.3, 0.9))


def verify() -> Iterator[Check]:
    """Each side is matched by its own score; where that leads, and what the authors' weights do."""
    for t in (0.5, 1.1):
        yield from _gradient_checks(t)
        yield from _fixed_point_checks(t)
        yield from _score_checks(t)


class _Signs(Batch):
    """All signs for the noise of both samples and of the matching."""

    def randn(self, purpose: str) -> Tensor:
        """(8, 1)."""
        column = {"a z": 0, "b z": 1}.get(purpose, 2)
        return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)[:, column : column + 1]


BATCH = _Signs(8, (1,), {}, None, torch.device("cpu"), (0, 0, 0))


def _game(
    mean: Tensor, scale: Tensor, t: float, **options: Any
) -> tuple[DistillationDPO, AffineGenerator, dict[str, GaussianMixture]]:
    """The scores are Gaussians of the means of both sides, m + b/2 and m - b/2."""
    teacher, generator = gaussian_teacher(MU.tolist(), S), AffineGenerator(mean, scale)
    schedule, output = teacher.denoiser.schedule, teacher.denoiser.output
    laws = {
        role: GaussianMixture((mean + sign * scale / 2)[None], 0.75**0.5 * scale)
        for role, sign in (("better", 1), ("worse", -1))
    }
    for law in laws.values():
        law.means.requires_grad_()
    players = {role: Denoiser(law, schedule, output) for role, law in laws.items()}
    config = Config(normalise=False, **options)
    method = DistillationDPO(teacher, config, student=Denoiser(generator, schedule, output), **players)
    method.reward = lambda x, batch: x[:, 0].detach()
    angle = torch.full((8,), t, dtype=torch.float64)
    method.times = lambda player, batch, low, high: angle  # type: ignore[method-assign]
    return method, generator, laws


def _slope(mean: Tensor, t: float, **options: Any) -> Tensor:
    """The gradient in the student's mean."""
    method, generator, _ = _game(mean, B, t, **options)
    return gradient(method.student_turn({}, BATCH).loss, generator.mean)


def _sides(mean: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The same of the KL divergence of the better samples, and of the worse: cos^2 (their mean - mu)/V."""
    big_v = math.cos(t) ** 2 * S**2 + math.sin(t) ** 2
    better, worse = (math.cos(t) ** 2 * (mean + sign * B / 2 - MU) / big_v for sign in (1, -1))
    return better, worse


def _gradient_checks(t: float) -> Iterator[Check]:
    better, worse = _sides(M, t)
    for first, second in ((0.25, 0.75), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        got = _slope(M, t, better_weight=first, worse_weight=second)
        yield equal(f"gradient, weights {first} and {second}, t = {t}", first * better + second * worse, got, 1e-9)
    closed = 0.25 * better + 0.75 * worse
    with mistake(DistillationDPO, "scored", lambda self, x, batch: -x[:, 0].detach()):
        yield differs(f"the worse taken for the better is caught, t = {t}", closed, _slope(M, t), 1e-2)
    swapped = _slope(M, t, better_weight=0.75, worse_weight=0.25)
    yield differs(f"the two weights swapped are caught, t = {t}", closed, swapped, 1e-2)
    method, generator, _ = _game(M, B, t)
    method.scores = {"better": method.scores["worse"], "worse": method.scores["better"]}
    yield differs(
        f"each side by the other's score is caught, t = {t}",
        closed,
        gradient(method.student_turn({}, BATCH).loss, generator.mean),
        1e-2,
    )


def _fixed_point_checks(t: float) -> Iterator[Check]:
    """Of shifts: at mu + (w_worse - w_better) b/2, where weights sum to 1."""
    for first, second in ((0.25, 0.75), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        place = MU + (second - first) * B / 2
        at_rest = _slope(place, t, better_weight=first, worse_weight=second)
        yield equal(f"at rest beyond the teacher, weights {first} and {second}, t = {t}", 0.0, at_rest, 1e-9, scale=1.0)
    yield differs(f"and not at the teacher's, t = {t}", 0.0, _slope(MU, t), 1e-2, scale=1.0)
    for name, mean in (("at the teacher's", MU), ("far below", MU - 10), ("far above", MU + 10)):
        pull = _slope(mean, t, better_weight=1.0, worse_weight=-1.0)
        closed = math.cos(t) ** 2 * B / (math.cos(t) ** 2 * S**2 + math.sin(t) ** 2)
        yield equal(
            f"the authors' weights push towards the worse, alike everywhere: {name}, t = {t}", closed, pull, 1e-9
        )


def _score_checks(t: float) -> Iterator[Check]:
    """Each score is at rest on the mean of its own side."""
    for role, other in (("better", "worse"), ("worse", "better")):
        method, _, laws = _game(M, B, t)
        slope = gradient(method.score_turn({}, role, BATCH).loss, laws[role].means)
        yield equal(f"the score of the {role} is at rest on them, t = {t}", 0.0, slope, 1e-9, scale=1.0)
        real = method.pair

        def swapped(batch: Batch, real: Any = real) -> Any:
            pair, *rest = real(batch)
            return ({"better": pair["worse"], "worse": pair["better"]}, *rest)

        with mistake(method, "pair", swapped):
            slope = gradient(method.score_turn({}, role, BATCH).loss, laws[role].means)
        yield differs(f"and not on the {other}, t = {t}", 0.0, slope, 1e-3, scale=1.0)
    with mistake(
        distillation_dpo, "fake_score_loss", lambda score, x, *rest: (score(x, rest[0], {}).x0 - x).square().mean()
    ):
        method, _, laws = _game(M, B, t)
        wrong = gradient(method.score_turn({}, "better", BATCH).loss, laws["better"].means)
    yield differs(f"a score of samples without noise is caught, t = {t}", 0.0, wrong, 1e-3, scale=1.0)
