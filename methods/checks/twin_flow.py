"""Exact checks of twin_flow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.losses import reweighted_square
from diffdistill.core.prediction import OUTPUTS, Prediction, diffuse
from diffdistill.core.schedule import LinearFlow, TrigFlow
from diffdistill.exact.analytic import GaussianJumps, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake
from diffdistill.methods.twin_flow import Config, TwinFlow
from diffdistill.scaffold.branches import BranchesMethod
from diffdistill.scaffold.method import Batch

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
OTHER = torch.tensor([-0.3, 0.5]).double(), torch.tensor([0.9, 0.6]).double()
REAL: dict[str, Any] = {"jump": BranchesMethod.jump, "along": BranchesMethod.along}


class Twins(nn.Module):
    """The exact jumps of a Gaussian, and for the fake branch the velocity of another; both may be off by a number."""

    def __init__(self, fake: tuple[Tensor, Tensor] = (MEAN, STD)):
        super().__init__()
        self.jumps, self.off = GaussianJumps(MEAN, STD), nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.fake = GaussianMixture(fake[0][None], fake[1][None])

    def forward(self, x_t: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        """(B, 2) the normal form's F."""
        real = self.jumps(x_t, t, t - gap.clamp_min(0) * math.pi / 2)
        return torch.where((gap < 0)[:, None], self.fake(x_t, t), real) + self.off


def _told(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
    return network(x, time, extra.gap)


def _method(network: nn.Module | None = None, **options: Any) -> TwinFlow:
    student = Denoiser(network or Twins(), TrigFlow(), OUTPUTS["v_prediction"], extra_call=_told)
    return TwinFlow(gaussian_teacher(MEAN.tolist(), STD), Config(**options), student=student)


def _batch(n: int = 64) -> Batch:
    x0 = MEAN + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Batch(n, (2,), {}, x0, torch.device("cpu"), (0, 1, 0))


def verify() -> Iterator[Check]:
    """Section 7.6's sanity items, and the mistakes that they must catch."""
    yield from _kinds()
    yield from _consistency()
    yield from _matching()
    yield from _losses()


def _kinds() -> Iterator[Check]:
    """A quarter each: from noise to data, short jumps, any, and no jump of the fake branch."""
    n = 8000
    kind, t, r = _method().drawn(_batch(n))
    for k, (mean_t, mean_gap, most) in enumerate(((1, 1, 1), (0.5, 0.0125, 0.05), (0.5, 0.25, 1), (0.5, 0, 0))):
        own = kind == k
        got = torch.stack([own.double().mean(), t[own].mean(), (t - r)[own].mean()])
        yield equal(f"the samples of kind {k}", torch.tensor([0.25, mean_t, mean_gap]), got, 0.03)
        inside = ((t - r)[own] <= most * t[own] + 1e-12).all() & (r[own] >= 0).all()
        yield equal(f"... and how far they jump at most, {k}", 1.0, float(inside), 0.0)
    seen: list[Tensor] = []

    def watched(self: Any, net: Any, x: Tensor, t: Tensor, r: Tensor, cond: Cond, fake: Any = None) -> Prediction:
        seen.append(torch.zeros_like(t) if fake is None else fake.double())
        return REAL["jump"](self, net, x, t, r, cond, fake)

    with mistake(TwinFlow, "jump", watched):
        _method(matching_weight=0.0).student_turn(_batch())
    share = torch.stack([each.mean() for each in seen[:2]])  # of its samples' making, and of what is trained
    yield equal("the fake branch is trained on its own quarter alone", torch.tensor([0, 0.25]), share, 1e-12)


def _consistency() -> Iterator[Check]:
    """With the exact jumps and the exact velocity D is nothing, of the first order in delta; near r it is u's."""
    exact, flow = GaussianMixture(MEAN[None], STD[None]), LinearFlow()
    x_t = _batch().images + 0.3
    t, r = torch.full((64,), 0.8).double(), torch.full((64,), 0.25).double()
    angle = flow.angle(t)
    v = Prediction(x_t, angle, exact(x_t, angle), -torch.sin(angle), torch.cos(angle))
    for order in (1, 2):
        gaps = []
        for delta in (0.02, 0.01):
            method = _method(delta=delta, ode_order=order)
            f = method.velocity(method.jump(method.student, x_t, t, r, {})).detach()
            gaps.append((f - method.consistent(f, method.velocity(v), x_t, t, r, {})).norm())
        yield equal(f"D is of the first order in delta, {order} jumps", 1.0, torch.log2(gaps[0] / gaps[1]), 0.1)
        yield equal(f"... and small, {order} jumps", 0.0, gaps[1] / 8, 0.05, scale=1.0)
    method = _method()
    u, f = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = method.consistent(f, u, x_t, t, t - 0.005, {})
    yield equal("within a step of r it is the velocity itself", f - (f - u).clamp(-1, 1), near, 1e-12)
    moved = Prediction(x_t, angle, u, torch.full_like(t, -1.0), torch.ones_like(t)).at(flow.angle(t - 0.01))
    here, end = flow.angle(t - 0.01), flow.angle(r)
    one, two = ((torch.sin(a) + torch.cos(a))[:, None] for a in (here, end))
    way = moved / one - exact.flow_map(moved, here, end) / two  # in the flow's own units
    closed = f - (((0.55 * f - way) / 0.01) - u).clamp(-1, 1)
    yield equal("else what is left of the way, over delta", closed, method.consistent(f, u, x_t, t, r, {}), 1e-7)
    with mistake(TwinFlow, "along", lambda self, x, t, u, s: REAL["along"](self, x, t, -u, s)):
        yield differs("a step the other way is caught", closed, method.consistent(f, u, x_t, t, r, {}), 1e-2)


def _matching() -> Iterator[Check]:
    """F_grad is u_fake - u_real where a sample is noised to, and nothing when the two branches agree."""
    batch, rows = _batch(), slice(0, 16)
    x = batch.images[rows]
    t, z = batch.uniform("student/matched t")[rows], batch.randn("student/matched eps")[rows]
    angle = LinearFlow().angle(t)
    x_t = diffuse(x, angle, z)

    def velocity(mean: Tensor, std: Tensor) -> Tensor:
        said = GaussianMixture(mean[None], std[None])(x_t, angle)
        at = Prediction(x_t, angle, said, -torch.sin(angle), torch.cos(angle))
        return at.eps - at.x0

    closed = (velocity(*OTHER) - velocity(MEAN, STD)).clamp(-1, 1)
    yield equal("F_grad", closed, _method(Twins(OTHER)).rectified(x, batch, rows), 1e-6)
    yield equal("... is zero when the branches agree", 0.0, _method().rectified(x, batch, rows), 1e-12, scale=1.0)
    off = lambda self, net, x, t, r, cond, fake=None: REAL["jump"](self, net, x, t, r, cond)  # noqa: E731
    with mistake(TwinFlow, "jump", off):
        yield differs("two real branches are caught", closed, _method(Twins(OTHER)).rectified(x, batch, rows), 1e-2)
    # The gradient of the matching alone, by the difference of the turn with it and without.
    grads = []
    for weight in (0.0, 0.7):
        method = _method(Twins(OTHER), matching_weight=weight)
        off_by: Any = method.student.network.off
        grads.append(gradient(method.student_turn(batch).loss, off_by))
    pull = _method(Twins(OTHER)).rectified(_one_step(batch)[:16], batch, slice(0, 16))
    error = pull.square().mean(1)
    counts = (error / 1.01e-6 + 1) ** -0.5 / 1e-3
    # F is the normal form's at pure noise: x0 = -off and eps = z, so that F is off by +off.
    slope = 0.7 * (counts[:, None] * 2 * pull / 2).mean(0)
    yield equal("its gradient moves samples along F_grad", slope, grads[1] - grads[0], 1e-3)


def _one_step(batch: Batch) -> Tensor:
    """The samples from the noise of the first quarter."""
    return MEAN + STD * batch.randn("student/eps").double()


def _losses() -> Iterator[Check]:
    """The weight of a sample, and of a jump; all terms at zero for a perfect network and one mode of data."""
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (x - y).square().mean(1)
    yield equal("the reweighted square", error / (error / 0.04 + 1).sqrt() / 0.2, reweighted_square(x, y, 0.2), 1e-6)
    x.requires_grad_()
    own = gradient(reweighted_square(x, y, 0.2).sum(), x).reshape(5, 3)
    closed = (2 * (x - y) / 3 / ((error / 0.04 + 1).sqrt() * 0.2)[:, None]).detach()
    yield equal("... whose weight has no gradient", closed, own, 1e-6)
    batch, method = _batch(), _method(matching_weight=0.0)
    kind, t, r = method.drawn(batch)
    z, images = batch.randn("student/eps").double(), batch.images.clone()
    images[48:] = MEAN + STD * batch.randn("student/z")[48:].double()
    x_t = diffuse(images, method.flow.angle(t), z)
    f = method.velocity(method.jump(method.student, x_t, t, r, {}, kind == 3)).detach()
    target = method.consistent(f, z - images, x_t, t, r, {})
    target[48:] = (z - images)[48:]
    weight = torch.tan((1 - (t - r)) * math.pi / 2.5) + 1
    weight[48:] = 1
    closed = (weight * reweighted_square(f, target, 1e-3)).mean()
    yield equal("the loss of all four kinds", closed, method.student_turn(batch).loss, 1e-6)
    with mistake(method, "enhanced", lambda u, *rest: u + 0.5):
        yield differs("another velocity is caught", closed, method.student_turn(batch).loss, 1e-3)
    method.after_step(0)
    with torch.no_grad():
        method.student.network.off.add_(1.0)  # type: ignore[operator]
    method.after_step(1)
    average: Any = method.average.network.off
    yield equal("the average follows", torch.full((2,), 0.01), average, 1e-7)
