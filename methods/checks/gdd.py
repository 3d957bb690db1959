"""Exact checks of gdd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gauss_hermite, gradient, mistake
from diffdistill.methods.gdd import GDD, Config, frozen_layers
from diffdistill.players.teacher import Teacher, trainable
from diffdistill.scaffold import adversary
from diffdistill.scaffold.adversary import LatentAdversary
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "student_lr": 0.0002,
        "discriminator_lr": 0.002,
        "beta1": 0.0,
        "depths": "0.2, 0.5, 0.7",
        "gan_time_mean": -0.5,
        "gan_time_std": 1.5,
        "r1_weight": 0.0001,
        "steps": 2500,
    },
}

Function = Callable[[Tensor, Tensor], Tensor]


class _Known(LatentAdversary):
    """The method's own adversary, whose discriminator is a function of the noised image and the angle."""

    def __init__(self, teacher: Teacher, options: Any):
        self.teacher, self.options, self.samples = teacher.denoiser, options, {}
        self.heads, self.function = nn.ModuleList(), lambda x_t, t: x_t[:, 0]

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return self.function(diffuse(x, t, eps), t)[None]


class _Nodes(Batch):
    """z and eps on the nodes of a quadrature over both, (n^2, 1)."""

    weights: Tensor

    def randn(self, purpose: str) -> Tensor:
        nodes, _ = gauss_hermite(40)
        z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
        return (z if purpose == "z" else eps).flatten()[:, None]


def _game(m: float, b: float, function: Function, **options: Any) -> tuple[GDD, AffineGenerator]:
    """A student N(m, b^2) of a teacher N(0.7, 0.5^2), and a discriminator that is a function."""
    teacher = gaussian_teacher([0.7], 0.5)
    generator = AffineGenerator(torch.tensor([m]).double(), torch.tensor([b]).double())
    with mistake(adversary, "LatentAdversary", _Known):
        method = GDD(teacher, Config(**options), student=Denoiser(generator, TrigFlow(), OUTPUTS["v_prediction"]))
    known: Any = method.adversary
    known.function = function
    return method, generator


def verify() -> Iterator[Check]:
    """Section 8.1's sanity item, the penalty's closed form, and what is frozen."""
    for t in (0.3, 1.2):
        yield from _student_checks(t)
    yield from _penalty_checks()
    yield from _freeze_checks()
    method, _ = _game(0.2, 0.9, lambda x_t, t: x_t[:, 0])
    order = [turn.player for turn in method.turns(3)]
    yield equal("the student moves first", 1.0, float(order == ["student", "discriminator"]), 0.0)


def _student_checks(t: float) -> Iterator[Check]:
    """With the optimal discriminator log p_t/q_t the gradient is -E[sigmoid(-d) (s_p - s_q) dx_t], and 0 at p = q."""
    _, weights = gauss_hermite(40)
    joint = torch.outer(weights, weights).flatten()
    batch = _Nodes(1600, (1,), {}, None, torch.device("cpu"), (0, 0, 0))
    p = GaussianMixture([[0.7]], [0.5])
    for name, m, b in (("another Gaussian", 0.5, 0.7), ("the teacher's", 0.7, 0.5)):
        q = GaussianMixture([[m]], [b])

        def ratio(x_t: Tensor, t: Tensor, q: GaussianMixture = q) -> Tensor:
            return p.log_density(x_t, t) - q.log_density(x_t, t)

        method, generator = _game(m, b, ratio)

        def got(loss: Callable[[Tensor], Tensor] = lambda d: nn.functional.softplus(-d)) -> Tensor:
            def weighted(d: Tensor) -> Tensor:
                return (joint * loss(d)).sum()

            fixed = lambda schedule, n, *rest: torch.full((n,), t, dtype=torch.float64)  # noqa: E731
            with mistake(adversary, "gan_generator_loss", weighted), mistake(adversary, "edm_log_normal", fixed):
                loss_of_turn = method.turns(0)[0].loss(batch).loss  # noqa: B023
            return gradient(loss_of_turn, generator.mean, generator.scale)  # noqa: B023

        angle, z, eps = torch.full((1600,), t).double(), batch.randn("z"), batch.randn("eps")
        x_t = math.cos(t) * (m + b * z) + math.sin(t) * eps
        pull = torch.sigmoid(q.log_density(x_t, angle) - p.log_density(x_t, angle))
        along = -joint * pull * (p.score(x_t, angle) - q.score(x_t, angle))[:, 0] * math.cos(t)
        closed = torch.stack([along.sum(), (along * z[:, 0]).sum()])
        yield equal(f"the student's gradient, samples of {name}, t = {t}", closed, got(), 1e-7, scale=1.0)
        if m == 0.7:
            yield equal(f"... is zero there, t = {t}", 0.0, got(), 1e-12, scale=1.0)
        else:
            saturating = got(lambda d: -nn.functional.softplus(d))
            yield differs(f"the saturating loss is caught, t = {t}", closed, saturating, 1e-2)


def _penalty_checks() -> Iterator[Check]:
    """Of d = a x_t + c x_t^2/2 at the angle t: |d'|^2 is cos(t)^2 (a + c x_t)^2, with n = 1 or -1 an exact mean."""
    a, c = 0.4, -1.1
    images = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]

    class Signs(Batch):
        def randn(self, purpose: str) -> Tensor:
            return torch.ones(8, 1).double() if purpose.endswith("r1") else torch.zeros(8, 1).double()

    batch = Signs(8, (1,), {}, images, torch.device("cpu"), (0, 0, 0))
    method, _ = _game(0.2, 0.9, lambda x_t, t: a * x_t[:, 0] + c * x_t[:, 0] ** 2 / 2, r1_every=4, r1_weight=0.3)
    fixed = lambda schedule, n, *rest: torch.full((n,), 0.8, dtype=torch.float64)  # noqa: E731
    closed = (math.cos(0.8) * (a + c * math.cos(0.8) * images[:, 0])).square().mean()
    with mistake(adversary, "edm_log_normal", fixed), mistake(method, "difference", 1e-6):
        yield equal("the penalty is |d'(x)|^2", closed, method.penalty(batch), 1e-5)
        method.adversary.samples[0] = images + 0.1
        every = [method.discriminator_turn(4, batch)]
        for step in (1, 2, 3):
            method.adversary.samples[0] = images + 0.1
            every.append(method.discriminator_turn(step, batch))
    with mistake(adversary, "edm_log_normal", fixed):
        yield differs("of images that are not the batch's it is another", closed, _other(method, batch), 1e-2)
    losses = torch.stack([outcome.loss for outcome in every])
    yield equal("every r1_every-th step it counts r1_every times", 4 * 0.3 / 2 * closed, losses[0] - losses[1], 1e-5)
    yield equal("and in no other", 0.0, losses[1:] - losses[1], 1e-12, scale=1.0)


def _other(method: GDD, batch: Batch) -> Tensor:
    moved = Batch(8, (1,), {}, batch.images + 1, torch.device("cpu"), (0, 0, 0))
    return method.penalty(moved)


class _UNet(nn.Module):
    """The names and kinds of layers that a UNet of diffusers has."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict(
            {"conv1": nn.Conv2d(2, 2, 3), "conv_shortcut": nn.Conv2d(2, 2, 1), "norm": nn.Linear(2, 2)}
        )
        to_out = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
        attention = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_out": to_out})
        self.conv_in, self.conv_out = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
        self.down_blocks = nn.ModuleList([block])
        self.mid_block = attention


def _freeze_checks() -> Iterator[Check]:
    teacher = gaussian_teacher([0.7, 0.1], 0.5)
    for kind, expected in (("convolutions", 2), ("none", 0)):
        network = _UNet()
        student = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
        with mistake(adversary, "LatentAdversary", _Known):
            method = GDD(teacher, Config(freeze=kind), student=student)  # type: ignore[arg-type]
        trained = {id(p) for p in trainable(method.players)["student"]}
        names = [name for name, p in network.named_parameters() if id(p) not in trained]
        yield equal(f"layers that are frozen, {kind}", expected, len({name.rpartition(".")[0] for name in names}), 0.0)
        if names:
            layers = {name.rpartition(".")[0] for name in names}
            same = layers == {"down_blocks.0.conv1", "mid_block.to_out.0"}
            yield equal("they are a block's convolution and attention's output", 1.0, float(same), 0.0)
    yield equal("a network without blocks has none", 0, len(frozen_layers(nn.Sequential(nn.Conv2d(2, 2, 1)))), 0.0)
