"""Score distillation on a renderer: closed forms, a linear renderer with a known optimum, particles, views."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import LinearFlow, ScoreDistillation, Teacher, UserError
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.experts import Experts
from diffdistill.exact.analytic import GaussianMixture, class_gaussians_teacher, gaussian_teacher
from diffdistill.exact.checks import gauss_hermite
from diffdistill.exact.plane import plane_teacher

MU, S = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
TIMES = torch.linspace(0.1, 1.4, 8, dtype=torch.float64)


def sds(teacher: Teacher, **options: Any) -> ScoreDistillation:
    return ScoreDistillation(teacher, fake_score="none", **options)


def mean_push(distillation: ScoreDistillation, x: Tensor, t: float, cond: dict[str, Tensor] | None = None) -> Tensor:
    """Over the noise; exact where the teacher is linear, since of each noise the negative is there too."""
    eps, at = torch.randn(len(x), x.shape[1]).double(), torch.full((len(x),), t, dtype=torch.float64)
    return sum(distillation.gradient(x, at, e, cond or {}) for e in (eps, -eps)) / 2  # type: ignore[return-value]


def test_without_a_fake_score_it_descends_to_the_mean() -> None:
    distillation, x = sds(gaussian_teacher(MU.tolist(), S)), torch.randn(20, 2).double()
    for t in TIMES.tolist():
        variance = math.cos(t) ** 2 * S**2 + math.sin(t) ** 2
        closed = math.sin(t) ** 2 * math.cos(t) * math.sin(t) / variance * (x - MU)
        assert torch.allclose(mean_push(distillation, x, t), closed, atol=1e-12)
        eps, at = torch.randn(20, 2).double(), torch.full((20,), t, dtype=torch.float64)
        one = closed + math.sin(t) ** 2 * (math.sin(t) ** 2 / variance - 1) * eps  # of a single noise
        assert torch.allclose(distillation.gradient(x, at, eps, {}), one, atol=1e-12)


def test_the_best_parameters_of_a_linear_renderer_are_those_of_weighted_least_squares() -> None:
    """x = A_v p + b_v for three views v. The teacher is not isotropic, so plain least squares are something else."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 4, generator=draw, dtype=torch.float64)
    b = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    variance = torch.cos(TIMES)[:, None] ** 2 * S**2 + torch.sin(TIMES)[:, None] ** 2
    weights = (torch.sin(TIMES)[:, None] ** 3 * torch.cos(TIMES)[:, None] / variance).mean(0)

    def least_squares(w: Tensor) -> Tensor:
        left = torch.einsum("vij,i,vik->jk", a, w, a)
        return torch.linalg.solve(left, torch.einsum("vij,i,vi->j", a, w, MU - b))

    distillation = sds(gaussian_teacher(MU.tolist(), S))

    def slope(p: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        x = torch.einsum("vij,j->vi", a, p) + b
        push = sum(mean_push(distillation, x.detach(), t) for t in TIMES.tolist()) / len(TIMES)
        return torch.autograd.grad((push * x).sum(), p)[0]

    best, zero = least_squares(weights), torch.zeros(4, dtype=torch.float64)
    at_zero = slope(zero)  # linear in p: one step of Newton's is the whole way
    curvature = torch.stack([slope(row) - at_zero for row in torch.eye(4, dtype=torch.float64)], 1)
    assert torch.allclose(-torch.linalg.solve(curvature, at_zero), best, atol=1e-8)
    assert torch.linalg.eigvalsh(curvature).min() > 0  # and not away from it
    assert (least_squares(torch.ones(2).double()) - best).norm() > 0.01


def test_the_loss_leads_a_linear_renderer_there_too() -> None:
    """By its own noise, and with the gradient that the user's optimizer sees."""
    distillation = sds(gaussian_teacher(MU.tolist(), 0.5))
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    optimizer = torch.optim.Adam([p], 0.02)
    last = []
    for step in range(400):
        optimizer.zero_grad()
        distillation.loss((turn @ p).expand(64, 2)).backward()
        optimizer.step()
        last += [p.detach().clone()] if step >= 300 else []
    assert (turn @ torch.stack(last).mean(0) - MU).abs().max() < 0.05


def test_guidance_carries_the_optimum_beyond_the_conditional_mean() -> None:
    means = torch.tensor([[0.7, 0.1], [-0.5, 0.4]]).double()
    teacher = class_gaussians_teacher(means, torch.tensor([0.5, 0.5]).double())
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64)}
    for scale in (1.0, 7.5):
        fixed = (means[1] + scale * (means[0] - means[1]))[None]
        assert mean_push(sds(teacher, guidance_scale=scale), fixed, 0.9, labels).abs().max() < 1e-12
    assert mean_push(sds(teacher, guidance_scale=7.5), means[:1], 0.9, labels).abs().max() > 0.1


def with_exact_fake(teacher: Teacher, population: GaussianMixture) -> ScoreDistillation:
    """The fake score is that of the population."""
    distillation = ScoreDistillation(teacher, fake_score="full")
    network: Any = population
    distillation.fake_score = Denoiser(network, teacher.denoiser.schedule, teacher.denoiser.output)
    return distillation


class Bare(nn.Module):
    """A teacher of a Gaussian with a parameter, so that the fake score can be a copy of it."""

    def __init__(self, mixture: GaussianMixture):
        super().__init__()
        self.mixture, self.unused = mixture, nn.Parameter(torch.zeros(1).double())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mixture(x_t, t) + 0 * self.unused


def gaussian(mean: list[float], std: Any) -> Teacher:
    teacher = gaussian_teacher(mean, std)
    teacher.denoiser.network = Bare(teacher.denoiser.network)  # type: ignore[arg-type]
    return teacher


def test_with_the_populations_own_score_it_is_the_gradient_of_the_divergence() -> None:
    """sin^3/cos times that of KL(q_t || p_t) in mean and width of an affine population."""
    mean, width = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-0.3, 0.9))
    nodes, weights = gauss_hermite(40)
    z, e = (part.flatten() for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    share = (weights[:, None] * weights).flatten()
    population = GaussianMixture([[-0.3]], 0.9)
    distillation = with_exact_fake(gaussian([0.7], 0.5), population)
    for t in TIMES.tolist():
        x = (mean + width * z)[:, None]
        push = distillation.gradient(x.detach(), torch.full((len(x),), t, dtype=torch.float64), e[:, None], {})
        got = torch.autograd.grad((share[:, None] * push * x).sum(), (mean, width))
        p, q = (math.cos(t) ** 2 * s**2 + math.sin(t) ** 2 for s in (0.5, width))
        off = math.cos(t) * (mean - 0.7)
        divergence = ((q + off**2) / p - torch.log(q) - 1).sum() / 2
        closed = torch.autograd.grad(divergence, (mean, width))
        factor = math.sin(t) ** 3 / math.cos(t)
        assert torch.allclose(torch.stack(got), factor * torch.stack(closed), rtol=1e-8, atol=1e-10)
        swapped = torch.stack(got) + factor * torch.stack(closed)
        assert swapped.abs().max() > 1e-4


@pytest.mark.parametrize(("n", "spread"), [(1, 0.0), (2, 0.462), (4, 0.491)])
def test_particles_stay_apart(n: int, spread: float) -> None:
    """A teacher of width 0.5; one particle is drawn to its mean as without a fake score, several spread."""
    nodes, weights = gauss_hermite(16)
    x = torch.linspace(-0.1, 0.15, n, dtype=torch.float64)[:, None]
    teacher, distillation = gaussian([0.0], 0.5), None
    for _ in range(250):
        distillation = distillation or with_exact_fake(teacher, GaussianMixture(x, 0.0))
        assert distillation.fake_score is not None
        distillation.fake_score.network = GaussianMixture(x, 0.0)
        at = x.repeat_interleave(len(TIMES) * 16, 0)
        t, e = TIMES.repeat_interleave(16).repeat(n), nodes.repeat(n * len(TIMES))[:, None]
        push = distillation.gradient(at, t, e, {}).reshape(n, len(TIMES), 16)
        x = x - 3 * (push * weights).sum(2).mean(1, keepdim=True)
    assert float(x.std(correction=0)) == pytest.approx(spread, abs=0.015)
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-3)


def points() -> Teacher:
    """A small network that knows the points of the plane."""
    start = plane_teacher().start
    assert start is not None
    return Teacher(start, (2,), 2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_fake_score_learns_what_each_view_shows(kind: Any) -> None:
    torch.manual_seed(0)
    teacher, labels = points(), {"class_labels": torch.arange(64) % 2}
    x, t = torch.randn(64, 2), torch.full((64,), 1.2).double()
    before = teacher.denoiser(x, t, labels).y
    distillation = ScoreDistillation(teacher, fake_score=kind, rank=8, lr=0.01, view_numbers=1, view_dropout=0.0)
    view = (torch.arange(64) // 2 % 2 * 2.0 - 1)[:, None]
    shown = torch.cat([view, -view], 1) * 2  # in the units of the data, whose deviation is 2
    assert torch.equal(distillation._fake(x, t, labels, view).y, before)  # begins as the teacher
    losses = [distillation.learn(shown, labels, view) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20]) / 4
    said = distillation._fake(x, t, labels, view).x0
    assert (
        (said - shown / 2).abs().mean()
        < 0.25
        < 1.0
        < (distillation._fake(x, t, labels, -view).x0 - shown / 2).abs().mean()
    )
    assert torch.equal(teacher.denoiser(x, t, labels).y, before)
    scene = shown.clone().requires_grad_()
    distillation.loss(scene, labels, view).backward()
    assert scene.grad is not None and scene.grad.abs().max() > 0
    assert distillation.fake_score is not None
    trained = [p for p in distillation.fake_score.parameters() if p.requires_grad]
    left = [None if p.grad is None else p.grad.clone() for p in trained]
    distillation.loss(scene, labels, view).backward()  # moves nothing of its own
    assert all((a is None and p.grad is None) or torch.equal(a, p.grad) for a, p in zip(left, trained, strict=True))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_noise_and_what_makes_no_sense_is_refused() -> None:
    teacher, labels = points(), {"class_labels": torch.zeros(4, dtype=torch.int64)}
    x = torch.randn(4, 2)

    def losses(seed: int) -> list[float]:
        distillation = sds(teacher, seed=seed)
        return [float(distillation.loss(x, labels)) for _ in range(2)]

    assert losses(1) == losses(1) != losses(2) and len({*losses(1)}) == 2
    assert sds(teacher).learn(x, labels) == 0.0
    for options, message in (
        ({"fake_score": "other"}, "fake_score: 'other' is not one of lora, full, none"),
        ({"time_low": 0.6, "time_high": 0.5}, "time_low: 0.6 to time_high 0.5 must be fractions that rise"),
    ):
        with pytest.raises(UserError, match=message):
            ScoreDistillation(teacher, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"x: \(4, 3\) is no batch of samples of the shape \(2,\)"):
        sds(teacher).loss(torch.randn(4, 3), labels)
    flat = Teacher.around(Flat(), (2,), LinearFlow(), "flow_prediction")
    with pytest.raises(UserError, match="view_numbers: Flat has no layer that embeds the time"):
        ScoreDistillation(flat, fake_score="full", view_numbers=2)
    two = points()
    parts = {name: copy.deepcopy(two.denoiser.network) for name in ("transformer", "transformer_2")}
    two.denoiser.network = Experts(parts, 0.5)
    for kind in ("full", "lora"):
        with pytest.raises(UserError, match="view_numbers: the teacher's network is two"):
            ScoreDistillation(two, fake_score=kind, view_numbers=2)  # type: ignore[arg-type]


class Flat(nn.Module):
    """A network that embeds no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x)
