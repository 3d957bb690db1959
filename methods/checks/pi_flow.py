"""Exact checks of pi_flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.policies import Mixture, Nodes
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.analytic import GaussianMixture, gaussian_teacher, mixture_teacher
from diffdistill.exact.checks import Check, differs, equal, mistake
from diffdistill.exact.policies import TOP, batch_at, imitation_checks, known_student, loss_at, noise
from diffdistill.methods.pi_flow import Config, PiFlow
from diffdistill.players.policy import PolicyDenoiser

_SHARED = {"student_lr": 0.002, "guidance_scale": 1.5, "steps": 800}
# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one pass": {**_SHARED, "student_steps": 1, "substeps": 32},
    "two passes": {**_SHARED, "student_steps": 2, "substeps": 16},
    "four passes": {**_SHARED, "student_steps": 4, "substeps": 8},
}

MEANS = torch.tensor([[0.7, -0.4], [-1.1, 0.6], [0.2, 1.2]]).double()
WEIGHTS, STD = torch.tensor([0.5, 0.3, 0.2]).double(), 0.4
X0: Any = Mixture.x0


class Posterior(nn.Module):
    """What the mixture's x0 given x_t is, a mixture of the same Gaussians, as a network's wide output."""

    def __init__(self, means: Tensor, weights: Tensor):
        super().__init__()
        self.means, self.log_weights = nn.Parameter(means.clone()), nn.Parameter(weights.log())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 3 K + 1) means, logits and the logarithm of the width over sin(t)."""
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        total, var = cos**2 * STD**2 + sin**2, STD**2 * sin**2 / (cos**2 * STD**2 + sin**2)
        off = x_t[:, None] - cos[..., None] * self.means
        means = self.means + (cos * STD**2 / total)[..., None] * off
        logits = self.log_weights - off.square().sum(2) / (2 * total)
        return torch.cat([means.flatten(1), logits, (var.sqrt() / sin).log()], 1)


def _game(keep: int = 3, **options: Any) -> PiFlow:
    """The exact teacher, and the student whose policies are exact with all of its Gaussians."""
    teacher = mixture_teacher(MEANS, STD, WEIGHTS)
    config = Config(components=keep, **{"student_steps": 2, "substeps": 12, **options})
    network, schedule = Posterior(MEANS[:keep], WEIGHTS[:keep]), teacher.denoiser.schedule
    plain = Denoiser(network, schedule, OUTPUTS["sample"])
    return PiFlow(teacher, config, student=known_student(plain, "mixture", keep, config))


def verify() -> Iterator[Check]:
    """A mixture's policy is exact at any x, its passes are the teacher's steps, and imitation is at rest there."""
    yield from _policy_checks()
    yield from _sampling_checks()
    yield from _loss_checks()
    yield from _window_checks()
    yield from _node_checks()
    yield from _option_checks()


def _policy_checks() -> Iterator[Check]:
    """The velocity is the teacher's, also where no path leads."""
    game, off = _game(), 2 * batch_at().randn("off").double()

    def policy(s: float) -> Any:
        return game.student(noise(), torch.full((40,), s).double(), {}).policy

    for s in (TOP, 0.8):
        for t in (s, 0.6 * s, 0.05):
            at = torch.full((40,), t, dtype=torch.float64)
            exact = game.teacher(off, at, {}).v
            if t < s:
                yield equal(
                    f"velocity of a mixture's policy from {s:.2f} at {t:.2f}, anywhere",
                    exact,
                    policy(s).v(off, at),
                    1e-9,
                )
            x_s = policy(s).x_s
            yield equal(f"... and at {t:.2f} of its own point", game.teacher(x_s, at, {}).v, policy(s).v(x_s, at), 1e-9)
        at = torch.full((40,), 0.6 * s).double()
        exact = game.teacher(off, at, {}).v
        for name, changed in (
            ("x_s forgotten", lambda p: replace(p, x_s=0 * p.x_s)),
            ("weights that stay", lambda p: replace(p, logits=0 * p.logits)),
            ("a width in units of the data", lambda p: replace(p, s=p.s * 0 + TOP)),
            ("a wide mixture", lambda p: replace(p, log_std=p.log_std + 0.5)),
        ):
            if s == TOP and name != "weights that stay" and name != "a wide mixture":
                continue  # at pure noise x_s says nothing, and sin(s) is 1
            yield differs(f"{name} are caught, from {s:.2f}", exact, changed(policy(s)).v(off, at), 1e-2)


def _sampling_checks() -> Iterator[Check]:
    """Any number of passes is the teacher's DDIM with as many steps as the policies take in all."""
    teacher, z = mixture_teacher(MEANS, STD, WEIGHTS), noise()
    grid = TOP * (1 - torch.arange(25).double() / 24)
    closed = solve(ddim_step, teacher.denoiser, z, grid, {})
    for passes in (1, 2, 4):
        sampler = _game(student_steps=passes, substeps=24 // passes).sampler()
        x, t = sampler.input_at(passes - 1, z, {}, lambda j: z)
        yield equal(f"{passes} passes are the teacher's 24 steps", closed, sampler.denoiser(x, t, {}).x0, 1e-10)
    fewer = _game(student_steps=1, substeps=12).sampler()
    yield differs("half as many steps are not", closed, fewer.one_step(z, {}), 1e-3)
    short = _game(keep=2, student_steps=1, substeps=24).sampler()
    yield differs("... nor is a mixture with a Gaussian too few", closed, short.one_step(z, {}), 1e-2)


def _loss_checks() -> Iterator[Check]:
    """At the exact policies there is no loss and no gradient, whoever leads."""
    yield from imitation_checks(_game, "policies", 1e-6)
    game = _game(keep=2)
    yield differs("a mixture with a Gaussian too few has a loss", 0.0, loss_at(game), 1e-3, scale=1.0)
    game = _game()
    with mistake(Mixture, "x0", lambda self, x, t: X0(replace(self, x_s=0 * self.x_s), x, t)):
        losses = torch.stack([loss_at(game, step) for step in range(6)])  # from both levels
        yield differs("policies that forget where they began are caught", 0.0, losses.max(), 1e-3, scale=1.0)
    game = _game()
    with (
        mistake(PolicyDenoiser, "ends", lambda self, t: 0 * t),
        mistake(PiFlow, "dropped", lambda self, p, b: replace(p, s=p.s * 0 + 1.0)),
    ):
        yield differs(
            "a policy that takes another angle for its beginning is caught", 0.0, loss_at(game), 1e-3, scale=1.0
        )


def _window_checks() -> Iterator[Check]:
    """A velocity averaged over a window is not the teacher's at its beginning: the loss has a floor."""
    floors = [loss_at(_game(student_steps=1, substeps=n, window=3)) for n in (64, 128)]
    yield differs("a window of three steps has a loss at the optimum", 0.0, floors[0], 1e-5, scale=1.0)
    yield equal("... which falls by 4 for steps half as long", 4.0, floors[0] / floors[1], 0.15)
    game = _game(student_steps=1, substeps=64, window=3)
    x, t = noise(), torch.full((40,), 1.0).double()
    policy = game.student(x, torch.full((40,), TOP).double(), {}).policy
    h, said, y = TOP / 64, [], x
    for k in range(3):
        at = t - k * h
        v = game.teacher(y, at, {}).v
        said.append(v)
        y = ddim_step(game.teacher, y, at, at - h, {})
    yield equal("it is the mean along the policy's own steps", sum(said) / 3, game.velocity(policy, x, t), 1e-9)


def _node_checks() -> Iterator[Check]:
    """Values on the way are of second order in their distance, and exact at the nodes."""
    teacher = gaussian_teacher([0.7, -0.4], 0.5)
    z, density = noise(), GaussianMixture([[0.7, -0.4]], 0.5)
    s, e = torch.full((40,), TOP).double(), torch.full((40,), 0.1).double()

    def exact(t: Tensor) -> tuple[Tensor, Tensor]:
        """x on the teacher's path, and x0 there."""
        x = density.flow_map(z, s, t)
        return x, teacher.denoiser(x, t, {}).x0

    def nodes(n: int) -> Nodes:
        places = [torch.lerp(e, s, k / (n - 1)) for k in range(n)]
        return Nodes(z, s, e, torch.stack([exact(t)[1] for t in places], 1))

    for k in range(5):
        x, x0 = exact(torch.lerp(e, s, k / 4))
        yield equal(f"x0 at node {k} of 5", x0, nodes(5).x0(x, torch.lerp(e, s, k / 4)), 1e-12)
    errors = []
    for n in (9, 17, 33):
        between = [(*exact(t), t) for t in (torch.lerp(e, s, (k + 0.5) / (n - 1)) for k in range(n - 1))]
        errors.append(torch.stack([(nodes(n).x0(x, t) - x0).square().mean() for x, x0, t in between]).mean().sqrt())
    for k, n in enumerate((9, 17)):
        name = f"the error between nodes falls by 4 from {n} to {2 * n - 1}"
        yield equal(name, 4.0, errors[k] / errors[k + 1], 0.15)
    turned = Nodes(z, s, e, nodes(5).values.flip(1))
    x, x0 = exact(e)
    yield differs("nodes the other way round are caught", x0, turned.x0(x, e), 1e-2)


def _option_checks() -> Iterator[Check]:
    """Gaussians are left out by their share, and never all; the teacher's share of the path falls to none."""
    game = _game(component_dropout=0.3)
    batch = batch_at(size=4000)
    policy = game.student(batch.randn("z").double(), torch.full((4000,), TOP).double(), {}).policy
    dropped = game.dropped(policy, batch)
    assert isinstance(dropped, Mixture)
    out = dropped.logits < -1e6
    closed = 0.3 - 0.3**3 / 3  # of three with all below 0.3 one stays
    yield equal("the share of Gaussians that are left out", closed, out.double().mean(), 0.05)
    yield equal("samples without any", 0.0, (out.sum(1) == 3).double().sum(), 0.0)
    game = _game(teacher_share=0.8, mixing_steps=100)
    got = torch.tensor([game.share(step) for step in (0, 50, 100, 150)])
    yield equal("the teacher's share of the path", torch.tensor([0.8, 0.4, 0.0, 0.0]), got, 1e-6)
