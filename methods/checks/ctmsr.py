"""Exact checks of ctmsr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffinePerAngle
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.ctmsr import CTMSR, Config
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "consistency training": {
        "start_scales": 10,
        "end_scales": 120,
        "ramp_steps": 4000,
        "kappa": 1.0,
        "consistency_steps": 4500,
        "matching_steps": 0,
        "huber_c": 0.1,
        "student_lr": 0.001,
        "steps": 4500,
    },
}

MU, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
REAL: dict[str, Any] = {name: getattr(CTMSR, name) for name in ("grid", "matching", "judged")}


class Beside(nn.Module):
    """x0 that is affine in x_t, apart at each angle of a list, and in the image that is read beside it."""

    def __init__(self, angles: Tensor):
        super().__init__()
        self.affine = AffinePerAngle(angles, 2)
        self.image = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """(B, 2) x0."""
        return self.affine(x_t, t) + self.image * image


@dataclass(frozen=True)
class Step(Batch):
    """A batch whose samples are all in one step of the grid."""

    index: int = 0

    def integers(self, n: int, purpose: str) -> Tensor:
        """That step's number; of the matching's points the first."""
        return torch.full((self.size,), self.index if purpose == "student/t" else 0)

    def randn(self, purpose: str) -> Tensor:
        """All signs."""
        return two_points(2)[1]


class _Game:
    """A Gaussian of samples, an image beside each, and a student that is affine at each angle."""

    def __init__(self, n: int = 3, **options: Any):
        own: dict[str, Any] = {"start_scales": n, "end_scales": n, "distance": "l2", "matching_steps": 2, **options}
        schedule, config = TrigFlow(), Config(**{"consistency_steps": 10, "renew_every": 4, **own})

        def made(angles: Tensor) -> CTMSR:
            student = Denoiser(Beside(angles), schedule, OUTPUTS["sample"])
            return CTMSR(Teacher(student, (2,)), config, student=student)

        self.n, self.config = n, config
        self.grid = made(torch.zeros(1)).grid(n)
        self.method = made(self.grid)
        self.network: Any = self.method.student.network
        self.z, self.eps = two_points(2)
        self.x0, self.y = MU + STD * self.z, 0.5 * self.z.flip(0) - 0.2
        self.cond = {"image": self.y}

    def randomise(self, seed: int = 0) -> None:
        """Other weights of the student, and of the judge, which are not the same."""
        draw = torch.Generator().manual_seed(seed)
        for player in (self.method.student, self.method.judge):
            for p in player.parameters():
                p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)

    def batch(self, i: int) -> Step:
        return Step(len(self.z), (2,), self.cond, self.x0, torch.device("cpu"), (0, 0, 0), index=i)

    def loss(self, i: int, step: int = 0) -> Tensor:
        return self.method.student_turn(step, self.batch(i)).loss

    def said(self, player: Denoiser, i: int, x: Tensor) -> Tensor:
        """f of samples x (B, 2), noised to the i-th angle, written out."""
        f: Any = player.network
        t = self.grid[i]
        x_t = torch.cos(t) * x + torch.sin(t) * self.eps
        return f.affine.slope[i] * x_t + f.affine.offset[i] + f.image * self.y


def verify() -> Iterator[Check]:
    """Section 8.6, by the authors' code, on a Gaussian."""
    yield from _trajectories()
    yield from _consistency()
    yield from _matching()
    yield from _stages()


def _trajectories() -> Iterator[Check]:
    """The authors' x_eta less eta y is what the network reads here."""
    for kappa in (1.0, 2.0):
        game = _Game(4, kappa=kappa)
        for k in range(4):
            eta = 1 - k / 4
            theirs = (1 - eta) * game.x0 + eta * game.y + kappa * eta * game.eps
            ours = kappa * eta / torch.sin(game.grid[k]) * diffuse(game.x0, game.grid[k].expand(16), game.eps)
            yield equal(f"point {k} of the trajectories, kappa = {kappa:g}", theirs - eta * game.y, ours, 1e-12)
    yield equal("they end in the sample", 0.0, game.grid[-1], 1e-15, scale=1.0)
    even = torch.linspace(float(game.grid[0]), 0, 5)
    yield differs("evenly spaced angles are others", game.grid, even, 1e-2)


def _consistency() -> Iterator[Check]:
    """The loss in each step, its minimum, and where that leads with many steps."""
    game = _Game()
    game.randomise()
    for i in range(3):
        own = game.said(game.method.student, i, game.x0)
        target = game.said(game.method.student, i + 1, game.x0).detach() if i < 2 else game.x0
        closed = (own - target).square().mean()
        loss, parameters = game.loss(i), list(game.network.parameters())
        yield equal(f"consistency loss, step {i}", closed, loss, 1e-12)
        yield equal(f"its gradient, step {i}", gradient(closed, *parameters), gradient(loss, *parameters), 1e-12)
        both = game.said(game.method.student, i + 1, game.x0) if i < 2 else game.said(game.method.student, 3, game.x0)
        wrong = gradient((own - both).square().mean(), *parameters)
        yield differs(
            f"... of both sides, or of f as its own end, is another, step {i}", wrong, gradient(loss, *parameters), 1e-2
        )
    errors = []
    for n in (40, 80):
        game = _Game(n)
        network = game.network
        for i in reversed(range(n)):
            x_t = diffuse(game.x0, game.grid[i].expand(16), game.eps)
            target = game.said(game.method.student, i + 1, game.x0) if i < n - 1 else game.x0
            network.affine.fit(i, x_t, target.detach())
        losses = torch.stack([game.loss(i) for i in range(n)])
        yield equal(f"each fitted to the next is the minimum, {n} steps", 0.0,
                    gradient(losses.sum(), network.affine.slope, network.affine.offset), 1e-10, scale=1.0)  # fmt: skip
        errors.append((network.affine.slope[0] - STD).norm())  # the exact map from pure noise is MU + STD eps
    yield equal("order in which it tends to the exact map", 1.0, torch.log2(errors[0] / errors[1]), 0.1)


def _matching() -> Iterator[Check]:
    """What the judge tells samples from images by, as the authors' code has it."""
    game = _Game()
    game.randomise()
    judge, at = game.method.judge, 2  # of 3 steps the authors' range has eta = 1/3 alone
    x = (0.8 * game.eps + game.y).requires_grad_()
    told = game.said(judge, at, x) - game.said(judge, at, game.x0)
    weight = 1 / (x - game.x0).abs().mean(1)
    closed = 0.5 * (weight.detach() * (x - (x - told).detach()).square().mean(1)).mean()
    loss = game.method.matching(3, x, game.batch(0))
    yield equal("matching loss", closed, loss, 1e-12)
    slope = gradient(loss, x)
    yield equal("its gradient", gradient(closed, x), slope, 1e-12)
    network: Any = judge.network
    factor = torch.cos(game.grid[at]) * network.affine.slope[at]
    linear = weight[:, None] * factor * (x - game.x0) / (2 * len(x))
    yield equal("of a linear judge it is what x misses, times its slope", linear, slope, 1e-12)

    def fresh(self: CTMSR, x: Tensor, t: Tensor, eps: Tensor, cond: Any) -> Tensor:
        return REAL["judged"](self, x, t, eps if x is game.x0 else eps.flip(0), cond)

    for name, owner, part, wrong in (
        ("two noises", CTMSR, "judged", fresh),
        ("the student as its own judge", game.method, "judge", game.method.student),
        ("without a condition", CTMSR, "judged", lambda self, x, t, eps, cond: REAL["judged"](
            self, x, t, eps, {"image": 0 * cond["image"] + x})),
        ("all points of the grid", CTMSR, "matched", lambda self, n: (n, n + 1)),
    ):  # fmt: skip
        with mistake(owner, part, wrong):
            yield differs(f"{name}: caught", closed, game.method.matching(3, x, game.batch(0)), 1e-2)
    yield from _rest(game)


def _rest(game: _Game) -> Iterator[Check]:
    """Where matching alone comes to rest: a linear judge draws all samples for an image to the images' mean."""
    with mistake(game.method.judge, "network", _ones(game)):
        for spread, check, name in ((0.0, equal, "the mean"), (1.0, differs, "what is spread as the images")):
            b = torch.full((2,), spread, dtype=torch.float64, requires_grad=True)
            x = MU + b * STD * game.eps
            slope = gradient(game.method.matching(3, x, game.batch(0)), b)
            yield check(f"matching alone rests at {name}", 0.0, slope, 1e-12 if spread == 0 else 1e-2, scale=1.0)


def _ones(game: _Game) -> Beside:
    network = Beside(game.grid)
    network.affine.slope.data.fill_(1.0)
    return network


def _stages() -> Iterator[Check]:
    """Fewer and fewer steps, matching after them, and when the judge is renewed."""
    game = _Game()
    for s0, s1 in ((4, 3), (4, 4), (2, 5)):
        config = replace(game.config, start_scales=s0, end_scales=s1, ramp_steps=120)
        with mistake(game.method, "config", config):
            seen = torch.tensor([game.method.intervals(k) for k in range(0, 150, 10)])
        each = 120 // (abs(s0 - s1) + 1)
        theirs = [max(s0 - k // each, s1) if s0 > s1 else min(s0 + k // each, s1) for k in range(0, 150, 10)]
        yield equal(f"the steps from {s0} to {s1}", torch.tensor(theirs).double(), seen.double(), 0.0)
    game.randomise()
    before, begun = game.loss(0, 9), game.loss(0, 10)
    with torch.no_grad():
        matched = game.method.matching(3, game.said(game.method.student, 0, game.x0), game.batch(0))
    yield equal("matching begins after the first stage", game.config.matching_weight * matched, begun - before, 1e-10)
    renewed = []
    for step in range(5, 18):
        game.randomise(step)
        game.method.after_step(step)
        parameters = zip(game.method.judge.parameters(), game.network.parameters(), strict=True)
        renewed.append(float(all(torch.equal(p, q) for p, q in parameters)))
    expected = torch.tensor([0.0] * 4 + [1.0, 0, 0, 0] * 2 + [1.0])
    yield equal("the judge is the student's from steps 10, 14 and 18 on", expected, torch.tensor(renewed), 0.0)
    for n in (3, 4, 8, 20):
        points = max(1, int(0.1 * (n + 1))), min(n + 1, int(0.5 * (n + 1)))
        ours = torch.tensor(game.method.matched(n)).double()
        yield equal(f"which points of {n} are matched", torch.tensor(points).double(), ours, 0.0)
