"""Exact checks of score_forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import ClassGaussians, class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.score_forgetting import Config, ScoreForgetting
from diffdistill.scaffold.method import Batch

# Three classes and "no class", Gaussians of one width. Class 1 is forgotten, class 2 stands in.
MEANS = torch.tensor([[0.7, -0.4], [-0.6, 0.2], [0.1, 0.9], [0.0, 0.0]], dtype=torch.float64)
OWN = torch.tensor([[0.3, 0.1], [-0.2, 0.5], [0.4, 0.6], [0.0, 0.0]], dtype=torch.float64)
S = torch.tensor([0.5, 1.3], dtype=torch.float64)
LABELS = torch.arange(3).repeat_interleave(16)
WEIGHT = 0.1  # of what is forgotten; two classes are kept for one


class Shifted(nn.Module):
    """x0 = mean of the label + s z, of z at pure noise."""

    def __init__(self, means: Tensor):
        super().__init__()
        self.means = nn.Parameter(means.clone())

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, d)."""
        return self.means[class_labels] + S * x_t


class _Signs(Batch):
    """All signs for z and eps, for each class."""

    def randn(self, purpose: str) -> Tensor:
        """(48, 2)."""
        return two_points(2)[0 if purpose.endswith("/z") else 1].repeat(3, 1)


BATCH = _Signs(48, (2,), {"class_labels": LABELS}, None, torch.device("cpu"), (0, 0, 0))


def verify() -> Iterator[Check]:
    """Each class is pulled to the teacher's, and what is forgotten to that of its stand-in."""
    for t in (0.4, 1.2):
        yield from _gradient_checks(t)
        yield from _fixed_point_checks(t)
    yield from _label_checks()


def _slopes(means: Tensor, t: float, fake: Tensor | None = None, **options: Any) -> Tensor:
    """(4, 2) the gradient in the student's means, with its exact fake score or another."""
    teacher, network = class_gaussians_teacher(MEANS, S), Shifted(means)
    student = Denoiser(network, teacher.denoiser.schedule, OUTPUTS["sample"])
    score = ClassGaussians(means if fake is None else fake, S).denoiser()
    usual: dict[str, Any] = {"forget": (1,), "stand_in": 2, "forget_weight": WEIGHT, "normalise": False}
    config = Config(**usual | options)
    method = ScoreForgetting(teacher, config, student=student, fake_score=score)
    angle = torch.full((48,), t, dtype=torch.float64)
    method.times = lambda player, batch: angle  # type: ignore[method-assign]
    score.requires_grad_(False)
    return gradient(method.student_turn({}, BATCH).loss, network.means).view(4, 2)


def _closed(means: Tensor, targets: Tensor, t: float) -> Tensor:
    """-(sin^2/V)^2 (target - mean) of each class, the mean over three classes and two dimensions."""
    big_v = math.cos(t) ** 2 * S**2 + math.sin(t) ** 2
    weights = torch.tensor([1.0, WEIGHT * 2, 1.0, 0.0]).double()[:, None]
    return -weights * (math.sin(t) ** 2 / big_v) ** 2 * (targets - means) / 6


TARGETS = MEANS[[0, 2, 2, 3]]


def _gradient_checks(t: float) -> Iterator[Check]:
    closed, got = _closed(OWN, TARGETS, t), _slopes(OWN, t)
    yield equal(f"gradient of SiD with a class that stands in, t = {t}", closed, got, 1e-9)
    yield differs(f"a class that is learned is caught, t = {t}", closed, _slopes(OWN, t, forget=(0,), stand_in=1), 1e-2)
    yield differs(f"its own weight is caught, t = {t}", closed, _slopes(OWN, t, forget_weight=1.0), 1e-2)
    with mistake(ScoreForgetting, "asked", lambda self, batch: (batch.cond["class_labels"], torch.ones(48))):
        yield differs(f"nothing forgotten is caught, t = {t}", closed, _slopes(OWN, t), 1e-2)
    real = ScoreForgetting.matched
    with mistake(
        ScoreForgetting, "matched", lambda self, x, t, eps, theirs, cond: real(self, x, t, eps, theirs, theirs)
    ):
        yield differs(f"a fake score that is asked for the stand-in is caught, t = {t}", closed, _slopes(OWN, t), 1e-2)


def _fixed_point_checks(t: float) -> Iterator[Check]:
    at_rest = _slopes(TARGETS, t)
    yield equal(
        f"at rest where the stand-in is made, and all others are as they were, t = {t}", 0.0, at_rest, 1e-9, scale=1
    )
    yield differs(f"and not where the class is remembered, t = {t}", 0.0, _slopes(MEANS, t), 1e-3, scale=1.0)


def _label_checks() -> Iterator[Check]:
    """Any kept class stands in, each as often."""
    teacher = class_gaussians_teacher(MEANS, S)
    method = ScoreForgetting(teacher, Config(forget=(1,)), student=teacher.denoiser, fake_score=teacher.denoiser)
    labels = torch.arange(3).repeat(4000)
    batch = Batch(12000, (2,), {"class_labels": labels}, None, torch.device("cpu"), (0, 0, 0))
    asked, _ = method.asked(batch)
    shares = torch.stack([(asked[labels == 1] == label).double().mean() for label in range(3)])
    yield equal("kept classes stand in alike", torch.tensor([0.5, 0.0, 0.5]), shares, 0.05)
    same = float((asked[labels != 1] == labels[labels != 1]).all())
    yield equal("those that are kept stay", 1.0, same, 0.0)
