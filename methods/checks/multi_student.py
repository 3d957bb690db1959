"""Exact checks of multi_student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, mixture_teacher
from diffdistill.exact.checks import AffineGame, Check, differs, equal, gradient, matching_checks, mistake, two_points
from diffdistill.methods.multi_student import Config, MultiStudent
from diffdistill.players.class_experts import of_classes, parts_of_classes
from diffdistill.players.teacher import only_trains, trainable

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "a student for each class": {
        "students": 2,
        "student_lr": 0.001,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "student_level": 1.57,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 1500,
    },
}

MU, S = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
M, B = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
"""Means and deviations of two classes, and of their two students, on a line."""

PARTS = (0, 1, 0)


def verify() -> Iterator[Check]:
    """Matching is DMD's for each student, with its own classes and its own fake score."""

    def make(parts: AffineGame, normalise: bool) -> MultiStudent:
        return MultiStudent(
            parts.teacher, Config(normalise=normalise), student=parts.student, fake_score=parts.fake_score
        )

    yield from matching_checks(make)
    for t in (0.4, 1.1):
        yield from _parted_checks(t)
    for classes, n in ((10, 2), (10, 4), (1000, 7)):
        counts = torch.bincount(torch.tensor(parts_of_classes(classes, n)[:-1]))
        even = float(len(counts) == n and counts.max() - counts.min() <= 1)
        yield equal(f"{classes} classes in {n} parts: as many in each", 1.0, even, 0.0)


class _Game:
    """Both students N(m, b^2) and their exact fake scores; rows are of either class in turn."""

    def __init__(self, m: Tensor, b: Tensor, t: float, normalise: bool = False, scores: Sequence[int] = (0, 1)):
        teacher = mixture_teacher(MU[:, None].tolist(), S, labels=(0, 1))
        view = Denoiser(nn.Identity(), teacher.denoiser.schedule, OUTPUTS["v_prediction"])
        self.generators = [AffineGenerator(m[k : k + 1], b[k : k + 1]) for k in range(2)]
        self.scores = [GaussianMixture([[float(m[j])]], [float(b[j])], labels=[k]) for k, j in enumerate(scores)]
        for score in self.scores:
            score.means.requires_grad_()
            score.stds.requires_grad_()
        student, fake_score = (of_classes(view, networks, PARTS) for networks in (self.generators, self.scores))
        self.method = MultiStudent(teacher, Config(normalise=normalise), student=student, fake_score=fake_score)
        only_trains("student", trainable(self.method.players))
        z, eps = two_points(1)
        self.z, self.eps = (part.repeat_interleave(2, 0) for part in (z, eps))
        self.labels, self.angle = torch.tensor([0, 1] * len(z)), torch.full((2 * len(z),), t).double()

    @property
    def weights(self) -> list[nn.Parameter]:
        return [p for generator in self.generators for p in (generator.mean, generator.scale)]

    def samples(self, labels: Tensor) -> Tensor:
        return self.method.sampler().one_step(self.z, {"class_labels": labels})

    def pull(self) -> Tensor:
        """(4,) the gradient in mean and scale of either student."""
        cond = {"class_labels": self.labels}
        loss = self.method.matching(self.samples(self.labels), self.angle, self.eps, cond).loss
        return gradient(loss, *self.weights)

    def denoising(self, labels: Tensor) -> Tensor:
        return self.method.denoising(self.samples(labels), self.angle, self.eps, {"class_labels": labels})

    def slopes(self, k: int, labels: Tensor) -> Tensor:
        return gradient(self.denoising(labels), self.scores[k].means, self.scores[k].stds)


def _parted_checks(t: float) -> Iterator[Check]:
    game = _Game(M, B, t)
    cos2, sin2 = torch.cos(game.angle[0]) ** 2, torch.sin(game.angle[0]) ** 2
    big_v, big_u = cos2 * S**2 + sin2, cos2 * B**2 + sin2
    pull = torch.stack([cos2 * (M - MU) / big_v, cos2 * B * (1 / big_v - 1 / big_u)], 1)
    closed = pull.flatten() / 2  # half of the rows are of either
    yield equal(f"either student's gradient is that of its own divergence, t = {t}", closed, game.pull(), 1e-6)
    with mistake(game.method.student.network, "parts", (1, 0, 0)):
        yield differs(f"students of the other classes are caught, t = {t}", closed, game.pull(), 1e-3)
    other = _Game(M, B, t, scores=(1, 0))
    yield differs(f"fake scores of the other students are caught, t = {t}", closed, other.pull(), 1e-3)
    yield from _own_samples(game, t)
    at_rest = _Game(MU, S, t, normalise=True).pull()
    yield equal(
        f"each is exact, and at rest: two students hold what they are asked, t = {t}", 0.0, at_rest, 1e-9, scale=1.0
    )
    mean, spread = MU.mean().expand(2), (S.square().mean() + MU.var(unbiased=False)).sqrt().expand(2)
    one = _Game(mean, spread, t)
    x, cond = one.samples(one.labels), {"class_labels": one.labels}
    gap = one.method.matching(x, one.angle, one.eps, cond).shown["gap"]
    yield differs(f"one for both, with the mean and deviation of all, does not, t = {t}", 0.0, gap, 0.1, scale=1.0)


def _own_samples(game: _Game, t: float) -> Iterator[Check]:
    """A fake score learns its own student's samples, and is not moved by the other's."""
    for score in game.scores:
        score.requires_grad_(True)
    for k in range(2):
        yield equal(
            f"fake score {k} is at rest on its student's samples, t = {t}",
            0.0,
            game.slopes(k, game.labels),
            1e-9,
            scale=1.0,
        )
        others = torch.full_like(game.labels, 1 - k)
        yield equal(f"fake score {k} is moved by no others, t = {t}", 0.0, game.slopes(k, others), 0.0, scale=1.0)
        game.scores[k].means.data += 0.3
        moved = game.slopes(k, game.labels)
        yield differs(f"a fake score {k} that is off is caught, t = {t}", 0.0, moved, 1e-3, scale=1.0)
        game.scores[k].means.data -= 0.3
