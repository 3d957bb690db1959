"""Exact checks of pso."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.errors import UserError
from diffdistill.exact.analytic import AffinePerAngle, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods import pso
from diffdistill.methods.pso import PSO, Config, pso_loss
from diffdistill.players.sampler import Gamma, Renoise, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch

ANGLES = (math.pi / 2, 1.1, 0.6)
"""Three levels: two steps with fresh noise and a last one."""


def verify() -> Iterator[Check]:
    """Likelihoods of Gaussian steps, and what one pair and many pairs do to an affine student."""
    yield from _likelihood_checks()
    yield from _loss_checks()
    for preferences in ("reward", "pairs"):
        yield from _gradient_checks(preferences)
    for what, found in (("one step", _refused(1)), ("steps without noise", _refused(3, "ddim"))):
        yield equal(f"{what} has no likelihood, which is said", 1.0, float(found), 0.0)


class _Pairs(Batch):
    """Two dimensions; the noise of two ways as all signs in the first, all else zero but where a way begins."""

    def randn(self, purpose: str) -> Tensor:
        """(16, 2): the noise of levels 1 and 2 of ways a and b, or of given pairs, whose noise is one."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
        column = {"a z 1": 0, "b z 1": 1, "a z 2": 2, "b z 2": 3, "z 1": 0, "z 2": 1}.get(purpose)
        noise = torch.zeros(16, 2, dtype=torch.float64)
        if column is not None:
            noise[:, 0] = signs[:, column]
        return noise


def _game(move: str = "renoise", levels: int = 3, **options: Any) -> tuple[PSO, AffinePerAngle]:
    """A student x0 = slope x_t + offset at each level, in two dimensions, and itself as the reference."""
    teacher = gaussian_teacher([0.0, 0.0], 1.0)
    schedule = teacher.denoiser.schedule

    def network() -> AffinePerAngle:
        net = AffinePerAngle(torch.tensor(ANGLES, dtype=torch.float64), 2)
        net.slope.data[:] = torch.tensor([[0.3, 0.2], [0.7, 0.5], [1.1, 0.9]]).double()
        net.offset.data[:] = torch.tensor([[0.2, -0.1], [0.1, 0.3], [0.0, 0.2]]).double()
        return net

    own = network()
    reference = Teacher(
        Denoiser(network(), schedule, OUTPUTS["sample"]), (2,), levels=ANGLES[:levels], move=move
    )  # fmt: skip
    method = PSO(reference, Config(**options), student=Denoiser(own, schedule, OUTPUTS["sample"]))
    method.reward = lambda x, batch: x[:, 0].detach()
    return method, own


def _refused(levels: int, move: str = "renoise") -> bool:
    try:
        _game(move, levels)
    except UserError as error:
        return "has no likelihoods" in str(error)
    return False


def _likelihood_checks() -> Iterator[Check]:
    """log pi/pi_ref of a step is the difference of two normal log densities, its mean over dimensions."""
    t, s = (torch.full((5,), angle, dtype=torch.float64) for angle in ANGLES[:2])
    x_t, x_s = torch.randn(2, 5, 2, dtype=torch.float64)
    for step in (Renoise(), Gamma(0.4)):
        method, own = _game()
        method.step = step
        own.offset.data[0] += torch.tensor([0.2, -0.3])
        leads = Sampler(method.student, ANGLES, step).leads(0)
        kept = 1.0 if isinstance(step, Renoise) else float(torch.cos(s[0]) / torch.cos(leads))
        std = float(torch.sin(s[0])) if isinstance(step, Renoise) else math.sqrt(1 - kept**2)

        predicted = [denoiser(x_t, t, {}) for denoiser in (method.student, method.reference)]
        means = [torch.cos(s)[:, None] * each.x0 for each in predicted]
        if isinstance(step, Gamma):
            means = [kept * (torch.cos(leads) * each.x0 + torch.sin(leads) * each.eps) for each in predicted]
        density = [torch.distributions.Normal(mean, std).log_prob(x_s).mean(1) for mean in means]
        closed = density[0] - density[1]
        got = method.log_ratio(x_t, x_s, 0, {})
        name = type(step).__name__
        yield equal(f"log likelihood ratio of a step, {name}", closed, got, 1e-9)
        with mistake(pso, "per_sample_mean", lambda x: x.flatten(1).sum(1)):
            yield differs(f"a sum over dimensions is caught, {name}", closed, method.log_ratio(x_t, x_s, 0, {}), 1e-2)
        other = method.log_ratio(x_t, x_s, 1, {})
        yield differs(f"another level's step is caught, {name}", closed, other, 1e-2)
        with mistake(method, "reference", method.student):
            yield equal(
                f"zero where the student is the reference, {name}", 0.0, method.log_ratio(x_t, x_s, 0, {}), 1e-12
            )


def _loss_checks() -> Iterator[Check]:
    zero, ratio = torch.zeros(2, 3).double(), torch.tensor([[0.02, -0.05, 0.08]]).double()
    better = torch.tensor([1.0, -1.0, 0.0]).double()
    yield equal("log 2 where the student is the reference", math.log(2), pso_loss(zero, zero, better, 50.0, 0.1), 1e-12)
    closed = torch.log1p(torch.exp(-50 * better * (ratio - 0.5 * ratio))).mean()
    yield equal(
        "-log sigmoid(beta (log rho_w - log rho_l))", closed, pso_loss(ratio, 0.5 * ratio, better, 50.0, 0.1), 1e-9
    )
    swapped = pso_loss(0.5 * ratio, ratio, better, 50.0, 0.1)
    yield differs("winner and loser swapped are caught", closed, swapped, 1e-2)
    for name, value, slope in (("above 1 + eps", 0.2, 0.0), ("below 1 - eps", -0.2, 0.0), ("within", 0.05, 1.0)):
        first = torch.full((1, 1), value, dtype=torch.float64, requires_grad=True)
        got = gradient(pso_loss(first, torch.zeros(1, 1).double(), torch.ones(1).double(), 50.0, 0.1), first)
        yield equal(f"a ratio {name} has {'a' if slope else 'no'} gradient", slope, float(bool(got != 0)), 0.0)


def _gradient_checks(preferences: str) -> Iterator[Check]:
    """Where the student is the reference: dL/dx0 = -beta/2 cot(s) E[h (eps_a - eps_b)]/d at each step.

    With the noise of a level in one dimension alone, x0_1 = .. + 1.1 (sin(s_2) eps_2 + cos(s_2) 0.7 sin(s_1) eps_1) is
    what the reward sees. Given pairs have one noise: their step's noise is that and what their x0 differs by.
    """
    method, own = _game(preferences=preferences, clip=0.5, beta=3.0)
    winners, losers = (torch.tensor(row).double().expand(16, 2) for row in ([0.4, -0.2], [-0.3, 0.5]))
    batch = _Pairs(16, (2,), {}, winners, torch.device("cpu"), (0, 0, 0), losers=losers)
    outcome = method.student_turn(0, batch)
    got = gradient(outcome.loss, own.offset).view(3, 2)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    closed = torch.zeros(3, 2, dtype=torch.float64)
    for k, s in enumerate(ANGLES[1:]):
        if preferences == "reward":
            cos, sin = (torch.tensor(ANGLES[1:]).double().cos(), torch.tensor(ANGLES[1:]).double().sin())
            ends = [sin[1] * signs[:, 2 + way] + cos[1] * 0.7 * sin[0] * signs[:, way] for way in (0, 1)]
            h, noise = torch.sign(ends[0] - ends[1]), signs[:, 2 * k] - signs[:, 2 * k + 1]
            closed[k, 0] = -(3.0 / 2) * (h * noise).mean() / math.tan(s) / 2 / 2  # two dimensions, two steps
        else:
            closed[k] = -(3.0 / 2) * _given(winners, losers, k, s) / 2 / 2
    name = "of a reward's pairs" if preferences == "reward" else "of given pairs"
    yield equal(f"the gradient {name} at the reference", closed, got, 1e-9)
    yield equal(f"the loss {name} there is log 2", math.log(2), outcome.loss, 1e-12)
    with mistake(pso, "pso_loss", lambda first, second, better, *rest: pso_loss(first, second, -better, *rest)):
        wrong = gradient(method.student_turn(0, batch).loss, own.offset)
    yield differs(f"the worse preferred is caught, {name}", closed, wrong, 1e-2)
    moved = _game(preferences=preferences, clip=0.5, beta=3.0)
    moved[1].offset.data -= 0.05 * got
    margin = moved[0].student_turn(0, batch)
    yield equal(f"a step against it makes the better likelier, {name}", 1.0, float(margin.shown["margin"] > 0), 0.0)


def _given(winners: Tensor, losers: Tensor, k: int, s: float) -> Tensor:
    """(2,) cot(s)^2 (x0_w - m_w - x0_l + m_l): the noise of both is one, and m = slope x_t + offset."""
    slope = torch.tensor([[0.3, 0.2], [0.7, 0.5]]).double()[k]
    read = math.cos(ANGLES[k]) * (winners[0] - losers[0])
    return (winners[0] - losers[0] - slope * read) / math.tan(s) ** 2
