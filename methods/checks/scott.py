"""Exact checks of scott."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_eta_step, ddim_step
from diffdistill.core.prediction import OUTPUTS, Prediction, diffuse
from diffdistill.exact.analytic import AffinePerAngle, gaussian_teacher
from diffdistill.exact.checks import Check, at_half_the_angle, differs, equal, gradient, mistake, two_points
from diffdistill.methods.scott import Config, SCott, Walk
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "solver_steps": 64,
        "skip": 2,
        "sde_steps": 2,
        "eta": 0.02,
        "guidance_scale": 1.5,
        "distance": "huber",
        "huber_c": 0.001,
        "target_ema": 0.95,
        "steps": 2500,
        "student_lr": 0.001,
    },
}

MU, S = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()


class _Gaussian:
    """A Gaussian teacher and a student that is affine at each angle of the grid; so is its slow copy."""

    def __init__(self, **options: Any):
        teacher = gaussian_teacher(MU.tolist(), S)
        schedule = teacher.denoiser.schedule

        def of(angles: Tensor) -> Denoiser:
            return Denoiser(AffinePerAngle(angles, 2), schedule, OUTPUTS["sample"])

        config = Config(**{"solver_steps": 8, "skip": 1, "sde_steps": 1, **options})
        self.grid = SCott(teacher, config, student=of(torch.zeros(1))).grid
        self.method = SCott(teacher, config, student=of(self.grid[:-1]))
        self.own: Any = self.method.student.network
        self.slow: Any = self.method.target.network
        self.z, self.eps = two_points(2)
        self.x0 = MU + S * self.z

    def walk(self, i: int, noise: Tensor | None = None) -> tuple[Tensor, Walk]:
        """x_t (16, 2) at the i-th angle, and the way down from there."""
        c, n = self.method.config, len(self.z)
        places = [min(i + k * c.skip // c.sde_steps, c.solver_steps) for k in range(c.sde_steps + 1)]
        path = self.grid[places][:, None].expand(-1, n)
        noise = torch.zeros(c.sde_steps, n, 2).double() if noise is None else noise
        at = Walk(path[0], path, noise)
        return diffuse(self.x0, at.t, self.eps), at

    def slopes(self) -> Tensor:
        """(N, 2) those of the student that is fitted to its target, from the least noise upwards; z has mean 0."""
        for i in reversed(range(len(self.grid) - 1)):
            x_t, at = self.walk(i)
            x_r = self.method.less_noisy(x_t, self.x0, self.eps, at, {})
            r = at.path[-1]
            with torch.no_grad():
                target = x_r if float(r[0]) == 0 else self.method.target(x_r, r, {}).x0
            for network in (self.own, self.slow):
                network.fit(i, x_t, target)
        return self.own.slope.detach()


def verify() -> Iterator[Check]:
    """Section 1.7's sanity items, and the mistakes that they must catch."""
    yield from _steps()
    yield from _slope()
    yield from _loss()
    yield from _ways()


def _steps() -> Iterator[Check]:
    """eta = 1 is DDPM's posterior, eta = 0 DDIM, and samples of the data stay samples."""
    game = _Gaussian()
    teacher, n = game.method.teacher, len(game.z)
    t, s, z = torch.full((n,), 1.1, dtype=torch.float64), torch.full((n,), 0.6, dtype=torch.float64), game.z.flip(0)
    x_t = diffuse(game.x0, t, game.eps)
    pred = teacher(x_t, t, {})
    abar, before = math.cos(1.1) ** 2, math.cos(0.6) ** 2
    alpha = abar / before
    mean = math.sqrt(before) * (1 - alpha) / (1 - abar) * pred.x0 + math.sqrt(alpha) * (1 - before) / (1 - abar) * x_t
    variance = (1 - alpha) * (1 - before) / (1 - abar)
    yield equal("eta 1 is DDPM's step", mean + math.sqrt(variance) * z, ddim_eta_step(pred, s, 1.0, z), 1e-12)
    yield equal("eta 0 is DDIM's", ddim_step(teacher, x_t, t, s, {}), ddim_eta_step(pred, s, 0.0, z), 1e-12)
    yield differs("... and eta 1 is not", mean + math.sqrt(variance) * z, ddim_eta_step(pred, s, 0.0, z), 1e-2)
    end = ddim_eta_step(pred, 0 * s, 1.0, z)
    yield equal("at clean data there is no noise", pred.x0, end, 1e-12)
    known = Prediction(x_t, t, game.x0, torch.ones_like(t), torch.zeros_like(t))  # whose x0 is the data's
    for eta in (0.0, 0.3, 1.0):
        moved = torch.cat([ddim_eta_step(known, s, eta, sign * game.z.roll(1, 0)) for sign in (1, -1)])
        both = torch.cat([game.x0, game.x0])
        spread = (moved - math.cos(0.6) * both).square().mean()
        yield equal(f"the noise has the size of its level, eta {eta}", math.sin(0.6) ** 2, spread, 1e-12)


def _slope() -> Iterator[Check]:
    """From the trajectory's end to the posterior mean as eta goes from 0 to 1."""
    for steps, skip in ((8, 1), (8, 2)):
        game = _Gaussian(eta=1.0, solver_steps=steps, skip=skip, sde_steps=skip)
        cos, sin = torch.cos(game.grid)[:-1, None], torch.sin(game.grid)[:-1, None]
        mean = cos * S**2 / (cos**2 * S**2 + sin**2)
        yield equal(f"eta 1 gives E[x0 | x_t], {skip} steps of the SDE at once", mean, game.slopes(), 1e-10)
        wrong = _Gaussian(eta=1.0, solver_steps=steps, skip=skip, sde_steps=skip)
        wrong.method.guided = at_half_the_angle(wrong.method.guided)  # type: ignore[assignment]
        yield differs(f"... which a teacher asked at another level does not, {skip}", mean, wrong.slopes(), 1e-3)
    errors = []
    for steps in (100, 200):
        game = _Gaussian(eta=0.0, solver_steps=steps)
        cos, sin = torch.cos(game.grid)[:-1, None], torch.sin(game.grid)[:-1, None]
        errors.append((game.slopes() - S / torch.sqrt(cos**2 * S**2 + sin**2)).norm() / steps**0.5)
    yield equal("eta 0 tends to the trajectory's end with order 1", 1.0, torch.log2(errors[0] / errors[1]), 0.06)
    first = torch.stack([_Gaussian(eta=eta, solver_steps=50).slopes()[0, 1] for eta in (0.0, 0.3, 0.6, 1.0)])
    falls = float((first.diff() < -0.01).all())
    yield equal("in between, samples spread the less the greater eta", 1.0, falls, 0.0)


def _loss() -> Iterator[Check]:
    """Value and gradient against their closed forms, at random parameters of both networks."""
    for distance in ("l2", "huber"):
        game, draw = _Gaussian(distance=distance, huber_c=0.3, eta=0.5), torch.Generator().manual_seed(0)
        for network in (game.own, game.slow):
            for p in network.parameters():
                p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        for i in (0, 3, 7):
            x_t, at = game.walk(i, torch.randn(1, len(game.z), 2, generator=draw, dtype=torch.float64))
            x_r = game.method.less_noisy(x_t, game.x0, game.eps, at, {})
            with torch.no_grad():
                own, slow = (net.state_dict() for net in (game.own, game.slow))
                target = x_r if i == 7 else slow["slope"][i + 1] * x_r + slow["offset"][i + 1]
                gap = own["slope"][i] * x_t + own["offset"][i] - target
                root = torch.sqrt(gap**2 + 0.3**2)
                value, pull = (gap**2, 2 * gap) if distance == "l2" else (root - 0.3, gap / root)
                expected = torch.zeros(2, *own["slope"].shape, dtype=torch.float64)
                expected[0, i], expected[1, i] = (pull * x_t).mean(0) / 2, pull.mean(0) / 2
            loss, label = game.method.following(x_t, x_r, at, {}).loss, f"step {i}, {distance}"
            yield equal(f"the loss, {label}", value.mean(), loss, 1e-10)
            parameters = list(game.own.parameters())
            yield equal(f"its gradient, {label}", expected, gradient(loss, *parameters), 1e-10)
            if i == 7:  # whose target is x_r itself
                continue
            wrong = game.method.following(x_r, x_t, at._replace(t=at.path[-1], path=at.path.flip(0)), {}).loss
            yield differs(f"t and r swapped is caught, {label}", expected, gradient(wrong, *parameters), 1e-3)
            with mistake(game.method, "target", game.method.student), mistake(torch, "no_grad", nullcontext):
                through = gradient(game.method.following(x_t, x_r, at, {}).loss, *parameters)
            yield differs(f"a student that is its own target is caught, {label}", expected, through, 1e-3)


def _ways() -> Iterator[Check]:
    """From t down the grid by as many steps as are said, and no further than clean data."""
    method = _Gaussian(solver_steps=12, skip=4, sde_steps=2).method
    batch = Batch(600, (2,), {}, None, torch.device("cpu"), (0, 1, 0))
    at = method.interval(0, batch)
    i = (method.grid[None] - at.t[:, None]).abs().argmin(1)
    path = torch.stack([method.grid[(i + k).clamp(max=12)] for k in (0, 2, 4)])
    yield equal("the path", path, at.path, 0.0)
    yield equal("every t of the grid but 0 is drawn", 12.0, float(len(at.t.unique())), 0.0)
    apart = (at.noise[0] - at.noise[1]).square().mean()
    yield equal("each step has noise of its own", 2.0, apart, 0.2)
    last = i >= 10
    x_t = torch.randn(int(last.sum()), 2, dtype=torch.float64)
    end = method.less_noisy(x_t, x_t, x_t, Walk(at.t[last], at.path[:, last], at.noise[:, last]), {})
    yield equal("a way that ends early stays at clean data", method.teacher(x_t, at.t[last], {}).x0, end, 1e-10)
