"""Exact checks of sims."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.sims import SIMS, Config
from diffdistill.scaffold.method import Batch, Pair

# A teacher and an auxiliary model, Gaussians of two dimensions; the auxiliary is broader in the first.
MEAN, S = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
OTHER, B = torch.tensor([0.2, 0.1]).double(), torch.tensor([0.8, 0.9]).double()
OMEGA = 0.6


def verify() -> Iterator[Check]:
    """The extrapolated score of Gaussians, what the auxiliary learns, and the student's optimum."""
    for t in (0.4, 1.2):
        yield from _score_checks(t)
        yield from _player_checks(t)
    steps = [_method(1.0, auxiliary_steps=2).turns(step)[0].player for step in range(4)]
    yield equal("first the auxiliary, then the student", 1.0, float(steps == ["auxiliary"] * 2 + ["student"] * 2), 0.0)


def _method(t: float, mean: Tensor = OTHER, std: Tensor = B, omega: float = OMEGA, auxiliary_steps: int = 1) -> SIMS:
    teacher = gaussian_teacher(MEAN.tolist(), S)
    law = GaussianMixture(mean[None], std)
    law.means.requires_grad_()
    law.stds.requires_grad_()
    schedule, output = teacher.denoiser.schedule, teacher.denoiser.output
    student = Denoiser(AffinePerAngle(torch.tensor([t]).double(), 2), schedule, OUTPUTS["v_prediction"])
    config = Config(extrapolation=omega, auxiliary_steps=auxiliary_steps)
    return SIMS(teacher, config, student=student, auxiliary=Denoiser(law, schedule, output))


def _variance(t: float, std: Tensor) -> Tensor:
    return math.cos(t) ** 2 * std**2 + math.sin(t) ** 2


def _score_checks(t: float) -> Iterator[Check]:
    """(1 + w) s - w s_auxiliary has the precision (1 + w)/V - w/U and is linear in x_t."""
    x, _ = two_points(2)
    at = torch.full((len(x),), t, dtype=torch.float64)
    big_v, big_u = _variance(t, S), _variance(t, B)

    def score(method: SIMS) -> Tensor:
        v = method.extrapolated(x, at, {})[0]  # v, from which eps = sin(t) x_t + cos(t) v
        return -(math.sin(t) * x + math.cos(t) * v) / math.sin(t)

    precision = (1 + OMEGA) / big_v - OMEGA / big_u
    pull = math.cos(t) * ((1 + OMEGA) * MEAN / big_v - OMEGA * OTHER / big_u)
    closed = pull - precision * x
    yield equal(f"the extrapolated score, t = {t}", closed, score(_method(t)), 1e-9)
    yield differs(f"the opposite direction is caught, t = {t}", closed, score(_method(t, omega=-OMEGA)), 1e-2)
    yield differs(
        f"omega in the place of 1 + omega is caught, t = {t}", closed, score(_method(t, omega=OMEGA - 1)), 1e-2
    )
    own = math.cos(t) * MEAN / big_v - x / big_v
    yield equal(f"the teacher's where omega is 0, t = {t}", own, score(_method(t, omega=0.0)), 1e-9)
    yield equal(
        f"the teacher's where the auxiliary has learned nothing, t = {t}", own, score(_method(t, MEAN, S)), 1e-9
    )
    sharper = float(precision[0] > 1 / big_v[0]) + float(precision[1] < 1 / big_v[1])
    yield equal(f"sharper where the auxiliary is broader, and broader where it is not, t = {t}", 2.0, sharper, 0.0)


class _Signs(Batch):
    """eps as all signs."""

    def randn(self, purpose: str) -> Tensor:
        """(16, 2)."""
        return two_points(2)[1]


def _player_checks(t: float) -> Iterator[Check]:
    """The auxiliary is at rest on samples of its own law; the student where its velocity is the extrapolated one."""
    z, _ = two_points(2)
    at = torch.full((16,), t, dtype=torch.float64)
    for mean, std, holds in ((OTHER, B, True), (MEAN, S, False)):
        pair = Pair(z, mean + std * z, {})
        batch = _Signs(16, (2,), {}, None, torch.device("cpu"), (0, 0, 0), pair)
        method = _method(t)
        law = method.auxiliary.network
        assert isinstance(law, GaussianMixture)
        with mistake(Batch, "draw", lambda self, purpose, of: at):
            slope = gradient(method.learn(batch).loss, law.means, law.stds)
        check, name = (equal, "at rest on samples of its own law") if holds else (differs, "and not on others")
        yield check(f"the auxiliary is {name}, t = {t}", 0.0, slope, 1e-9 if holds else 1e-3, scale=1.0)
    method = _method(t)
    zero, one = (method.extrapolated(torch.full((1, 2), value).double(), at[:1], {})[0][0] for value in (0.0, 1.0))
    network = method.student.network
    assert isinstance(network, AffinePerAngle)
    network.slope.data[:], network.offset.data[:] = (one - zero)[None], zero[None]
    batch = _Signs(16, (2,), {}, None, torch.device("cpu"), (0, 0, 0), Pair(z, MEAN + S * z, {}))
    with mistake(Batch, "draw", lambda self, purpose, of: at):
        outcome = method.imitate(batch)
        network.offset.data[:] += 0.1
        off = method.imitate(batch).loss
    yield equal(
        f"the student's loss is zero at the extrapolated velocity, t = {t}", 0.0, outcome.loss, 1e-18, scale=1.0
    )
    yield equal(f"and the square of an error beside it, t = {t}", 0.01, off, 1e-9)
