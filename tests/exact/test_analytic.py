"""Exact teachers against textbook formulas, autograd and each other; only tests of samples draw samples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, heun_step, solve
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, TrigFlow
from diffdistill.errors import UserError
from diffdistill.exact.analytic import AffineGenerator, GaussianMixture, gaussian_teacher, mixture_teacher


def f64(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def rotation(*degrees: float) -> Tensor:
    angles = torch.deg2rad(f64(degrees))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


MEANS = f64([[1.0, -0.5], [-1.2, 0.3], [0.4, 1.5]])
STDS = f64([[0.3, 0.9], [0.5, 0.2], [1.4, 0.6]])
WEIGHTS = f64([0.5, 0.2, 0.3])
TURNS = rotation(25.0, -60.0, 110.0)
COVARIANCES = TURNS @ torch.diag_embed(STDS**2) @ TURNS.mT
EYE = torch.eye(2, dtype=torch.float64)
LABELS = [0, 1, 0]
T = f64([0.05, 0.4, 0.9, 1.3, 1.55])


def mixture() -> GaussianMixture:
    return GaussianMixture(MEANS, STDS, WEIGHTS, rotations=TURNS, labels=LABELS)


def points(t: Tensor, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(len(t), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def textbook(x: Tensor, t: float, chosen: list[int]) -> tuple[float, Tensor]:
    """log q_t(x) and E[x0 | x] of some components, one point at a time (METHODS.md section 1, T1 and T3)."""
    alpha, sigma = math.cos(t), math.sin(t)
    logs, means = [], []
    for k in chosen:
        cov = alpha**2 * COVARIANCES[k] + sigma**2 * EYE
        log = MultivariateNormal(alpha * MEANS[k], cov).log_prob(x)
        logs.append(log + torch.log(WEIGHTS[k] / WEIGHTS[chosen].sum()))
        means.append(MEANS[k] + alpha * COVARIANCES[k] @ torch.linalg.solve(cov, x - alpha * MEANS[k]))
    logits = torch.stack(logs)
    return float(logits.logsumexp(0)), (logits.softmax(0)[:, None] * torch.stack(means)).sum(0)


CHOICES = [(None, [0, 1, 2]), (0, [0, 2]), (1, [1]), (2, [0, 1, 2])]


@pytest.mark.parametrize(("label", "chosen"), CHOICES)
def test_density_and_velocity_are_the_textbook_ones(label: int | None, chosen: list[int]) -> None:
    """Of the whole mixture, of a class, and of the null label, which is the whole."""
    network, x = mixture(), points(T)
    labels = None if label is None else torch.full((len(T),), label)
    density, v = network.log_density(x, T, labels), network(x, T, labels)
    for i, t in enumerate(T.tolist()):
        log, x0 = textbook(x[i], t, chosen)
        assert float(density[i]) == pytest.approx(log, abs=1e-11)
        eps = (x[i] - math.cos(t) * x0) / math.sin(t)
        close(v[i], math.cos(t) * eps - math.sin(t) * x0)


@pytest.mark.parametrize("label", [None, 0, 1, 2])
def test_score_is_the_gradient_of_the_log_density(label: int | None) -> None:
    network, x = mixture(), points(T).requires_grad_()
    labels = None if label is None else torch.full((len(T),), label)
    want = torch.autograd.grad(network.log_density(x, T, labels).sum(), x)[0]
    close(network.score(x, T, labels), want)


def test_score_and_velocity_belong_together() -> None:
    """eps = -sin(t) score, through the Denoiser."""
    teacher = mixture_teacher(MEANS, STDS, WEIGHTS, rotations=TURNS)
    network, x = mixture(), points(T)
    pred = teacher.denoiser(x, T, {})
    close(pred.eps, -torch.sin(T)[:, None] * network.score(x, T))


def test_velocity_at_both_ends() -> None:
    """At t = 0 nothing is known of eps but its mean, 0; at pi/2 nothing of x0 but its mean."""
    network = mixture()
    t = f64([0.0, math.pi / 2])
    v = network(points(t), t)
    close(v[0], torch.zeros(2, dtype=torch.float64))
    close(v[1], -(WEIGHTS[:, None] * MEANS).sum(0))
    far = network(f64([[60.0, -80.0], [60.0, -80.0]]), t)
    assert bool(far.isfinite().all())


def test_a_batch_may_mix_labels() -> None:
    network, x = mixture(), points(T)
    labels = torch.tensor([0, 1, 2, 0, 1])
    for f in (network.forward, network.score, network.log_density):
        together = f(x, T, labels)
        for i in range(len(T)):
            close(together[i], f(x[i : i + 1], T[i : i + 1], labels[i : i + 1])[0])


def test_a_class_is_the_mixture_of_its_components() -> None:
    network, part = mixture(), GaussianMixture(MEANS[[0, 2]], STDS[[0, 2]], WEIGHTS[[0, 2]], rotations=TURNS[[0, 2]])
    x, zeros = points(T), torch.zeros(len(T), dtype=torch.long)
    for name in ("forward", "score", "log_density"):
        close(getattr(network, name)(x, T, zeros), getattr(part, name)(x, T))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_is_exact(scale: float) -> None:
    teacher = mixture_teacher(MEANS, STDS, WEIGHTS, rotations=TURNS, labels=LABELS)
    assert teacher.num_classes == 2 and teacher.shape == (2,)
    x, labels = points(T), torch.tensor([0, 1, 0, 1, 1])
    pred = guided(teacher.denoiser, scale)(x, T, {"class_labels": labels})
    for i, t in enumerate(T.tolist()):
        _, whole = textbook(x[i], t, [0, 1, 2])
        _, part = textbook(x[i], t, [[0, 2], [1]][int(labels[i])])
        close(pred.x0[i], whole + scale * (part - whole))


def test_a_teacher_without_classes_has_no_guidance() -> None:
    teacher = gaussian_teacher([0.0], 1.0)
    assert teacher.num_classes is None
    with pytest.raises(UserError, match="null"):
        guided(teacher.denoiser, 2.0)


# -- probability flow -----------------------------------------------------------------------------------------


def rk4(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float, s: float, steps: int) -> Tensor:
    """The fourth-order Runge-Kutta method for dx/dt = v."""
    h = (s - t) / steps
    for i in range(steps):
        now = torch.full((len(x),), t + i * h, dtype=torch.float64)
        k1 = v(x, now)
        k2 = v(x + h / 2 * k1, now + h / 2)
        k3 = v(x + h / 2 * k2, now + h / 2)
        k4 = v(x + h * k3, now + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


SPANS = [(math.pi / 2, 0.0), (1.3, 0.2), (0.2, 1.3)]


def span(n: int, t: float, s: float) -> tuple[Tensor, Tensor]:
    return torch.full((n,), t, dtype=torch.float64), torch.full((n,), s, dtype=torch.float64)


@pytest.mark.parametrize(("t", "s"), SPANS)
def test_flow_map_of_an_isotropic_gaussian(t: float, s: float) -> None:
    mean, std = f64([0.7, -1.1]), 0.4
    network: Any = gaussian_teacher(mean.tolist(), f64(std)).denoiser.network
    x = points(torch.zeros(6))
    ratio = math.sqrt((math.cos(s) ** 2 * std**2 + math.sin(s) ** 2) / (math.cos(t) ** 2 * std**2 + math.sin(t) ** 2))
    want = math.cos(s) * mean + (x - math.cos(t) * mean) * ratio
    close(network.flow_map(x, *span(6, t, s)), want)


@pytest.mark.parametrize(("t", "s"), SPANS)
def test_flow_map_of_a_rotated_gaussian_solves_the_ode(t: float, s: float) -> None:
    network = GaussianMixture(MEANS[:1], STDS[:1], rotations=TURNS[:1])
    x = points(torch.zeros(6))
    close(network.flow_map(x, *span(6, t, s)), rk4(network, x, t, s, 400), atol=1e-8)
    close(network.flow_map(x, *span(6, t, t)), x)
    half = network.flow_map(x, *span(6, t, 0.8))
    close(network.flow_map(half, *span(6, 0.8, s)), network.flow_map(x, *span(6, t, s)))


def test_flow_map_of_the_gaussian_turns_its_marginals_into_each_other() -> None:
    """Jacobian J(t -> s): J C_t J^T = C_s, with both covariances from the textbook."""
    network = GaussianMixture(MEANS[:1], STDS[:1], rotations=TURNS[:1])
    t, s = 1.2, 0.3
    shift, *columns = network.flow_map(f64([[0, 0], [1, 0], [0, 1]]), *span(3, t, s))
    jacobian = torch.stack([c - shift for c in columns], 1)
    cov = [math.cos(a) ** 2 * COVARIANCES[0] + math.sin(a) ** 2 * EYE for a in (t, s)]
    close(jacobian @ cov[0] @ jacobian.T, cov[1])
    close(jacobian @ (math.cos(t) * MEANS[0]) + shift, math.cos(s) * MEANS[0])


ONE_D = (f64([[-1.0], [0.8], [2.0]]), f64([[0.3], [0.5], [0.4]]), f64([0.3, 0.5, 0.2]))


@pytest.mark.parametrize(("t", "s"), SPANS)
def test_quantile_map_solves_the_ode(t: float, s: float) -> None:
    """Of each class and of the whole."""
    network = GaussianMixture(*ONE_D, labels=LABELS)
    x = torch.linspace(-3.5, 3.5, 8, dtype=torch.float64).repeat(3)[:, None]
    labels = torch.arange(3).repeat_interleave(8)
    want = rk4(lambda x, t: network(x, t, labels), x, t, s, 400)
    close(network.flow_map(x, *span(24, t, s), labels), want, atol=1e-6)
    close(network.flow_map(x[:8], *span(8, t, s)), want[16:], atol=1e-6)


def test_quantile_map_keeps_quantiles_in_both_tails() -> None:
    network = GaussianMixture(*ONE_D)
    t, s = 1.1, 0.25
    x = torch.linspace(-5.0, 5.0, 21, dtype=torch.float64)[:, None]
    y = network.flow_map(x, *span(21, t, s))

    def marginal(a: float) -> MixtureSameFamily:
        means, stds, weights = (p.flatten() for p in ONE_D)
        scale = (math.cos(a) ** 2 * stds**2 + math.sin(a) ** 2).sqrt()
        return MixtureSameFamily(Categorical(weights), Normal(math.cos(a) * means, scale))

    close(marginal(s).cdf(y), marginal(t).cdf(x), atol=1e-13)
    # By symmetry, the far right tail must be as exact as the far left one.
    mirrored = GaussianMixture(-ONE_D[0], ONE_D[1], ONE_D[2])
    far = f64([[7.0], [9.0], [12.0]])
    close(network.flow_map(far, *span(3, t, s)), -mirrored.flow_map(-far, *span(3, t, s)), atol=1e-12)
    assert bool((network.flow_map(far, *span(3, t, s)).diff(dim=0) > 1).all())


def product(first: GaussianMixture, second: GaussianMixture, turn: Tensor) -> GaussianMixture:
    """The distribution of turn @ (a, b) for independent a and b."""
    pairs = [(i, j) for i in range(len(first.means)) for j in range(len(second.means))]
    means = torch.stack([torch.cat([first.means[i], second.means[j]]) for i, j in pairs]) @ turn.T
    stds = torch.stack([torch.cat([first.stds[i], second.stds[j]]) for i, j in pairs])
    weights = torch.stack([(first.log_weights[i] + second.log_weights[j]).exp() for i, j in pairs])
    return GaussianMixture(means, stds, weights, rotations=turn.expand(len(pairs), 2, 2))


def test_flow_map_in_two_dimensions_is_that_of_one_where_they_are_independent() -> None:
    first = GaussianMixture(*ONE_D)
    second = GaussianMixture(f64([[-0.5], [1.5]]), f64([[0.6], [0.4]]), f64([0.4, 0.6]))
    turn = rotation(35.0)[0]
    x = points(torch.zeros(6))
    t, s = span(6, math.pi / 2, 0.0)
    want = torch.cat([first.flow_map(x[:, :1], t, s), second.flow_map(x[:, 1:], t, s)], 1)
    got = product(first, second, turn).flow_map(x @ turn.T, t, s)
    close(got @ turn, want, atol=1e-8)


@pytest.mark.parametrize(("step", "order"), [(ddim_step, 1), (heun_step, 2)])
def test_solvers_converge_to_the_quantile_map(step: Any, order: int) -> None:
    network = GaussianMixture(*ONE_D)
    denoiser = Denoiser(network, TrigFlow(), OUTPUTS["v_prediction"])
    x = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None]
    want = network.flow_map(x, *span(9, 1.3, 0.2))
    errors = []
    for steps in (100, 200):
        got = solve(step, denoiser, x, torch.linspace(1.3, 0.2, steps + 1, dtype=torch.float64), {})
        errors.append(float((got - want).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


class NativeGaussian(nn.Module):
    """The exact network of N(mean, std^2) in a schedule's own units, from its own time; nothing is shared."""

    def __init__(self, kind: str, mean: Tensor, std: Tensor, data_std: float, betas: Tensor | None = None):
        super().__init__()
        self.kind, self.sd = kind, data_std
        self.mean, self.std = data_std * mean, data_std * std  # in the data's units
        self.abar = None if betas is None else torch.cumprod(1 - betas, 0)

    def native(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, c_in) by the definition of the schedule."""
        one = torch.ones_like(time)
        if self.kind == "flow":
            return 1 - time / 1000, time / 1000, one
        if self.kind == "edm":
            sigma = torch.exp(4 * time)
            return one, sigma, 1 / torch.sqrt(sigma**2 + self.sd**2)
        if self.kind == "trigflow":
            return torch.cos(time), self.sd * torch.sin(time), one / self.sd
        assert self.abar is not None
        table = torch.atan2((1 - self.abar).sqrt(), self.abar.sqrt())
        low = time.floor().long().clamp(max=len(table) - 2)
        angle = table[low] + (time - low) * (table[low + 1] - table[low])
        return torch.cos(angle), torch.sin(angle), one

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma, c_in = (c[:, None] for c in self.native(time))
        x = x / c_in
        x0 = self.mean + alpha * self.std**2 * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        eps = (x - alpha * x0) / sigma
        if self.kind == "flow":
            return eps - x0
        if self.kind == "edm":
            r = torch.sqrt(sigma**2 + self.sd**2)
            return (x0 - self.sd**2 / r**2 * x) / (sigma * self.sd / r)
        return alpha * eps - sigma * x0


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["vp", "flow", "edm", "trigflow"])
def test_one_ode_through_four_schedules(kind: str) -> None:
    """The exact network of each schedule, solved in the normal form, gives the one closed-form map."""
    mean, std = f64([0.5, -0.8]), f64([0.8, 1.2])
    sd = 0.5 if kind == "edm" else 1.0
    schedule: Any = {
        "vp": DiscreteVP.from_config({}),
        "flow": LinearFlow(3.0),
        "edm": EDM(),
        "trigflow": TrigFlow(),
    }[kind]
    row = {"flow": "flow_prediction", "edm": "edm"}.get(kind, "v_prediction")
    denoiser = Denoiser(NativeGaussian(kind, mean, std, sd, BETAS), schedule, OUTPUTS[row])
    exact, x = GaussianMixture(mean[None], std[None]), points(torch.zeros(4))
    for top, bottom in ((schedule.t_max, schedule.t_min), (1.4, 0.2)):
        top, bottom = min(top, math.pi / 2 - 1e-6), max(bottom, 1e-6)
        got = rk4(lambda x, t: denoiser(x, t, {}).v, x, top, bottom, 100)
        close(got, exact.flow_map(x, *span(4, top, bottom)), atol=1e-7)
    # Extrapolated as befits the second order.
    coarse, fine = (
        solve(heun_step, denoiser, x, torch.linspace(1.4, 0.2, n + 1, dtype=torch.float64), {}) for n in (150, 300)
    )
    close((4 * fine - coarse) / 3, exact.flow_map(x, *span(4, 1.4, 0.2)), atol=1e-6)


# -- samples, construction, the affine generator -----------------------------------------------------------------


@pytest.mark.parametrize(("label", "chosen"), CHOICES)
def test_moments_of_samples(label: int | None, chosen: list[int]) -> None:
    n = 40_000
    labels = None if label is None else torch.full((n,), label)
    x = mixture().sample(n, torch.Generator().manual_seed(0), labels)
    weights = (WEIGHTS[chosen] / WEIGHTS[chosen].sum())[:, None]
    mean = (weights * MEANS[chosen]).sum(0)
    outer = MEANS[chosen][:, :, None] * MEANS[chosen][:, None]
    cov = (weights[..., None] * (COVARIANCES[chosen] + outer)).sum(0) - mean[:, None] * mean
    # Four standard errors.
    assert bool(((x.mean(0) - mean).abs() < 4 * (cov.diagonal() / n).sqrt()).all())
    assert bool(((torch.cov(x.T) - cov).abs() < 4 * float(cov.diagonal().max()) * (3 / n) ** 0.5).all())
    assert torch.equal(x, mixture().sample(n, torch.Generator().manual_seed(0), labels))


def test_samples_follow_the_labels_one_by_one() -> None:
    network = GaussianMixture(f64([[-10.0], [0.0], [10.0]]), 0.1, labels=[0, 1, 2])
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    x = network.sample(6, torch.Generator().manual_seed(0), labels)
    assert bool((x[:, 0] - (10.0 * labels - 10)).abs().max() < 1)


def test_stds_broadcast() -> None:
    x = points(T)
    want = GaussianMixture(MEANS, f64([[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]]))
    close(GaussianMixture(MEANS, f64([0.5, 0.6, 0.7]))(x, T), want(x, T))
    close(GaussianMixture(MEANS, 0.5)(x, T), GaussianMixture(MEANS, f64([[0.5, 0.5]] * 3))(x, T))
    close(GaussianMixture(MEANS, f64([0.5, 2.0]))(x, T), GaussianMixture(MEANS, f64([[0.5, 2.0]] * 3))(x, T))


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="means"):
        GaussianMixture(f64([0.0, 1.0]), 1.0)
    for stds, weights in ((-1.0, WEIGHTS), (1.0, f64([0.5, 0.5])), (1.0, f64([1.0, 0.0, 1.0]))):
        with pytest.raises(UserError, match="weights"):
            GaussianMixture(MEANS, stds, weights)


def test_affine_generator() -> None:
    """x0 = m + b z at pure noise; its exact score is that of N(m, b^2), out of reach of gradients."""
    generator = AffineGenerator(f64([0.5, -1.0]), f64([0.7, -0.2]))
    student = Denoiser(generator, TrigFlow(), OUTPUTS["v_prediction"])
    z = points(torch.zeros(5))
    close(student(z, span(5, math.pi / 2, 0)[0], {}).x0, generator.mean + generator.scale * z)
    exact = generator.exact_score().denoiser()
    want = GaussianMixture(f64([[0.5, -1.0]]), f64([[0.7, 0.2]]))
    pred = exact(points(T), T, {})
    close(pred.v, want(points(T), T))
    assert not pred.v.requires_grad
    with torch.no_grad():
        generator.mean.add_(1.0)
        generator.scale.add_(1.0)
    close(exact(points(T), T, {}).v, pred.v)


def test_numbers_keep_their_digits() -> None:
    network: Any = mixture_teacher([[0.3, 0.1], [0.7, 0.2]], [0.1, 0.3], weights=[0.3, 0.7]).denoiser.network  # type: ignore[arg-type]
    close(network.means, f64([[0.3, 0.1], [0.7, 0.2]]), atol=0)
    close(network.log_weights.exp(), f64([0.3, 0.7]), atol=1e-15)
    network = gaussian_teacher([0.3], 0.7).denoiser.network
    assert float(network.stds) == 0.7 and float(network.means) == 0.3
