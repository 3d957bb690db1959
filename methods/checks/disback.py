"""Exact checks of disback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import AffineGenerator, LearnedGaussian, gaussian_teacher
from diffdistill.exact.checks import AffineGame, Check, differs, equal, gradient, matching_checks, mistake, two_points
from diffdistill.methods import disback
from diffdistill.methods.disback import Config, DisBack
from diffdistill.scaffold.method import Batch

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
        "path_length": 4,
        "record_every": 50,
        "track_every": 200,
        "steps": 2200,
    },
}

# The teacher, two copies on the way, and the student; (mean, deviation) in two dimensions.
TEACHER, FIRST, SECOND, STUDENT = (
    (torch.tensor(mean).double(), torch.tensor(std).double())
    for mean, std in (
        ([0.7, -0.4], [0.5, 1.3]),
        ([0.4, -0.1], [0.6, 1.1]),
        ([0.0, 0.2], [0.8, 0.8]),
        ([-0.3, 0.5], [0.9, 0.6]),
    )
)


def verify() -> Iterator[Check]:
    """Section 3.11's sanity items: without a path it is the host's; with one, whom the student follows and when."""

    def host(parts: AffineGame, normalise: bool) -> DisBack:
        config = Config(path_length=0, normalise=normalise)
        return DisBack(parts.teacher, config, student=parts.student, fake_score=parts.fake_score)

    yield from matching_checks(host)
    yield from _target_checks()
    yield from _record_checks()


def _game(**options: Any) -> tuple[DisBack, AffineGenerator]:
    """A student and its fake score, which are those of STUDENT."""
    teacher = gaussian_teacher(TEACHER[0].tolist(), TEACHER[1])
    generator = AffineGenerator(*STUDENT)
    fake_score = Denoiser(LearnedGaussian(2).double(), teacher.denoiser.schedule, OUTPUTS["v_prediction"])
    _set(fake_score, STUDENT)
    student = Denoiser(generator, teacher.denoiser.schedule, OUTPUTS["v_prediction"])
    usual = {"path_length": 2, "record_every": 3, "track_every": 2, "update_ratio": 1, "normalise": False}
    return DisBack(teacher, Config(**(usual | options)), student=student, fake_score=fake_score), generator


def _set(denoiser: Any, to: tuple[Tensor, Tensor]) -> None:
    denoiser.network.mean.data[:], denoiser.network.log_std.data[:] = to[0], to[1].log()


class _Signs(Batch):
    def randn(self, purpose: str) -> Tensor:
        """(16, 2) all signs, of z and of whatever else."""
        return two_points(2)[0 if purpose == "z" else 1]


def _batch(step: int) -> Batch:
    return _Signs(16, (2,), {}, None, torch.device("cpu"), (0, step, 0))


def _kl(to: tuple[Tensor, Tensor], t: float) -> Tensor:
    """The gradient of KL(q_t || p_t) in the student's mean and scale, p that Gaussian."""
    cos2, sin2 = torch.cos(torch.tensor(t).double()) ** 2, torch.sin(torch.tensor(t).double()) ** 2
    (mu, s), (m, b) = to, STUDENT
    v, u = cos2 * s**2 + sin2, cos2 * b**2 + sin2
    return torch.cat([cos2 * (m - mu) / v, cos2 * b * (1 / v - 1 / u)])


def _target_checks(t: float = 0.8) -> Iterator[Check]:
    """Three steps each for two copies; then the first of them is followed for two steps, and then the teacher."""
    method, generator = _game()
    for each, to in zip(method.path, (FIRST, SECOND), strict=True):
        _set(each, to)
    angle = torch.full((16,), t, dtype=torch.float64)

    def got(step: int) -> Tensor:
        with mistake(method, "times", lambda player, batch: angle):
            return 2 * gradient(method.turns(step)[0].loss(_batch(step)).loss, generator.mean, generator.scale)

    for step, to, name in (
        (6, FIRST, "first copy"),
        (7, FIRST, "first copy"),
        (8, TEACHER, "teacher"),
        (50, TEACHER, "teacher"),
    ):
        yield equal(f"the student follows the {name} at step {step}", _kl(to, t), got(step), 1e-6)
    with mistake(method, "targets", method.targets[::-1]):
        yield differs("the path in the other order is caught", _kl(FIRST, t), got(6), 1e-2)
        yield differs("... and that the teacher is not the last", _kl(TEACHER, t), got(50), 1e-2)
    players = [[turn.player for turn in method.turns(step)] for step in range(8)]
    order = [["fake_score"]] * 6 + [["student", "fake_score"]] * 2
    yield equal("the student rests while the path is recorded", 1.0, float(players == order), 0.0)
    yield equal("the training steps without which the teacher is never seen", 9, method.shortest or 0, 0.0)
    one, none = _game(path_length=1)[0], _game(path_length=0)[0]
    yield equal(
        "... with one copy, and with none",
        torch.tensor([4, 1]),
        torch.tensor([one.shortest or 0, none.shortest or 0]),
        0.0,
    )


def _record_checks() -> Iterator[Check]:
    """The copies are the fake score as it was; it learns the samples of a student that rests."""
    method, generator = _game()
    _set(method.fake_score, TEACHER)
    optimizer = torch.optim.Adam(method.fake_score.parameters(), 0.05)
    kept, before = [], torch.cat([generator.mean, generator.scale]).detach().clone()
    for step in range(8):
        for turn in method.turns(step):
            if turn.player == "fake_score":
                optimizer.zero_grad()
                turn.loss(_batch(step)).loss.backward()
                optimizer.step()
        if step in (2, 5):
            kept.append(torch.cat([p.detach().clone().flatten() for p in method.fake_score.parameters()]))
        method.after_step(step)
    for k, (each, expected) in enumerate(zip(method.path, kept, strict=True)):
        got = torch.cat([p.detach().flatten() for p in each.parameters()])
        yield equal(f"copy {k + 1} is the fake score after {3 * (k + 1)} steps", expected, got, 0.0)
    yield differs("the copies are not one", kept[0], kept[1], 1e-3)
    distance = [float((next(iter(each.parameters())).detach() - STUDENT[0]).norm()) for each in method.path]
    yield equal("they come nearer to the student's samples", 1.0, float(distance[1] < distance[0]), 0.0)
    now = torch.cat([generator.mean, generator.scale])
    yield equal("the student has not moved", before, now, 0.0)
    trained = any(p.requires_grad for p in method.path.parameters())
    yield equal("the copies are not trained", 0.0, float(trained), 0.0)
    assert disback.METHOD is DisBack
