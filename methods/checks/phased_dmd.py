"""Exact checks of phased_dmd."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import EDM, LinearFlow, Schedule
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import AffineGame, Check, differs, equal, gradient, matching_checks, mistake, two_points
from diffdistill.methods import phased_dmd
from diffdistill.methods.phased_dmd import Config, PhasedDMD, SubInterval
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "two phases": {
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "student_steps": 2,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 3000,
    },
}

# A teacher N(mu, s^2), and samples at the end of a phase, N(m, b^2): float64 in two dimensions.
MU, S, M, B = (torch.tensor(v).double() for v in ([0.7, -0.4], [0.5, 1.3], [-0.3, 0.5], [0.9, 0.6]))
PHASES = ((0.0, 0.8), (0.3, 0.7), (0.6, 1.4), (1.1, 1.5))
"""Where a phase ends, and an angle above."""


def verify() -> Iterator[Check]:
    """Where the phase ends at clean data it is DMD2; above, the same in sub-intervals."""

    def whole(parts: AffineGame, normalise: bool) -> PhasedDMD:
        config = Config(normalise=normalise, student_steps=1, fake_scores="shared")
        return PhasedDMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from matching_checks(whole)
    for s, t in PHASES:
        yield from _target_checks(s, t)
        yield from _divergence_checks(s, t)
    yield from _time_checks()
    yield from _end_checks()


def _law_at(s: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation (2,) of clean data whose marginal at s is N(m, b^2), of which b^2 exceeds the noise."""
    return M / math.cos(s), torch.sqrt(_width(s) ** 2 - math.sin(s) ** 2) / math.cos(s)


def _width(s: float) -> Tensor:
    """(2,) a deviation of x_s, above that of its noise."""
    return torch.sqrt(math.cos(s) ** 2 * B**2 + math.sin(s) ** 2)


def _points(s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor, SubInterval]:
    """z, x_s, eps and the angles of all signs, and the way from s to t."""
    z, eps = two_points(2)
    x_s = M + _width(s) * z
    at = torch.full((len(z),), t, dtype=torch.float64)
    return z, x_s, eps, at, SubInterval(torch.tensor(s, dtype=torch.float64), at, x_s)


def _game(s: float, t: float, normalise: bool = False) -> tuple[PhasedDMD, GaussianMixture]:
    """The fake score is exact: that of clean data whose marginal at s the samples have."""
    teacher = gaussian_teacher(MU.tolist(), S)
    mean, std = _law_at(s)
    law = GaussianMixture(mean[None], std)
    law.means.requires_grad_()
    law.stds.requires_grad_()
    student = Denoiser(AffineGenerator(M, B), teacher.denoiser.schedule, teacher.denoiser.output)
    fake_score = Denoiser(law, teacher.denoiser.schedule, teacher.denoiser.output)
    config = Config(normalise=normalise, student_steps=1, fake_scores="shared")
    method = PhasedDMD(teacher, config, student=student, fake_score=fake_score)
    method.end = torch.tensor(s, dtype=torch.float64)
    return method, law


def _target_checks(s: float, t: float) -> Iterator[Check]:
    """The fake score's loss is at rest at the score of x_s, diffused; the naive target's is not."""
    _, x_s, eps, at, part = _points(s, t)
    for kind in ("v", "epsilon"):
        method, law = _game(s, t)
        object.__setattr__(method.config, "fake_score_loss", kind)
        slope = gradient(method.denoising(x_s, at, eps, {}), law.means, law.stds)
        yield equal(f"the exact score is at rest, {kind}, from {s} to {t}", 0.0, slope, 1e-9, scale=1.0)
    if s == 0:
        return

    def naive(self: SubInterval, predicted: object, x: Tensor, noise: Tensor) -> Tensor:
        return predicted.v - (self.cos_t * noise - self.sin_t * x)  # type: ignore[attr-defined]

    method, law = _game(s, t)
    with mistake(SubInterval, "error", naive):
        slope = gradient(method.denoising(x_s, at, eps, {}), law.means, law.stds)
    yield differs(f"eps and x_s as noise and data are caught, from {s} to {t}", 0.0, slope, 1e-2, scale=1.0)
    method.end = torch.zeros((), dtype=torch.float64)
    slope = gradient(method.denoising(x_s, at, eps, {}), law.means, law.stds)
    yield differs(f"samples taken for clean data are caught, from {s} to {t}", 0.0, slope, 1e-2, scale=1.0)
    moments = part.diffuse(x_s, eps)
    closed = torch.cat([math.cos(t) * _law_at(s)[0], math.cos(t) ** 2 * _law_at(s)[1] ** 2 + math.sin(t) ** 2])
    got = torch.cat([moments.mean(0), moments.var(0, unbiased=False)])
    yield equal(f"mean and variance of x_t, from {s} to {t}", closed, got, 1e-9)


def _divergence_checks(s: float, t: float) -> Iterator[Check]:
    """The gradient of KL(q_t || p_t) in mean and deviation of x_s."""
    z, _, eps, at, part = _points(s, t)
    kept, width = math.cos(t) / math.cos(s), _width(s)
    big_v = math.cos(t) ** 2 * S**2 + math.sin(t) ** 2
    big_u = kept**2 * width**2 + 1 - kept**2
    closed = torch.cat([kept * (kept * M - math.cos(t) * MU) / big_v, kept**2 * width * (1 / big_v - 1 / big_u)])

    def got(normalise: bool = False, end: float | None = None) -> Tensor:
        mean, std = M.clone().requires_grad_(), width.clone().requires_grad_()
        method, _ = _game(s, t, normalise)
        method.end = torch.tensor(s if end is None else end, dtype=torch.float64)
        only_trains("student", trainable(method.players))
        return gradient(2 * method.matching(mean + std * z, at, eps, {}).loss, mean, std)

    yield equal(f"gradient of KL(q_t || p_t) in mean and width of x_s, from {s} to {t}", closed, got(), 1e-9)
    with mistake(phased_dmd, "injected", lambda x, grad, *rest: (-grad * x).mean()):
        yield differs(f"its sign is caught, from {s} to {t}", closed, got(), 1e-2)
    if s:
        yield differs(f"samples taken for clean data are caught, from {s} to {t}", closed, got(end=0.0), 1e-2)
    x_s = M + width * z
    x_t = part.diffuse(x_s, eps)
    teacher, fake = (_game(s, t)[0].teacher, _game(s, t)[0].fake_score)
    score = [-(net(x_t, at, {}).eps / math.sin(t)) for net in (fake, teacher)]
    backs = [(x_t + (1 - kept**2) * each) / kept for each in score]
    pull = (backs[0] - backs[1]) / (x_s - backs[1]).abs().mean(1, keepdim=True)
    normalised = torch.cat([pull.mean(0), (pull * z).mean(0)])
    yield equal(f"gradient with the normaliser, from {s} to {t}", normalised, got(normalise=True), 1e-9)


def _batch(step: int) -> Batch:
    return Batch(4000, (2,), {}, None, torch.device("cpu"), (0, step, 0))


def _phased(schedule: Schedule) -> PhasedDMD:
    teacher = gaussian_teacher([0.0, 0.0], 1.0)
    teacher.denoiser.schedule = schedule
    return PhasedDMD(teacher, Config(student_steps=3, update_ratio=2))


def _time_checks() -> Iterator[Check]:
    """Both players' times lie above the phase's end, evenly in the teacher's own."""
    schedules: tuple[tuple[str, Schedule], ...] = (("a flow, shift 3", LinearFlow(3.0)), ("EDM", EDM()))
    for name, schedule in schedules:
        method = _phased(schedule)
        for k in range(3):
            levels = method.sampler().levels
            end = float(schedule.fraction(schedule.angle(levels[k + 1]))) if k < 2 else 0.0
            for player, low, high in (("student", 0.02, 0.98), ("fake_score", 0.0, 1.0)):
                fractions = schedule.fraction(method.times(player, _batch(2 * k)))
                got = torch.stack([fractions.min(), fractions.mean(), fractions.max()])
                closed = end + (1 - end) * torch.tensor([low, (low + high) / 2, high]).double()
                yield equal(f"least, mean and greatest time of the {player}, phase {k}, {name}", closed, got, 0.02)


def _end_checks() -> Iterator[Check]:
    """The first phase's samples are those of a step to the next level, and the last one's are clean."""
    method = _phased(LinearFlow(3.0))
    for k in range(3):
        batch = _batch(2 * k)
        with torch.no_grad():
            x_t, t = method.simulated(k, batch)
            predicted = method.student(x_t, t, {})
            s = method.schedule.angle(method.sampler().levels[k + 1]) if k < 2 else torch.zeros(()).double()
            closed = torch.cos(s) * predicted.x0 + torch.sin(s) * predicted.eps
            yield equal(f"samples of phase {k} are at its end", closed, method.generate(batch, "student"), 1e-6)
            if k < 2:
                yield differs(f"clean ones are caught, phase {k}", closed, predicted.x0, 1e-2)
