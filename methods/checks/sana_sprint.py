"""Exact checks of sana_sprint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import (
    ClassGaussians,
    FlowToData,
    GaussianMixture,
    class_gaussians_teacher,
    gaussian_teacher,
)
from diffdistill.exact.checks import AnyField, Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods import sana_sprint
from diffdistill.methods.sana_sprint import Config, SanaSprint
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import adversary
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.tangent import Point

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py. Without
# guidance: the images that count as real are not guided.
PLANE = {
    "one step": {
        "student_lr": 0.001,
        "discriminator_lr": 0.003,
        "beta1": 0.0,
        "guidance_min": 1.0,
        "guidance_max": 1.0,
        "tangent_warmup": 300,
        "time_mean": -0.5,
        "time_std": 1.8,
        "norm": "rms",
        "norm_c": 0.1,
        "max_grad_norm": 1.0,
        "depths": "0.5, 0.7",
        "gan_loss": "hinge",
        "gan_weight": 0.01,
        "gan_time_mean": -0.6,
        "gan_time_std": 1.0,
        "noisiest_share": 0.5,
        "steps": 1500,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
SLOPE = torch.tensor([0.4, -1.1]).double()
REAL: dict[str, Any] = {"derivative": SanaSprint.derivative}


SOME = Batch(1, (2,), {}, None, torch.device("cpu"), (0, 0, 0))


def verify() -> Iterator[Check]:
    """Section 2.3's sanity items, and the mistakes that they must catch."""
    yield from _tangent()
    yield from _start_of_warmup()
    yield from _guided()
    yield from _both_terms()
    yield from _samples()


class _Linear(LatentAdversary):
    """The method's own adversary with the discriminator d(x_t) = a x_t."""

    def __init__(self, teacher: Teacher, options: Any):
        self.teacher, self.options, self.heads = teacher.denoiser, options, nn.ModuleList()
        self.samples = {}

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Tensor:
        return (diffuse(x, t, eps) @ SLOPE)[None]


def _method(network: nn.Module, teacher: Teacher | None = None, **options: Any) -> SanaSprint:
    student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
    own = {"norm": "none", "derivative": "exact", "tangent_warmup": 0}
    with mistake(sana_sprint, "LatentAdversary", _Linear):
        config = Config(**{**own, **options})
        return SanaSprint(teacher or gaussian_teacher(MEAN.tolist(), STD), config, student=student)


def _point(method: SanaSprint, t: float) -> Point:
    """Where the teacher's trajectories pass at that angle."""
    x0, eps = two_points(2)
    angle = torch.full((len(eps),), t, dtype=torch.float64)
    x_t = diffuse(MEAN + STD * x0, angle, eps)
    return Point(x_t, angle, method.guidance.teacher(x_t, angle, {}).v, torch.zeros_like(angle), {})


def _g(method: SanaSprint, at: Point, r: float = 1.0) -> Tensor:
    return method.tangent(method.velocity(at).detach(), at, r)


@torch.no_grad()
def _along(method: SanaSprint, at: Point, h: float) -> Tensor:
    t = at.t + h
    return method.student(GaussianMixture(MEAN[None], STD[None]).flow_map(at.x_t, at.t, t), t, {}).x0


def _tangent() -> Iterator[Check]:
    for t in (0.3, 1.1):
        method, h = _method(AnyField()), 1e-4
        at = _point(method, t)
        slope = math.cos(t) * (_along(method, at, h) - _along(method, at, -h)) / (2 * h)
        yield equal(f"g is cos(t) df/dt along the trajectory, t = {t}", slope, _g(method, at), 1e-6)
        yield differs(f"... and not at half the warm-up, t = {t}", slope, _g(method, at, 0.5), 1e-2)
        exact = _method(FlowToData(MEAN, STD))
        yield equal(f"the exact map has g = 0, t = {t}", 0.0, _g(exact, at), 1e-10, scale=1.0)
        still = lambda self, at, *rest: REAL["derivative"](self, at._replace(v=0 * at.v), *rest)  # noqa: E731
        with mistake(SanaSprint, "derivative", still):
            wrong = _g(exact, at)
        yield differs(f"... which the derivative in t alone has not, t = {t}", 0.0, wrong, 1e-4, scale=1.0)


def _start_of_warmup() -> Iterator[Check]:
    teacher = _method(GaussianMixture(MEAN[None], STD[None]), tangent_warmup=10)
    at = _point(teacher, 0.7)
    yield equal("the teacher's own loss is zero at step 0", 0.0, teacher.regression(0, at).loss, 1e-20, scale=1.0)
    yield differs("... and not when the derivative counts", 0.0, teacher.regression(5, at).loss, 1e-3, scale=1.0)
    method = _method(AnyField(), norm="l2", norm_c=0.3)
    g = _g(method, at)
    g = g / (g.norm(dim=1, keepdim=True) + 0.3)
    nn.init.constant_(method.weight.double().linear.bias, 0.7)
    expected = math.exp(-0.7) / math.tan(0.7) * g.square().mean()
    yield equal("the loss is the weighted |g/(|g| + c)|^2", expected, method.regression(0, at).loss, 1e-9)
    yield equal("the adaptive weight's loss", expected + 0.7, method.weight_turn(SOME).loss, 1e-6)


def _guided() -> Iterator[Check]:
    """Class by class the guided teacher is a Gaussian: the direction at each sample's scale is its velocity."""
    means = torch.tensor([[0.7, -0.4], [-0.2, 0.3], [0.1, 0.1]]).double()
    teacher = class_gaussians_teacher(means, STD)
    method = _method(ClassGaussians(means, STD), teacher, guidance_min=2.0, guidance_max=5.0)
    labels = torch.tensor([0, 1]).repeat(8)
    batch = Batch(16, (2,), {"class_labels": labels}, None, torch.device("cpu"), (0, 0, 0))
    scales = method.scales(batch)
    x_t, t = torch.cat(two_points(2))[:16], torch.full((16,), 0.8).double()
    moved = means[2] + scales[:, None] * (means[labels] - means[2])
    v = torch.cat(
        [ClassGaussians(m[None], STD)(x[None], t[:1], labels[:1] * 0) for m, x in zip(moved, x_t, strict=True)]
    )
    got = method.direction(x_t, 0 * x_t, t, batch, batch.cond)
    yield equal("the direction is the guided teacher's, each sample at its own scale", v, got, 1e-12)
    with mistake(method, "scales", lambda batch: 1 + scales):
        wrong = method.direction(x_t, 0 * x_t, t, batch, batch.cond)
    yield differs("... and not by 1 + a", v, wrong, 1e-2)
    yield equal("scales lie between the two", 1.0, float(((scales >= 2) & (scales <= 5)).all()), 0.0)
    given = method.extra(batch).scale
    yield equal("the student is given them", scales, 0 * scales if given is None else given, 0.0)


def _both_terms() -> Iterator[Check]:
    """The student's gradient is that of the consistency, and the weighted one of a linear discriminator."""
    t, angle = 0.8, lambda schedule, n, *rest, **more: torch.full((n,), 0.8, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    images = MEAN + STD * torch.randn(64, 2, generator=draw, dtype=torch.float64)
    batch = Batch(64, (2,), {}, images, images.device, (0, 0, 0))
    for weight in (0.0, 0.7):
        network = FlowToData(MEAN, STD)
        method = _method(network, gan_weight=weight, noisiest_share=1.0)
        with mistake(adversary, "edm_log_normal", angle), mistake(sana_sprint, "edm_log_normal", angle):
            got = gradient(method.turns(0)[0].loss(batch).loss, *network.parameters())
        z = batch.randn("z").double()
        pull = -weight * math.cos(t) * torch.cat([SLOPE, SLOPE * z.mean(0)])
        yield equal(f"the exact map is pulled by the GAN alone, weight {weight}", pull, got, 1e-6, scale=1.0)
    yield differs("... which is not zero", 0.0, got, 1e-2, scale=1.0)
    order = [turn.player for turn in method.turns(7)]
    yield equal("order of turns", 1.0, float(order == ["student", "discriminator", "weight"]), 0.0)


def _samples() -> Iterator[Check]:
    """A share of the GAN's samples begins with noise, the rest with noised images."""
    draw = torch.Generator().manual_seed(3)
    images = MEAN + STD * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
    batch = Batch(4000, (2,), {}, images, images.device, (0, 0, 0))
    seen: list[tuple[Tensor, Tensor]] = []
    method = _method(FlowToData(MEAN, STD), noisiest_share=0.3)
    handle = method.student.register_forward_hook(lambda module, args, out: seen.append(args[:2]))
    method.generate(batch)
    handle.remove()
    x_t, t = seen[0]
    noisiest = t == math.pi / 2
    yield equal("the share of samples from noise", 0.3, noisiest.double().mean(), 0.1)
    yield equal("... which is read as it is", batch.randn("z").double()[noisiest], x_t[noisiest], 1e-12)
    variance = torch.cos(t[~noisiest, None]) ** 2 * STD**2 + torch.sin(t[~noisiest, None]) ** 2
    rest = (x_t[~noisiest] - torch.cos(t[~noisiest, None]) * MEAN) / variance.sqrt()
    closed = torch.tensor([0.0, 0.0, 1.0, 1.0])
    yield equal(
        "mean and deviation of the rest are the noised images'", closed, torch.cat([rest.mean(0), rest.std(0)]), 0.1
    )
