"""Exact checks of swiftbrush."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.exact.analytic import AffineGenerator, ClassGaussians, class_gaussians_teacher
from diffdistill.exact.checks import (
    Check,
    at_half_the_angle,
    differs,
    equal,
    gradient,
    mistake,
    two_points,
    without_stop_gradients,
)
from diffdistill.methods import swiftbrush
from diffdistill.methods.swiftbrush import Config, SwiftBrush
from diffdistill.players.teacher import only_trains, trainable

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.0005,
        "fake_score_lr": 0.002,
        "beta1": 0.0,
        "update_ratio": 1,
        "guidance_scale": 1.5,
        "lora": "fake_score",
        "lora_rank": 32,
        "lora_alpha": 32,
        "lora_targets": "all",
        "student_level": 1.57,
        "label_dropout": 0.1,
        "time_low": 0.02,
        "time_high": 0.98,
        "steps": 2000,
    },
}


# Two classes, and "no class" in the last row: the teacher's, the LoRA teacher's own, and the student's.
MU, S = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.1, 0.3]]).double(), torch.tensor([0.5, 1.3]).double()
OWN, C = torch.tensor([[0.2, 0.5], [0.3, -0.2], [-0.6, 0.8]]).double(), torch.tensor([0.8, 0.7]).double()
M, B = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
LABEL = 1


class _At:
    """The batch of all checks, at one angle."""

    def __init__(self, t: float):
        self.z, self.eps = two_points(2)  # everything here has degree 2
        self.angle = torch.full((len(self.z),), t).double()
        self.cond: Cond = {"class_labels": torch.full((len(self.z),), LABEL)}
        self.cos, self.sin = torch.cos(self.angle[0]), torch.sin(self.angle[0])
        self.big_v = self.cos**2 * S**2 + self.sin**2  # the variance of the teacher's x_t
        self.big_c = self.cos**2 * C**2 + self.sin**2  # of the LoRA teacher's


def verify() -> Iterator[Check]:
    """Two classes of one variance and a Gaussian for "no class": guided or not, all is affine and by hand."""
    for t in (0.2, 0.8, 1.4):
        for scale in (1.0, 4.5):
            yield from _student_checks(_At(t), scale, f"t = {t}, scale {scale}")
        yield from _lora_teacher_checks(_At(t), t)
    method, _ = _game(Config(label_dropout=0.25))
    cond = {"class_labels": torch.full((16,), LABEL)}
    labels = method.dropped(cond, torch.arange(16) / 16)["class_labels"]
    yield equal("a quarter of the conditions is dropped", torch.tensor([2] * 4 + [1] * 12), labels, 0.0)
    for step in (0, 1):
        players = [turn.player for turn in method.turns(step)] == ["student", "fake_score"]
        yield equal(f"order of turns at step {step}: the student, then the LoRA teacher", 1.0, float(players), 0.0)


def _game(config: Config, means: Tensor = OWN, std: Tensor = C) -> tuple[SwiftBrush, AffineGenerator]:
    teacher, generator = class_gaussians_teacher(MU, S), AffineGenerator(M, B)
    student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.output)
    method = SwiftBrush(teacher, config, student=student, fake_score=ClassGaussians(means, std).denoiser())
    return method, generator


def _student_gradient(method: SwiftBrush, generator: AffineGenerator, at: _At) -> Tensor:
    only_trains("student", trainable(method.players))
    x = method.sampler().one_step(at.z, at.cond)
    # gradient_injection averages over the two dimensions; the closed form sums over them.
    return gradient(2 * method.matching(x, at.angle, at.eps, at.cond).loss, generator.mean, generator.scale)


def _student_checks(at: _At, scale: float, name: str) -> Iterator[Check]:
    cos, sin, big_v, big_c = at.cos, at.sin, at.big_v, at.big_c
    real = MU[2] + scale * (MU[LABEL] - MU[2])
    fake = OWN[2] + scale * (OWN[LABEL] - OWN[2])
    exact = sin**3 * cos * torch.cat([(M - real) / big_v - (M - fake) / big_c, B * (1 / big_v - 1 / big_c)])
    method, generator = _game(Config(guidance_scale=scale))
    teacher, fake_score = method.teacher, method.guided_fake_score
    yield equal(f"the student's gradient, {name}", exact, _student_gradient(method, generator, at), 1e-9)
    with mistake(method, "teacher", fake_score), mistake(method, "guided_fake_score", teacher):
        swapped = _student_gradient(method, generator, at)
    yield differs(f"the two scores swapped are caught, {name}", exact, swapped, 1e-6)
    with mistake(method, "guided_fake_score", at_half_the_angle(fake_score)):
        elsewhere = _student_gradient(method, generator, at)
    yield differs(f"the LoRA teacher asked at another level is caught, {name}", exact, elsewhere, 1e-6)
    zero = _student_gradient(*_game(Config(guidance_scale=scale), MU, S), at)
    yield equal(f"zero where the LoRA teacher is the teacher, {name}", 0.0, zero, 1e-12, scale=1.0)
    with without_stop_gradients(swiftbrush):
        wrong = _student_gradient(method, generator, at)
    yield differs(f"a gradient through the two networks is caught, {name}", exact, wrong, 1e-6)
    if scale != 1:
        with mistake(method, "guided_fake_score", method.fake_score):
            one_sided = _student_gradient(method, generator, at)
        yield differs(f"guidance of the teacher alone is caught, {name}", exact, one_sided, 1e-6)
        shifted = _student_gradient(*_game(Config(guidance_scale=1 + scale)), at)
        yield differs(f"1 + scale in place of the scale is caught, {name}", exact, shifted, 1e-6)


def _lora_teacher_checks(at: _At, t: float) -> Iterator[Check]:
    """At the student's own distribution, unguided, the student's gradient is DMD's with another weight."""
    cos, sin = at.cos, at.sin
    everywhere = M.expand(3, 2)
    big_u = cos**2 * B**2 + sin**2
    kl = torch.cat([cos**2 * (M - MU[LABEL]) / at.big_v, cos**2 * B * (1 / at.big_v - 1 / big_u)])
    got = _student_gradient(*_game(Config(), everywhere, B), at)
    yield equal(f"sigma^3/alpha times the gradient of KL(q_t || p_t), t = {t}", sin**3 / cos * kl, got, 1e-9)

    loss, network, _ = _denoising(Config(guidance_scale=4.5), OWN, C, at)
    parts = (sin * cos / at.big_c) ** 2 * ((M - OWN[LABEL]) ** 2 + B**2) + (sin**2 / at.big_c - 1) ** 2
    yield equal(f"the LoRA teacher's loss, t = {t}", cos**2 * parts.mean(), loss, 1e-9)
    slope = torch.zeros_like(OWN)
    slope[LABEL] = cos**2 * (sin * cos / at.big_c) ** 2 * (OWN[LABEL] - M)
    got = gradient(loss, network.means)
    yield equal(f"its gradient, of this class's mean alone, t = {t}", slope.flatten(), got, 1e-9)
    loss, network, generator = _denoising(Config(), everywhere, B, at)
    zero = gradient(loss, network.means, network.std, generator.mean, generator.scale)
    yield equal(f"zero at the student's distribution, t = {t}", 0.0, zero, 1e-9, scale=1.0)


def _denoising(config: Config, means: Tensor, std: Tensor, at: _At) -> tuple[Tensor, ClassGaussians, AffineGenerator]:
    """The LoRA teacher's loss, its network, and the student, which gets no gradient though it could."""
    method, generator = _game(config, means, std)
    only_trains("fake_score", trainable(method.players))
    network = method.fake_score.network
    assert isinstance(network, ClassGaussians)
    generator.requires_grad_()
    loss = method.denoising(generator(at.z, at.angle).neg(), at.angle, at.eps, at.cond)
    return loss, network, generator
