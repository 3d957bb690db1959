"""What is known in closed form of students that jump along the trajectories of a guided Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.ode import inverse_ddim
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.exact.analytic import AffinePerAngle, class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.players import scale_input
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import EdgeAdversary
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.segments import Jump, SegmentMethod

Make = Callable[[Teacher, Denoiser], SegmentMethod]
REAL: dict[str, Any] = {"guide": scale_input.guide, "jumped": SegmentMethod.jumped}


class AffineStudent(torch.nn.Module):
    """`AffinePerAngle` under a class label, which it does not hear."""

    def __init__(self, angles: Tensor):
        super().__init__()
        self.affine = AffinePerAngle(angles, 2)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 2) x0."""
        return self.affine(x_t, t)


class Jumps:
    """A class and "no class" of one variance: a guided step multiplies x_t - cos(t) mu_a by a factor, and keeps mu_a.

    The student's x0 is affine in x_t, with its own coefficients at each angle of the method's grid.
    """

    means, s = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()

    def __init__(self, make: Make, scale: float):
        self.teacher = class_gaussians_teacher(self.means, self.s)
        schedule = self.teacher.denoiser.schedule

        def of(angles: Tensor) -> Denoiser:
            return Denoiser(AffineStudent(angles), schedule, OUTPUTS["sample"])

        self.grid = make(self.teacher, of(torch.zeros(1))).grid
        self.method = make(self.teacher, of(self.grid[:-1]))
        self.method.target = self.method.student  # which a slow copy comes to be
        self.affine: AffinePerAngle = self.method.student.network.affine  # type: ignore[assignment]
        self.scale, self.mu = scale, self.means[1] + scale * (self.means[0] - self.means[1])
        self.z, self.eps = two_points(2)
        self.cond = {"class_labels": torch.zeros(len(self.z), dtype=torch.int64)}

    def each(self, value: float | Tensor) -> Tensor:
        """(B,) the same for all samples."""
        return torch.as_tensor(value, dtype=torch.float64).expand(len(self.z))

    def at(self, i: int, step: int = 0, x0: Tensor | None = None) -> tuple[Tensor, Tensor, Jump]:
        """x_t and x_r (B, 2) of the teacher's i-th step, of data x0, and the jump that the method makes there."""
        x0 = self.means[0] + self.s * self.z if x0 is None else x0
        index = torch.full((len(self.z),), i)
        batch = Batch(len(self.z), (2,), self.cond, x0, torch.device("cpu"), (0, step, 0))
        top, e = self.method.ends(step, index, batch)
        jump = Jump(self.grid[index], self.grid[index + 1], top, e, self.each(self.scale))
        x_t = diffuse(x0, jump.t, self.eps)
        return x_t, self.method.less_noisy(x_t, x0, self.eps, jump, self.cond), jump

    def loss(self, i: int, step: int = 0) -> Tensor:
        """That of the i-th step."""
        return self.method.following(*self.at(i, step), self.cond).loss

    def minimise(self, step: int = 0) -> None:
        """Fits each angle to where its target jumps, from the least noise upwards."""
        for i in reversed(range(len(self.grid) - 1)):
            x_t, x_r, at = self.at(i, step)
            with torch.no_grad():
                x_e = self.method.jump(self.method.target, x_r, at.r, at.e, self.cond)
            self.affine.fit(i, x_t, inverse_ddim(x_e, x_t, at.t, at.e))

    def factor(self, i: int, j: int) -> Tensor:
        """(2,) what the teacher's steps from the i-th angle of the grid to the j-th multiply by."""
        cos, sin = torch.cos(self.grid)[:, None], torch.sin(self.grid)[:, None]
        each = (cos[1:] * cos[:-1] * self.s**2 + sin[1:] * sin[:-1]) / (cos[:-1] ** 2 * self.s**2 + sin[:-1] ** 2)
        return each[i:j].prod(0)

    def landing(self, i: int, step: int = 0) -> tuple[Tensor, Tensor]:
        """Where the student jumps from the i-th angle, and where the teacher's steps lead to, both (B, 2)."""
        x_t, _, at = self.at(i, step)
        j = int((self.grid - at.e[0]).abs().argmin())
        closed = torch.cos(at.e)[:, None] * self.mu + self.factor(i, j) * (x_t - torch.cos(at.t)[:, None] * self.mu)
        return self.method.jump(self.method.student, x_t, at.t, at.e, self.cond), closed


def fixed_point_checks(
    make: Make, scale: float, label: str, step: int = 0, kind: type[Jumps] = Jumps
) -> Iterator[Check]:
    """At the fixed point the student's jumps are the products of the guided teacher's steps, and the loss is zero."""
    jumps = kind(make, scale)
    jumps.minimise(step)
    n = len(jumps.grid) - 1
    losses = torch.stack([jumps.loss(i, step) for i in range(n)])
    yield equal(f"the loss at the fixed point is zero, {label}", 0.0, losses.sum(), 1e-15, scale=1.0)
    slope = gradient(losses.sum(), jumps.affine.slope, jumps.affine.offset)
    yield equal(f"... and its gradient, {label}", 0.0, slope, 1e-8, scale=1.0)
    for i in (0, n // 2, n - 1):
        got, closed = jumps.landing(i, step)
        yield equal(f"from step {i} it jumps where the teacher's steps lead, {label}", closed, got, 1e-10)
    more: Any = lambda *at: REAL["guide"](*at[:-1], 1 + at[-1])  # noqa: E731
    with mistake(scale_input, "guide", more):
        jumps.minimise(step)
        yield differs(f"... and elsewhere if the scale is 1 + a, {label}", closed, jumps.landing(n - 1, step)[0], 1e-2)


def loss_checks(make: Make, scale: float, label: str, step: int = 0, kind: type[Jumps] = Jumps) -> Iterator[Check]:
    """Value and gradient against their closed forms, at random parameters."""
    jumps, draw = kind(make, scale), torch.Generator().manual_seed(0)
    config, affine = jumps.method.config, jumps.affine
    for p in affine.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    for i in (0, len(jumps.grid) // 2):
        x_t, x_r, at = jumps.at(i, step)
        sin, share = torch.sin(at.t - at.e) / torch.sin(at.t), torch.sin(at.e) / torch.sin(at.t)
        with torch.no_grad():
            own = affine.slope[i] * x_t + affine.offset[i]
            x0_r = affine.slope[i + 1] * x_r + affine.offset[i + 1] if i + 2 < len(jumps.grid) else x_r
            low = torch.sin(at.r - at.e) / torch.sin(at.r), torch.sin(at.e) / torch.sin(at.r)
            target = low[0][:, None] * x0_r + low[1][:, None] * x_r if bool((at.r > at.e).all()) else x_r
            gap = sin[:, None] * own + share[:, None] * x_t - target
            c = config.huber_c
            value = gap.square() if config.distance == "l2" else torch.sqrt(gap**2 + c**2) - c
            pull = 2 * gap if config.distance == "l2" else gap / torch.sqrt(gap**2 + c**2)
            expected = torch.zeros(2, *affine.slope.shape, dtype=torch.float64)
            expected[0, i] = (pull * sin[:, None] * x_t).mean(0) / 2  # of two dimensions
            expected[1, i] = (pull * sin[:, None]).mean(0) / 2
        loss = jumps.method.following(x_t, x_r, at, jumps.cond).loss
        yield equal(f"the loss, step {i}, {label}", value.mean(), loss, 1e-9)
        got = gradient(loss, affine.slope, affine.offset)
        yield equal(f"its gradient, through the noisier point alone, step {i}, {label}", expected, got, 1e-9)
        with mistake(torch, "no_grad", nullcontext):
            through = gradient(jumps.method.following(x_t, x_r, at, jumps.cond).loss, affine.slope, affine.offset)
        last = bool((at.r <= at.e).all())
        if not last:  # whose target is x_r itself
            yield differs(f"a gradient through the target is caught, step {i}, {label}", expected, through, 1e-3)
        for name, wrong in (
            ("x_r for x_t", (x_r, x_r, at)),
            ("the end of the whole trajectory", (x_t, x_r, at._replace(e=0 * at.e))),
            ("t for r", (x_t, x_r, at._replace(r=at.t))),
        ):
            if bool((wrong[2].e == at.e).all()) and wrong[0] is x_t and last:
                continue
            if name.startswith("the end") and bool((at.e == 0).all()):
                continue
            got = gradient(jumps.method.following(*wrong, jumps.cond).loss, affine.slope, affine.offset)
            yield differs(f"{name} is caught, step {i}, {label}", expected, got, 1e-6)


def reward_checks(make: Make, scale: float, last: int, kind: type[Jumps] = Jumps) -> Iterator[Check]:
    """With -|x - a|^2 as the reward of weight w, the squared distance leads to (x + w a)/(1 + w) of the target x.

    `make` gives a method of distance l2 whose last stage has begun at the training step `last`, and not one before.
    """
    jumps, a = kind(make, scale), torch.tensor([1.5, -0.3]).double()
    method, i = jumps.method, len(jumps.grid) - 2
    method.reward = lambda x, batch, gradient=False: -(x if gradient else x.detach()).sub(a).square().mean(1)
    w = float(method.config.reward_weight)

    def pull(step: int) -> Tensor:
        x_t, x_r, at = jumps.at(i, step)
        followed = method.following(x_t, x_r, at, jumps.cond)
        batch = Batch(len(x_t), (2,), jumps.cond, None, torch.device("cpu"), (0, step, 0))
        return gradient(method.whole_loss(followed, batch).loss, jumps.affine.slope, jumps.affine.offset)

    def settle(step: int, share: float) -> None:
        x_t, x_r, _ = jumps.at(i, step)
        jumps.affine.fit(i, x_t, (x_r + share * a) / (1 + share))

    settle(last, w)
    yield equal("a reward's minimum is between the target and its own", 0.0, pull(last), 1e-9, scale=1.0)
    settle(last, -w)
    yield differs("... and not on its other side", 0.0, pull(last), 1e-2, scale=1.0)
    settle(last, 0.0)
    yield differs("... nor at the target", 0.0, pull(last), 1e-2, scale=1.0)
    settle(last - 1, 0.0)
    yield equal("before the last stage it is the target", 0.0, pull(last - 1), 1e-9, scale=1.0)


class _KnownHeads(EdgeAdversary):
    """The method's own adversary with a discriminator that is a plane in the noised sample."""

    slope = torch.tensor([0.4, -1.1]).double()

    def __init__(self, teacher: Teacher):
        self.teacher, self.ends = teacher.denoiser, {}

    def read(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """(1, B)."""
        return (x_t @ self.slope)[None]


def edge_checks() -> Iterator[Check]:
    """Of the discriminator at the ends: what it reads, and both players' losses and gradients."""
    teacher = class_gaussians_teacher(Jumps.means, Jumps.s)
    heads, n = _KnownHeads(teacher), 4096
    z, eps = two_points(2)
    e, t = torch.full((len(z),), 0.5).double(), torch.full((len(z),), 1.1).double()
    mu, var = Jumps.means[0], torch.cos(e[0]) ** 2 * Jumps.s**2 + torch.sin(e[0]) ** 2
    x_e = torch.cos(e[0]) * mu + var.sqrt() * z
    seen: list[Tensor] = []
    with mistake(heads, "read", lambda x, *rest: seen.append(x) or x[:, 0][None]):  # type: ignore[func-returns-value]
        heads.logits(x_e, e, t, eps, {})
    closed = torch.cat([torch.cos(t[0]) * mu, torch.cos(t[0]) ** 2 * Jumps.s**2 + torch.sin(t[0]) ** 2])
    moments = torch.cat([seen[0].mean(0), seen[0].var(0, correction=0)])
    yield equal("samples of the data at e, noised to t, are samples of the data at t", closed, moments, 1e-12)
    with mistake(heads, "read", lambda x, *rest: seen.append(x) or x[:, 0][None]):  # type: ignore[func-returns-value]
        heads.logits(x_e, 0 * e, t, eps, {})
    moments = torch.cat([seen[1].mean(0), seen[1].var(0, correction=0)])
    yield differs("... and are not if they are noised as clean ones", closed, moments, 1e-2)
    batch = Batch(n, (2,), {}, None, torch.device("cpu"), (0, 3, 0))
    low, high = torch.full((n,), 0.3).double(), torch.full((n,), 0.9).double()
    levels = heads.level("student/gan", low, high, batch)
    inside = float(((levels >= low) & (levels <= high)).all())
    yield equal("levels lie between the end and the segment's noisiest", 1.0, inside, 0.0)
    yield equal("... uniformly", torch.tensor([0.6, 0.6 / 12**0.5]), torch.stack([levels.mean(), levels.std()]), 0.03)
    fake, real = (torch.randn(n, 2, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
    fake.requires_grad_()
    loss = heads.student_loss(fake, real, low, high, batch)
    kept = torch.cos(levels) / torch.cos(low)
    noised = kept[:, None] * fake + torch.sqrt(1 - kept**2)[:, None] * batch.randn("student/gan eps")
    margin = 1 - noised @ heads.slope
    yield equal("the student's loss is the hinge of its own samples", margin.clamp_min(0).mean(), loss, 1e-12)
    pull = -(margin > 0).double()[:, None] * kept[:, None] * heads.slope / n
    yield equal("... and its gradient", pull, gradient(loss, fake).reshape(n, 2), 1e-9)
    shown = heads.turn(batch).loss
    levels = heads.level("discriminator/gan", low, high, batch)
    kept = torch.cos(levels) / torch.cos(low)
    noise = [batch.randn(f"discriminator/gan eps {kind}") for kind in ("real", "fake")]
    d = [(kept[:, None] * x + torch.sqrt(1 - kept**2)[:, None] * eps) @ heads.slope
         for x, eps in zip((real, fake), noise, strict=True)]  # fmt: skip
    closed = (1 - d[0]).clamp_min(0).mean() + (1 + d[1]).clamp_min(0).mean()
    yield equal("the discriminator takes the targets for real", closed, shown, 1e-12)
    swapped = (1 + d[0]).clamp_min(0).mean() + (1 - d[1]).clamp_min(0).mean()
    yield differs("... and not the student's ends", closed, swapped, 1e-3)
    yield equal("nothing is kept after its turn", 0.0, float(len(heads.ends)), 0.0)
