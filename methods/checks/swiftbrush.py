"""Exact checks of swiftbrush."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import diffuse, expand
from diffdistill.exact.analytic import AffineGenerator, ClassGaussians, class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, two_points
from diffdistill.methods.swiftbrush import Config, SwiftBrush
from diffdistill.players.teacher import only_trains, trainable

# How it is trained in the plane, where its student must reach the limits of exact/plane.py.
PLANE = {"student_lr": 0.0005, "fake_score_lr": 0.002, "lora_rank": 32, "lora_alpha": 32, "beta1": 0.0, "steps": 2000}


def verify() -> Iterator[Check]:
    """Two classes of one variance and a Gaussian for "no class": guided or not, all is affine and by hand."""
    mu = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.1, 0.3]]).double()  # the last row is "no class"
    own = torch.tensor([[0.2, 0.5], [0.3, -0.2], [-0.6, 0.8]]).double()  # the LoRA teacher's
    s, c = torch.tensor([0.5, 1.3]).double(), torch.tensor([0.8, 0.7]).double()
    m, b = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
    z, eps = two_points(2)  # everything here has degree 2
    label = 1
    cond = {"class_labels": torch.full((len(z),), label)}

    def game(config: Config, means: Tensor = own, std: Tensor = c) -> tuple[SwiftBrush, AffineGenerator]:
        teacher, generator = class_gaussians_teacher(mu, s), AffineGenerator(m, b)
        student = Denoiser(generator, teacher.denoiser.schedule, teacher.denoiser.row)
        method = SwiftBrush(teacher, config, student=student, fake_score=ClassGaussians(means, std).denoiser())
        return method, generator

    def student_gradient(method: SwiftBrush, generator: AffineGenerator, t: Tensor) -> Tensor:
        only_trains("student", trainable(method.players))
        x = method.sampler().one_step(z, cond)
        # gradient_injection averages over the two dimensions; the closed form sums over them.
        return gradient(2 * method.matching(x, t, eps, cond).loss, generator.mean, generator.scale)

    for t in (0.2, 0.8, 1.4):
        angle = torch.full((len(z),), t).double()
        cos, sin = torch.cos(angle[0]), torch.sin(angle[0])
        big_v, big_c = cos**2 * s**2 + sin**2, cos**2 * c**2 + sin**2
        for scale in (1.0, 4.5):
            real = mu[2] + scale * (mu[label] - mu[2])
            fake = own[2] + scale * (own[label] - own[2])
            exact = sin**3 * cos * torch.cat([(m - real) / big_v - (m - fake) / big_c, b * (1 / big_v - 1 / big_c)])
            got = student_gradient(*game(Config(guidance_scale=scale)), angle)
            at = f"t = {t}, scale {scale}"
            yield equal(f"the student's gradient, {at}", exact, got, 1e-9)
            yield differs(f"the opposite sign is caught, {at}", exact, -got, 1e-6)
            yield differs(f"the weight sigma instead of sigma^2 is caught, {at}", exact, got / sin, 1e-6)
            zero = student_gradient(*game(Config(guidance_scale=scale), mu, s), angle)
            yield equal(f"zero where the LoRA teacher is the teacher, {at}", 0.0, zero, 1e-12, scale=1.0)
            method, generator = game(Config(guidance_scale=scale))
            x = method.sampler().one_step(z, cond)
            through = _through_both_networks(method, x, angle, eps, cond)
            wrong = gradient(2 * through, generator.mean, generator.scale)
            yield differs(f"a gradient through the two networks is caught, {at}", exact, wrong, 1e-6)
            if scale != 1:
                unguided = sin**3 * cos * (m - own[label]) / big_c
                one_sided = torch.cat([sin**3 * cos * (m - real) / big_v - unguided, exact[2:]])
                yield differs(f"guidance of the teacher alone is caught, {at}", one_sided, got, 1e-6)
                shifted = student_gradient(*game(Config(guidance_scale=1 + scale)), angle)
                yield differs(f"1 + scale in place of the scale is caught, {at}", exact, shifted, 1e-6)

        # The LoRA teacher at the student's own distribution, unguided: DMD's gradient with another weight.
        everywhere = m.expand(3, 2)
        big_u = cos**2 * b**2 + sin**2
        kl = torch.cat([cos**2 * (m - mu[label]) / big_v, cos**2 * b * (1 / big_v - 1 / big_u)])
        got = student_gradient(*game(Config(), everywhere, b), angle)
        yield equal(f"sigma^3/alpha times the gradient of KL(q_t || p_t), t = {t}", sin**3 / cos * kl, got, 1e-9)

        method, generator = game(Config(guidance_scale=4.5))
        only_trains("fake_score", trainable(method.players))
        network = method.fake_score.network
        assert isinstance(network, ClassGaussians)
        loss = method.denoising(generator(z, angle).neg(), angle, eps, cond)
        parts = (sin * cos / big_c) ** 2 * ((m - own[label]) ** 2 + b**2) + (sin**2 / big_c - 1) ** 2
        yield equal(f"the LoRA teacher's loss, t = {t}", cos**2 * parts.mean(), loss, 1e-9)
        slope = torch.zeros_like(own)
        slope[label] = cos**2 * (sin * cos / big_c) ** 2 * (own[label] - m)
        got = gradient(loss, network.means)
        yield equal(f"its gradient, of this class's mean alone, t = {t}", slope.flatten(), got, 1e-9)
        method, generator = game(Config(), everywhere, b)
        only_trains("fake_score", trainable(method.players))
        network = method.fake_score.network
        assert isinstance(network, ClassGaussians)
        generator.requires_grad_()  # it gets no gradient all the same
        loss = method.denoising(generator(z, angle).neg(), angle, eps, cond)
        zero = gradient(loss, network.means, network.std, generator.mean, generator.scale)
        yield equal(f"zero at the student's distribution, t = {t}", 0.0, zero, 1e-9, scale=1.0)

    method, _ = game(Config(label_dropout=0.25))
    labels = method.dropped(cond, torch.arange(16) / 16)["class_labels"]
    yield equal("a quarter of the conditions is dropped", torch.tensor([2] * 4 + [1] * 12), labels, 0.0)
    for step in (0, 1):
        players = [turn.player for turn in method.turns(step)] == ["student", "fake_score"]
        yield equal(f"order of turns at step {step}: the student, then the LoRA teacher", 1.0, float(players), 0.0)


def _through_both_networks(method: SwiftBrush, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
    """The mistake of leaving both networks in the graph: the loss without its stop-gradients."""
    x_t = diffuse(x, t, eps)
    gap = method.teacher(x_t, t, cond).eps - method.guided_fake_score(x_t, t, cond).eps
    return (expand(torch.sin(t) ** 2, gap) * gap * x).mean()
