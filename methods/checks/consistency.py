"""Exact checks of consistency."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.distances import distance
from diffdistill.core.prediction import OUTPUTS, diffuse, edm_boundary
from diffdistill.core.schedule import EDM, TrigFlow
from diffdistill.exact.analytic import AffinePerAngle, GaussianMixture
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient, two_points
from diffdistill.methods.consistency import Config, Consistency, Step
from diffdistill.players.teacher import Teacher

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "distillation": {
        "mode": "distillation",
        "grid": "native",
        "grid_points": 18,
        "solver": "heun",
        "loss_weight": "uniform",
        "distance": "huber",
        "huber_c": 0.0008,
        "target_ema": 0.95,
        "student_steps": 1,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "steps": 2000,
    },
    "from data": {
        "mode": "training",
        "grid": "native",
        "start_scales": 10,
        "end_scales": 80,
        "ramp_steps": 2000,
        "loss_weight": "uniform",
        "distance": "huber",
        "huber_c": 0.03,
        "target_ema": 0.9,
        "student_lr": 0.001,
        "steps": 3000,
    },
    "easy, from data": {
        "mode": "easy",
        "time_mean": 0.3,
        "time_std": 1.6,
        "stage_steps": 400,
        "stage_factor": 2.0,
        "huber_c": 0.03,
        "student_lr": 0.001,
        "steps": 3000,
    },
}


class _Gaussian:
    """A Gaussian teacher, an affine student per angle, and the exact moments of what the loss sees.

    In VE coordinates x_t/cos(t) = mu + s z + sigma eps every map here is mu + k (x_t/cos(t) - mu).
    """

    mu, s = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.0]).double()

    def __init__(self, config: Config, t_max: float = 1.5):
        schedule = TrigFlow(t_max=t_max)
        exact = Denoiser(GaussianMixture(self.mu[None], self.s[None]), schedule, OUTPUTS["v_prediction"])
        teacher = Teacher(exact, (2,))
        start = Denoiser(AffinePerAngle(torch.zeros(1), 2), schedule, OUTPUTS["sample"])
        self.angles = Consistency(teacher, config, student=start).grid(0)
        self.network = AffinePerAngle(self.angles, 2)
        self.method = Consistency(teacher, config, student=Denoiser(self.network, schedule, OUTPUTS["sample"]))
        self.sigma = torch.tan(self.angles)[:, None]

    def copy_to_target(self) -> None:
        for p, q in zip(self.method.target.parameters(), self.network.parameters(), strict=True):
            p.data.copy_(q.data)

    def slopes(self) -> Tensor:
        """(N - 1, 2) k of the student at each point of the grid but the last."""
        return self.network.slope.detach()[:-1] * torch.cos(self.angles[:-1])[:, None]

    def pairs(self, fresh: bool = False) -> tuple[Tensor, ...]:
        """x_t, x_r (N - 1, B, 2), t, r (N - 1, B) at each interval; `fresh`: x_t is x_r with more noise, drawn anew."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * (6 if fresh else 4))
        z, eps, *more = signs.split(2, 1)
        count, size = len(self.angles) - 1, len(signs)
        t, r = (angles[:, None].expand(count, size).flatten() for angles in (self.angles[:-1], self.angles[1:]))
        x0, eps = (self.mu + self.s * z).repeat(count, 1), eps.repeat(count, 1)
        if fresh:
            x_r = diffuse(x0, r, eps)
            extra = (torch.tan(t) ** 2 - torch.tan(r) ** 2).sqrt()[:, None] * more[0].repeat(count, 1)
            x_t = torch.cos(t)[:, None] * (x_r / torch.cos(r)[:, None] + extra)
        else:
            x_t = diffuse(x0, t, eps)
            x_r = self.method.less_noisy(x_t, x0, eps, Step(t, r), {})
        return tuple(v.unflatten(0, (count, size)) for v in (x_t, x_r, t, r))

    def pair(self, i: int) -> list[Tensor]:
        return [v[i] for v in self.pairs()]

    def minimise(self, fresh: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and gradient after each point was fitted to the ones below it, from the last to the first."""
        x_t, x_r, t, r = self.pairs(fresh)
        for i in reversed(range(len(t))):
            self.network.fit(i, x_t[i], self.method.target_x0(x_r[i], r[i], {}))
            self.copy_to_target()
        x_t, x_r, t, r = (v.flatten(0, 1) for v in (x_t, x_r, t, r))
        loss = self.method.following(x_t, x_r, Step(t, r), {}).loss
        return loss, gradient(loss, self.network.slope, self.network.offset)

    def factors(self, solver: str) -> Tensor:
        """(N - 1, 2) what one step of the solver multiplies x_t/cos(t) - mu by."""
        t, r = self.sigma[:-1], self.sigma[1:]
        h, a_t, a_r = r - t, t / (self.s**2 + t**2), r / (self.s**2 + r**2)
        euler = 1 + h * a_t
        heun = 1 + h / 2 * (a_t + a_r * euler)
        if solver == "heun_x0":
            heun = r / t + (1 - r / t) / 2 * (1 - t * a_t + (1 - r * a_r) * euler)
        return euler if solver == "euler" else torch.where(r == 0, euler, heun)

    def products(self, factors: Tensor) -> Tensor:
        return factors.flip(0).cumprod(0).flip(0)

    def flow(self) -> Tensor:
        """(N - 1, 2) the same of the exact map to the grid's end."""
        return torch.sqrt((self.s**2 + self.sigma[-1] ** 2) / (self.s**2 + self.sigma[:-1] ** 2))


def verify() -> Iterator[Check]:
    """Section 1.1's sanity items and rows 4 and 15 of Appendix B, on a Gaussian."""
    for grid in ("karras", "native"):
        for solver in ("euler", "heun", "heun_x0"):
            yield from _fixed_point(Config(grid=grid, solver=solver, grid_points=12, distance="l2"))
    for solver, order in (("euler", 1.0), ("heun", 2.0), ("heun_x0", 2.0)):
        errors = []
        for n in (60, 120):
            game = _Gaussian(Config(solver=solver, grid_points=n, distance="l2"))  # type: ignore[arg-type]
            game.minimise()
            errors.append((game.slopes()[0] - game.flow()[0]).norm())
        yield equal(
            f"order in which it tends to the exact map, {solver}", order, torch.log2(errors[0] / errors[1]), 0.03
        )
    yield from _off_the_optimum()
    yield from _training()
    yield from _easy()
    yield from _boundary_and_dropout()
    yield from _sampler()


def _fixed_point(config: Config) -> Iterator[Check]:
    """The student becomes the product of the solver's steps, and the loss is zero there."""
    game = _Gaussian(config)
    label = f"{config.solver}, {config.grid} grid"
    loss, slope = game.minimise()
    yield equal(
        f"product of the step factors, {label}", game.products(game.factors(config.solver)), game.slopes(), 1e-10
    )
    yield equal(f"the loss there is zero, {label}", 0.0, loss, 1e-20, scale=1.0)
    yield equal(f"its gradient there is zero, {label}", 0.0, slope, 1e-10, scale=1.0)
    products = game.products(game.factors(config.solver))
    other = replace(config, solver="heun" if config.solver == "euler" else "euler")
    for name, mistaken in (("the other solver", other), ("a teacher asked at another level", config)):
        wrong = _Gaussian(mistaken)
        if mistaken is config:
            wrong.method.teacher = at_half_the_angle(wrong.method.teacher)
        wrong.minimise()
        yield differs(f"{name} is caught, {label}", products, wrong.slopes(), 1e-4)

    pure = _Gaussian(config, t_max=math.pi / 2)
    loss, _ = pure.minimise()
    yield equal(f"from pure noise the loss reaches zero too, {label}", 0.0, loss, 1e-20, scale=1.0)
    if config.solver == "euler":  # x_r = cos(r) mu + sin(r) x_t from t = pi/2
        onward = pure.products(pure.factors("euler")[1:])[0] * pure.sigma[1]
        yield equal(f"and the first slope is the second's times tan(r), {label}", onward, pure.network.slope[0], 1e-10)


def _off_the_optimum() -> Iterator[Check]:
    """Value and gradient against their closed forms, with a target that differs from the student."""
    game = _Gaussian(Config(solver="euler", grid_points=6, distance="l2"))
    d, n, mu = 2, len(game.angles), game.mu
    generator = torch.Generator().manual_seed(0)
    for p in (*game.method.student.parameters(), *game.method.target.parameters()):
        p.data = torch.randn(n, d, generator=generator, dtype=torch.float64)
    network, target = game.network, game.method.target.network
    assert isinstance(target, AffinePerAngle)
    factors, cos = game.factors("euler"), torch.cos(game.angles)
    for i in (1, n - 2):
        last = i == n - 2
        x_t, x_r, t, r = game.pair(i)
        loss = game.method.following(x_t, x_r, Step(t, r), {}).loss
        # online - target = slope (s z + sigma eps) + rest in VE coordinates
        a, b = (1 / cos[-1], 0.0) if last else (target.slope[i + 1], target.offset[i + 1])
        slope = network.slope[i] * cos[i] - a * cos[i + 1] * factors[i]
        rest = network.slope[i] * cos[i] * mu + network.offset[i] - a * cos[i + 1] * mu - b
        square = game.s**2 + game.sigma[i] ** 2
        label = "at the last interval" if last else "inside the grid"
        yield equal(f"squared l2 {label}", (slope**2 * square + rest**2).mean(), loss, 1e-10)
        expected = torch.zeros(2, n, d, dtype=torch.float64)
        expected[0, i] = 2 / d * cos[i] * (slope * square + rest * mu)
        expected[1, i] = 2 / d * rest
        got = gradient(loss, network.slope, network.offset)
        yield equal(f"its gradient, through the noisier point alone, {label}", expected, got, 1e-10)
        for name, wrong in (("x_r for x_t", (x_r, x_r, Step(t, r))), ("r for t", (x_t, x_r, Step(r, r)))):
            loss = game.method.following(*wrong, {}).loss
            yield differs(f"{name} is caught, {label}", expected, gradient(loss, network.slope, network.offset), 1e-6)

    x_t, x_r, t, r = game.pair(1)
    gap = network.slope[1] * x_t + network.offset[1] - target.slope[2] * x_r - target.offset[2]
    root = torch.sqrt(gap.square().sum(1) + 0.3**2)
    weight = 1 / (game.sigma[1] - game.sigma[2])
    for name, factor in (("uniform", torch.ones(1).double()), ("inverse_step", weight)):
        config = Config(solver="euler", grid_points=6, huber_c=0.3, loss_weight=name)  # type: ignore[arg-type]
        other = _Gaussian(config).method
        other.student, other.target = game.method.student, game.method.target
        loss = other.following(x_t, x_r, Step(t, r), {}).loss
        yield equal(f"pseudo-Huber, {name}", factor * (root - 0.3).mean(), loss, 1e-10)
        expected = torch.zeros(n, d, dtype=torch.float64)
        expected[1] = factor * (gap / root[:, None]).mean(0)
        yield equal(f"its gradient, {name}", expected, gradient(loss, network.offset), 1e-10)
    wide = EDM()
    in_data = distance("huber", (2,), wide.data_std, 0.3)
    root = torch.sqrt((wide.data_std * gap).square().sum(1) + 0.3**2) - 0.3
    yield equal("c counts in the data's units", root, in_data(gap, torch.zeros_like(gap)), 1e-12)

    before = [p.detach().clone() for p in target.parameters()]
    game.method.after_step(0)
    for name, old, new, now in zip("ab", before, network.parameters(), target.parameters(), strict=True):
        yield equal(f"the target's moving average, {name}", 0.95 * old + 0.05 * new, now, 1e-12)


def _training() -> Iterator[Check]:
    """Consistency training: biased at finite N, and with noise drawn anew it shrinks to the posterior mean."""
    errors = []
    for n in (20, 40):
        game = _Gaussian(Config(mode="training", start_scales=n, end_scales=n, distance="l2"))
        loss, slope = game.minimise()
        k = torch.cat([game.slopes(), torch.ones(1, 2)])  # of the grid's end too
        s2, t, r = game.s**2, game.sigma[:-1], game.sigma[1:]
        least = k[1:] ** 2 * (s2 + r**2 - (s2 + t * r) ** 2 / (s2 + t**2))
        yield equal(f"the least loss of training, N = {n}", least.mean(), loss, 1e-10)
        mistaken = _Gaussian(Config(mode="training", start_scales=n, end_scales=n, distance="l2"))
        mistaken.method.from_teacher = True
        yield differs(f"a teacher's step in training is caught, N = {n}", least.mean(), mistaken.minimise()[0], 1e-3)
        yield equal(f"its gradient is zero, N = {n}", 0.0, slope, 1e-10, scale=1.0)
        yield equal(f"its slopes, N = {n}", game.products((s2 + t * r) / (s2 + t**2)), game.slopes(), 1e-10)
        errors.append((game.slopes()[0] - game.flow()[0]).norm())
    yield equal("its bias is of order 1/N", 1.0, torch.log2(errors[0] / errors[1]), 0.1)
    _, slope = game.minimise(fresh=True)
    s2 = game.s**2
    posterior = (s2 + game.sigma[-1] ** 2) / (s2 + game.sigma[:-1] ** 2)
    yield equal("with noise drawn anew the slopes are the posterior mean's", posterior, game.slopes(), 1e-10)
    yield equal("where the gradient is zero", 0.0, slope, 1e-10, scale=1.0)
    yield differs("so that noise drawn anew is caught: they are not the ODE's", game.flow(), game.slopes(), 0.1)

    method = _Gaussian(Config(mode="training", ramp_steps=100, start_scales=2, end_scales=150)).method
    counts = [float(method.points(k)) for k in (0, 25, 100, 1000)]
    quarter = math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    yield equal(
        "N(k) at k = 0, K/4, K and after", torch.tensor([2.0, quarter, 151.0, 151.0]), torch.tensor(counts), 0.0
    )
    decays = [method.target_decay(k) for k in (0, 100)]
    expected = [0.95, math.exp(2 * math.log(0.95) / 151)]
    yield equal("mu(k) at k = 0 and K", torch.tensor(expected).double(), torch.tensor(decays).double(), 1e-12)
    yield equal("the grid has N(k) points", 151.0, float(len(method.grid(100))), 0.0)


def _easy() -> Iterator[Check]:
    """Easy consistency tuning: how r follows t, and a target that is the network itself."""
    game = _Gaussian(Config(mode="easy", stage_steps=10, huber_c=0.3))
    method = game.method
    sigma = torch.tensor([0.01, 0.5, 3.0, 14.0]).double()
    t = torch.atan(sigma)
    for step, ratio in ((0, 0.5), (25, 0.875), (10_000, 0.999)):
        expected = (sigma - sigma * (1 - ratio) * (1 + 8 / (1 + torch.exp(-sigma).reciprocal()))).clamp_min(0)
        yield equal(f"r of t at step {step}", expected, torch.tan(method.easy_partner(t, step)), 1e-12)
    network = game.network
    with torch.no_grad():
        network.slope.fill_(0.4)
        network.offset.add_(torch.tensor([0.1, -0.2]))
    x_t, x_r, t, r = game.pair(1)
    for name, r_now in (("r > 0", r), ("r = 0", torch.zeros_like(r))):
        target = x_r if name == "r = 0" else 0.4 * x_r + network.offset[2]
        gap = (0.4 * x_t + network.offset[1] - target).detach()
        root, weight = torch.sqrt(gap.square().sum(1) + 0.09), 1 / (torch.tan(t) - torch.tan(r_now))
        loss = method.following(x_t, x_r, Step(t, r_now), {}).loss
        yield equal(f"easy: the weighted pseudo-Huber loss, {name}", (weight * (root - 0.3)).mean(), loss, 1e-10)
        slopes = torch.zeros_like(network.offset)
        slopes[1] = (weight[:, None] * gap / root[:, None]).mean(0)
        yield equal(f"easy: no gradient through the target, {name}", slopes, gradient(loss, network.offset), 1e-10)
    for where, solver_point in (("data", False), ("teacher", True)):
        other = _Gaussian(Config(mode="easy", easy_from=where)).method  # type: ignore[arg-type]
        z, eps = two_points(2)
        x0, t = game.mu + game.s * z, torch.full((16,), 0.9).double()
        x_t, r = diffuse(x0, t, eps), torch.full((16,), 0.7).double()
        got = other.less_noisy(x_t, x0, eps, Step(t, r), {})
        factor = 1 + (torch.tan(r) - torch.tan(t)) * torch.tan(t) / (1 + torch.tan(t) ** 2)
        euler = torch.cos(r) * (game.mu[1] + factor * (x_t[:, 1] / torch.cos(t) - game.mu[1]))
        shared = torch.cos(r) * x0[:, 1] + torch.sin(r) * eps[:, 1]
        yield equal(f"easy: x_r from {where}", euler if solver_point else shared, got[:, 1], 1e-12)


def _boundary_and_dropout() -> Iterator[Check]:
    """At the end of the grid f is the identity in sigma's coordinates, as the paper's c_skip and c_out make it."""
    schedule = EDM(unit_init=False, time_scale=250.0)

    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double()

    def without_time(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return module(x)

    x, _ = two_points(2)
    end = torch.full((len(x),), schedule.t_min, dtype=torch.float64)
    sigma = schedule.data_std * torch.tan(end)[:, None]
    native = x * torch.sqrt(sigma**2 + schedule.data_std**2) / schedule.data_std
    for name, row in (("paper's", edm_boundary(schedule.sigma_min)), ("plain", OUTPUTS["edm"])):
        teacher = Teacher(Denoiser(network(), schedule, row, call=without_time), (2,))
        method = Consistency(teacher, Config(grid_points=5))
        label = f"with EDM's {name} c_skip and c_out"
        yield equal(f"the target at sigma_min is x itself, {label}", native, method.target_x0(x, end, {}), 1e-12)
        own = method.target(x, end, {}).x0
        if name == "paper's":
            yield equal("which that c_skip and c_out say as well", native, own, 1e-9)
        else:
            yield differs("which plain EDM does not say", native, own, 1e-6)
    easy = Consistency(teacher, Config(mode="easy"))
    t = torch.full((len(x),), 1.0).double()
    loss = easy.image_distance(easy.student(x, t, {}).x0, easy.target_x0(x, t, {})).mean()
    yield differs("a network drops other units at each pass", 0.0, loss, 1e-3, scale=1.0)
    loss = easy.following(x, x, Step(t, t), {}, seed=7).shown["distance"]
    yield equal("and the same ones in both passes of the loss", 0.0, loss, 1e-12, scale=1.0)


def _sampler() -> Iterator[Check]:
    """With the exact map to t = 0 the renoising sampler has the marginal's variance at each of its levels."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
    z, first, second = signs.split(2, 1)
    for grid, excess in (("native", 0.0), ("karras", math.tan(math.atan(0.002 / 0.5)) ** 2)):
        # A teacher of standard deviation 1 at t = 1.5 is one whose x_t is z itself.
        game = _Gaussian(Config(grid=grid, student_steps=3))  # type: ignore[arg-type]
        game.mu, game.s = torch.zeros(2).double(), torch.ones(2).double()
        levels = torch.tensor(game.method.sampler().levels).double()
        network = AffinePerAngle(levels, 2)
        end = excess + game.s**2
        slopes = torch.sqrt(end / (game.s**2 + torch.tan(levels)[:, None] ** 2)) / torch.cos(levels)[:, None]
        network.slope.data = slopes
        game.method.student = Denoiser(network, game.method.schedule, OUTPUTS["sample"])
        sampler, sigma2 = game.method.sampler(), torch.tan(levels) ** 2
        variance = 1 + sigma2[0]  # of x_t/cos(t); s^2 + sigma^2 is exact, and the end's own noise stays in it
        for k in (1, 2):
            x, t = sampler.input_at(k, z, {}, lambda j: (first, second)[j - 1])
            variance = end * variance / (1 + sigma2[k - 1]) + sigma2[k]
            got = (x.square().mean(0) - x.mean(0) ** 2) / torch.cos(t[0]) ** 2
            yield equal(f"variance at level {k} of the sampler, {grid} grid", variance, got, 1e-9)
            if grid == "native":
                yield equal(f"which is the marginal's, level {k}", 1 + sigma2[k].expand(2), got, 1e-9)
