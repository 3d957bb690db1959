"""Exact checks of arc_flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step
from diffdistill.core.policies import Momenta
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, mistake
from diffdistill.exact.policies import TOP, batch_at, imitation_checks, known_student, loss_at, noise
from diffdistill.methods.arc_flow import ArcFlow, Config
from diffdistill.players.teacher import Teacher

_SHARED = {"student_lr": 0.002, "guidance_scale": 1.5, "steps": 800, "momenta": 8}
# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one pass": {**_SHARED, "student_steps": 1, "substeps": 32},
    "two passes": {**_SHARED, "student_steps": 2, "substeps": 16},
}

MOMENTA = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.2, 1.2]]).double()
RATES = torch.tensor([0.0, 1.5, -2.0]).double()
ROLL: Any = Momenta.roll


def time(t: Tensor) -> Tensor:
    """The flow's time."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def moved(t: Tensor, r: Tensor) -> Tensor:
    """(B, 2) the integral of the velocity from time 1 on, sum m exp(rate (1 - time)), from t (B,) down to r (B,)."""
    a, b = (1 - time(t))[:, None, None], (1 - time(r))[:, None, None]
    rate = RATES[None, :, None]
    safe = torch.where(rate == 0, 1.0, rate)
    each = torch.where(rate == 0, b - a, (torch.exp(safe * b) - torch.exp(safe * a)) / safe)
    return (MOMENTA[None] * each).sum(1)


class Field(nn.Module):
    """The x0 of a flow whose velocity is that, anywhere."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2)."""
        tau = time(t)[:, None]
        u = (MOMENTA[None] * torch.exp(RATES[None, :, None] * (1 - tau)[:, None])).sum(1)
        return x_t / (torch.cos(t) + torch.sin(t))[:, None] - tau * u


class Passes(nn.Module):
    """The momenta from any x_t on, as a network's wide output; three of one weight, so that each counts three times."""

    def __init__(self) -> None:
        super().__init__()
        self.momenta, self.rates = nn.Parameter(MOMENTA.clone()), nn.Parameter(RATES.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2 K + 2 K)."""
        cos, sin = torch.cos(t)[:, None, None], torch.sin(t)[:, None, None]
        m = 3 * self.momenta * torch.exp(self.rates[None] * (1 - time(t))[:, None])[..., None]
        x0 = (x_t[:, None] - sin * m) / (cos + sin)
        return torch.cat([x0.flatten(1), torch.zeros(len(t), 3).to(x0), self.rates.expand(len(t), 3)], 1)


def _game(**options: Any) -> ArcFlow:
    schedule, network = TrigFlow(), Passes()
    teacher = Teacher(Denoiser(Field(), schedule, OUTPUTS["sample"]), (2,), None, "analytic", "field")
    config = Config(momenta=3, **{"student_steps": 2, "substeps": 12, **options})
    plain = Denoiser(network, schedule, OUTPUTS["sample"])
    return ArcFlow(teacher, config, student=known_student(plain, "momenta", 3, config))


def verify() -> Iterator[Check]:
    """The integral is a closed form, one momentum is Euler's step, and imitation is at rest where it is exact."""
    yield from _integral_checks()
    yield from _sampling_checks()
    yield from _loss_checks()
    yield from _fit_checks()


def _policy(s: float) -> Any:
    return _game().student(noise(), torch.full((40,), s, dtype=torch.float64), {}).policy


def _integral_checks() -> Iterator[Check]:
    """From any x, and from anywhere on the way."""
    x = 2 * batch_at().randn("off").double()
    for s, t, r in ((TOP, TOP, 0.0), (TOP, 1.1, 0.4), (0.9, 0.6, 0.5), (0.9, 0.5, 0.4999)):
        a, b = torch.full((40,), t, dtype=torch.float64), torch.full((40,), r, dtype=torch.float64)
        start = x / (torch.cos(a) + torch.sin(a))[:, None]
        closed = (torch.cos(b) + torch.sin(b))[:, None] * (start - moved(a, b))
        got = _policy(s).roll(x, a, b, 1)
        yield equal(f"where a pass from {s:.2f} leads, {t:.2f} to {r:.2f}", closed, got, 1e-12)
        if s - r > 0.5:
            for name, change in (
                ("rates of the other sign", {"rates": -_policy(s).rates}),
                (
                    "a pass that takes another angle for its beginning",
                    {"s": torch.full((40,), s - 0.3, dtype=torch.float64)},
                ),
            ):
                wrong = replace(_policy(s), **change).roll(x, a, b, 1)
                yield differs(f"{name}: caught, from {s:.2f}", closed, wrong, 1e-2)
    a, b = torch.full((40,), 1.1, dtype=torch.float64), torch.full((40,), 0.4, dtype=torch.float64)
    euler = ddim_step(_game().teacher, x, a, b, {})
    first: Any = _game().student(x, a, {}).policy
    still = replace(first, rates=0 * first.rates)
    yield equal("rates of zero are the Euler step", euler, still.roll(x, a, b, 1), 1e-12)
    yield differs("... and rates are not", euler, first.roll(x, a, b, 1), 1e-3)
    small = [replace(first, rates=first.rates * scale) for scale in (9.9e-3, 1.01e-2)]  # on both sides of the series
    steps = [policy.roll(x, a, b, 1) - still.roll(x, a, b, 1) for policy in small]
    yield equal("a small rate moves in proportion", steps[1] / 1.01e-2, steps[0] / 9.9e-3, 1e-3)


def _sampling_checks() -> Iterator[Check]:
    """Whatever the number of passes."""
    z, top, end = noise(), torch.full((40,), TOP, dtype=torch.float64), torch.zeros(40).double()
    closed = z - moved(top, end)
    for passes in (1, 2, 4):
        sampler = _game(student_steps=passes).sampler()
        x, t = sampler.input_at(passes - 1, z, {}, lambda j: z)
        yield equal(f"{passes} passes are the flow's own end", closed, sampler.denoiser(x, t, {}).x0, 1e-12)


def _loss_checks() -> Iterator[Check]:
    """At the exact momenta there is no loss and no gradient, whoever leads."""
    yield from imitation_checks(_game, "momenta", 1e-5)
    game = _game()
    with mistake(Momenta, "_before", lambda self, t: torch.ones_like(self.rates)):
        yield differs("momenta that stay are caught", 0.0, loss_at(game), 1e-3, scale=1.0)
    with mistake(Momenta, "roll", lambda self, x, t, r, n: ROLL(self, x, self.s, r, n)):
        yield differs("a second step from the beginning is caught", *_second(), 1e-3)
    yield equal("where a second step leads", *_second(), 1e-12)
    window = loss_at(_game(student_steps=1, substeps=64, window=3))
    yield differs("a window of three steps has a loss at the optimum", 0.0, window, 1e-5, scale=1.0)


def _second() -> tuple[Tensor, Tensor]:
    """Where a path comes to in two steps, in closed form and as it is followed."""
    x, s = noise(), torch.full((40,), TOP, dtype=torch.float64)
    policy = _game().student(x, s, {}).policy
    a, b = torch.full((40,), 1.2, dtype=torch.float64), torch.full((40,), 0.5, dtype=torch.float64)
    exact = (torch.cos(b) + torch.sin(b))[:, None] * (x - moved(s, b))
    return exact, policy.roll(policy.roll(x, s, a, 1), a, b, 1)


def _fit_checks() -> Iterator[Check]:
    """A Gaussian teacher's velocity is no sum of exponentials: what is left falls with their number."""
    s, density = torch.full((1,), TOP, dtype=torch.float64), GaussianMixture([[0.7, -0.4]], 0.5)
    teacher, z = gaussian_teacher([0.7, -0.4], 0.5), torch.tensor([[1.3, -0.8]]).double()
    u = []
    places = torch.linspace(0.02, TOP, 60).double()
    for t in places:
        x = density.flow_map(z, s, t[None])
        x0 = teacher.denoiser(x, t[None], {}).x0
        u.append((x / (torch.cos(t) + torch.sin(t)) - x0) / time(t))
    velocity, left = torch.cat(u), []
    for k in (1, 2, 4):
        rates = torch.tensor([0.0, 2.0, 4.0, 6.0]).double()[:k]
        basis = torch.exp(rates * (1 - time(places))[:, None])
        fitted = basis @ torch.linalg.lstsq(basis, velocity).solution
        left.append((fitted - velocity).norm() / velocity.norm())
    yield differs("one momentum leaves some of a Gaussian's velocity", 0.0, left[0], 1e-2, scale=1.0)
    yield equal("two leave less than a tenth of that", 0.0, left[1] / left[0], 0.1, scale=1.0)
    yield equal("four leave less than a fifth of what two do", 0.0, left[2] / left[1], 0.2, scale=1.0)
