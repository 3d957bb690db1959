"""Exact checks of decoupled_dmd."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.schedule import EDM, LinearFlow, Schedule
from diffdistill.exact.analytic import AffineGenerator, ClassGaussians, class_gaussians_teacher
from diffdistill.exact.checks import (
    AffineGame,
    Check,
    differs,
    equal,
    gradient,
    matching_checks,
    mistake,
    two_points,
)
from diffdistill.methods import decoupled_dmd
from diffdistill.methods.decoupled_dmd import Config, DecoupledDMD
from diffdistill.players.teacher import only_trains, trainable
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.simulation import drawn_level

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
        "steps": 2000,
    },
}

# A class and "no class", Gaussians of one width, and a student; float64 in two dimensions.
CLASS, NONE, S = (torch.tensor(v, dtype=torch.float64) for v in ([0.7, -0.4], [0.2, 0.3], [0.5, 1.3]))
M, B = (torch.tensor(v, dtype=torch.float64) for v in ([-0.3, 0.5], [0.9, 0.6]))
A = 2.5
COND = {"class_labels": torch.zeros(16, dtype=torch.int64)}


def verify() -> Iterator[Check]:
    """Appendix B's row for it, and the warning that the engine alone has no fixed point."""

    def dmd(parts: AffineGame, normalise: bool) -> DecoupledDMD:
        config = Config(normalise=normalise)
        return DecoupledDMD(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from matching_checks(dmd)
    for t in (0.2, 0.8, 1.4):
        yield from _engine_checks(t)
        yield from _fixed_point_checks(t)
        yield from _guided_checks(t)
    yield from _time_checks()


def _game(m: Tensor, b: Tensor, **options: object) -> tuple[DecoupledDMD, AffineGenerator]:
    teacher = class_gaussians_teacher(torch.stack([CLASS, NONE]), S)
    generator = AffineGenerator(m, b)
    student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.output)
    fake_score = ClassGaussians(torch.stack([m, m]), b).denoiser()  # exact, whatever the condition
    usual: dict[str, object] = {"guidance_scale": A, "normalise": False}
    config = Config(**(usual | options))  # type: ignore[arg-type]
    method = DecoupledDMD(teacher, config, student=student, fake_score=fake_score)
    only_trains("student", trainable(method.players))
    return method, generator


def _angle(t: float) -> Tensor:
    return torch.full((16,), t, dtype=torch.float64)


def _pull(t: float) -> Tensor:
    """cos^2/V, by which a gap of means is multiplied at an angle."""
    return math.cos(t) ** 2 / (math.cos(t) ** 2 * S**2 + math.sin(t) ** 2)


def _slopes(method: DecoupledDMD, generator: AffineGenerator, engine: float, matching: float | None = None) -> Tensor:
    """The gradient in mean and scale of the engine's term at one angle, and of the matching's at another if given.

    Losses are means over the two dimensions, the divergence their sum.
    """
    z, eps = two_points(2)
    x = method.sampler().one_step(z, COND)
    loss = method.engine(x, _angle(engine), eps, COND).loss
    if matching is not None:
        loss = loss + method.matching(x, _angle(matching), eps, COND).loss
    return 2 * gradient(loss, generator.mean, generator.scale)


def _engine_checks(t: float) -> Iterator[Check]:
    """Its pull is the same wherever the samples are, and leaves their width as it is."""
    closed = torch.cat([-(A - 1) * _pull(t) * (CLASS - NONE), torch.zeros(2)])
    for name, m, b in (("here", M, B), ("far away", M + 10, 3 * B), ("at the teacher's", CLASS, S)):
        yield equal(f"the engine's pull, samples {name}, t = {t}", closed, _slopes(*_game(m, b), t), 1e-9)
    away = CLASS - NONE  # far out along the way on which guidance pushes
    alone, held = (_slopes(*_game(CLASS + 10 * away, S), t, other)[:2] for other in (None, t))
    yield differs(f"the engine alone has no fixed point: not ten times as far, t = {t}", 0.0, alone, 1e-2, scale=1.0)
    yield equal(f"... and goes on from there, t = {t}", 1.0, float(alone @ away < 0), 0.0)
    yield equal(f"with the matching it comes back, t = {t}", 1.0, float(held @ away > 0), 0.0)
    method, generator = _game(M, B, guidance_scale=A + 1)
    yield differs(f"a in place of a - 1 is caught, t = {t}", closed, _slopes(method, generator, t), 1e-2)
    method, generator = _game(M, B)
    real = decoupled_dmd.guide_with_conditional
    with mistake(decoupled_dmd, "guide_with_conditional", lambda *a: real(*a)[::-1]):
        yield differs(f"its sign is caught, t = {t}", closed, _slopes(method, generator, t), 1e-2)
    if t < 1:
        with mistake(decoupled_dmd, "guide_with_conditional", lambda d, x, t, c, s: real(d, x, t / 2, c, s)):
            other = _slopes(method, generator, t)
        yield differs(f"another level than the noise's is caught, t = {t}", closed, other, 1e-3)


def _fixed_point_checks(t: float) -> Iterator[Check]:
    """mu_c + (a - 1) (mu_c - mu_none) E_engine[cos^2/V]/E_matching[cos^2/V], of the class's own width."""
    offset = (A - 1) * (CLASS - NONE)
    at_rest = _slopes(*_game(CLASS + offset, S), t, t)
    yield equal(f"at rest at mu_c + (a - 1)(mu_c - mu_none), t = {t}", 0.0, at_rest, 1e-9, scale=1.0)
    once_more = _slopes(*_game(CLASS + A * (CLASS - NONE), S), t, t)
    yield differs(f"not with a for a - 1, t = {t}", 0.0, once_more, 1e-3, scale=1.0)
    for other in (0.5, 1.1):
        ratio = _pull(other) / _pull(t)
        apart = _slopes(*_game(CLASS + ratio * offset, S), other, t)
        yield equal(
            f"... times the ratio of the pulls, engine at {other}, matching at {t}", 0.0, apart, 1e-9, scale=1.0
        )
        if abs(other - t) > 0.1:
            swapped = _slopes(*_game(CLASS + ratio * offset, S), t, other)
            yield differs(f"the two noises swapped are caught, {other} and {t}", 0.0, swapped, 1e-3, scale=1.0)


class _Points(Batch):
    """All signs for z, and for eps whatever its name."""

    def randn(self, purpose: str) -> Tensor:
        """(16, 2)."""
        return two_points(2)[0 if purpose == "z" else 1]


def _guided_checks(t: float) -> Iterator[Check]:
    """With one noise for both the student follows the KL divergence to the guided teacher, as guided DMD does."""
    big_v, big_u = (math.cos(t) ** 2 * w**2 + math.sin(t) ** 2 for w in (S, B))
    mu = CLASS + (A - 1) * (CLASS - NONE)
    kl = math.cos(t) ** 2 * torch.cat([(M - mu) / big_v, B * (1 / big_v - 1 / big_u)])
    batch = _Points(16, (2,), COND, None, torch.device("cpu"), (0, 0, 0))
    for times, same in (("matching", True), ("all", False)):
        method, generator = _game(M, B, augmentation_times=times)
        with (
            mistake(method, "times", lambda player, batch: _angle(t)),
            mistake(method, "engine_times", lambda batch: _angle(t + 0.1)),
        ):
            got = 2 * gradient(method.student_loss(batch)[1].loss, generator.mean, generator.scale)
        check, name = (equal, "one noise for both is guided DMD") if same else (differs, "... and other noise is not")
        yield check(f"{name}, t = {t}", kl, got, 1e-9 if same else 1e-3)


def _batch(step: int) -> Batch:
    return Batch(4000, (2,), {}, None, torch.device("cpu"), (0, step, 0))


def _time_checks() -> Iterator[Check]:
    """The engine's noise lies below the student's, evenly in the teacher's own time before its shift."""
    schedules: tuple[tuple[str, Schedule], ...] = (("a flow, shift 3", LinearFlow(3.0)), ("EDM", EDM()))
    for name, schedule in schedules:
        four, one = {"student_steps": 4}, {"student_level": 0.4}
        for kind, options in (("below", four), ("all", four), ("below", one)):
            method, _ = _game(M, B, augmentation_times=kind, **options)
            method.schedule = method.student.schedule = schedule
            for k in range(method.steps):
                batch = next(b for b in map(_batch, range(99)) if k == (drawn_level(4, b) if method.steps > 1 else 0))
                t = method.engine_times(batch)
                read = schedule.angle(method.sampler().levels[k])
                below = float(schedule.fraction(read)) if kind == "below" else 1.0
                fractions = schedule.fraction(t)
                got = torch.stack([fractions.min(), fractions.mean(), fractions.max()])
                closed = below * torch.tensor([0.02, 0.5, 0.98]).double()
                where = f"{name}, {kind}, from {float(read):.2f}"
                yield equal(f"least, mean and greatest of the engine's times, {where}", closed, got, 0.02)
                if kind == "below":
                    yield equal(f"... are below the student's, {where}", 1.0, float((t < read).all()), 0.0)
