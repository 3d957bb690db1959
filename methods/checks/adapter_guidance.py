"""Exact checks of adapter_guidance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.core.schedule import TrigFlow, sampling_grid
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.adapter_guidance import AdapterGuidance, Config
from diffdistill.players.adapter_networks import AdaptedNetwork, Additive, Corrections
from diffdistill.players.guidance_adapters import adapted
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold import imitating
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Batch


class _Classes(nn.Module):
    """The velocity of N(means[k], stds[k]^2) for each label k, of which the last means no class (T4)."""

    means: Tensor
    stds: Tensor

    def __init__(self, means: Tensor, stds: Tensor):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        mean, std = self.means[class_labels], self.stds[class_labels]
        slope = cos * sin * (1 - std**2) / (cos**2 * std**2 + sin**2)
        return slope * (x_t - cos * mean) - sin * mean

    def teacher(self) -> Teacher:
        def null(cond: Cond) -> Cond:
            return {"class_labels": torch.full_like(cond["class_labels"], len(self.means) - 1)}

        denoiser = Denoiser(self, TrigFlow(), OUTPUTS["v_prediction"], null=null)
        return Teacher(denoiser, (self.means.shape[1],), len(self.means) - 1)


class _Exact(nn.Module):
    """The correction of equal variances V, -(a - 1) sin(t) (mu_c - mu_none)/V, at the network's output."""

    def __init__(self, means: Tensor, std: Tensor):
        super().__init__()
        self.means, self.std = means, std

    def forward(self, scale: Tensor, time: Tensor, labels: Tensor) -> Corrections:
        cos, sin = torch.cos(time)[:, None], torch.sin(time)[:, None]
        apart = self.means[labels] - self.means[-1]
        delta = -(scale[:, None] - 1) * sin * apart / (cos**2 * self.std**2 + sin**2)
        return {"": lambda x: delta[:, None]}


def verify() -> Iterator[Check]:
    """Section 6.1's sanity items and Appendix B row 14, on Gaussians of each class (T4)."""
    means = torch.tensor([[0.7, -0.4], [-0.9, 0.3], [0.1, 0.2]]).double()
    same = torch.tensor([[0.5, 1.3]]).double().expand(3, 2)
    unequal = torch.tensor([[0.5, 1.3], [0.8, 0.6], [1.1, 0.9]]).double()
    x, _ = two_points(2)  # mean zero, variance one
    label = 1
    cond = {"class_labels": torch.full((len(x),), label)}
    for t, a in ((t, a) for t in (0.3, 0.9, 1.4) for a in (1.0, 2.5, 6.0)):
        angle, scale, name = torch.full((len(x),), t).double(), torch.full((len(x),), a).double(), f"t = {t}, a = {a}"
        cos, sin = torch.cos(angle[0]), torch.sin(angle[0])
        # eps_c - eps_none = slope x + offset; the network's v is (eps - sin x)/cos.
        var = cos**2 * unequal**2 + sin**2
        slope = sin / var[label] - sin / var[-1]
        offset = -sin * cos * (means[label] / var[label] - means[-1] / var[-1])
        closed = (a - 1) ** 2 * (slope**2 + offset**2).mean() / cos**2
        method, out = _additive(means, unequal)
        loss, _ = method.imitation(x, angle, cond, scale)
        yield equal(f"at zero init the loss is (a - 1)^2 E|eps_c - eps_u|^2, {name}", closed, loss, 1e-12, scale=1e-2)
        off_by_one, _ = method.imitation(x, angle, cond, scale + 1)
        yield differs(f"... where w = a - 1 taken for a is caught, {name}", closed, off_by_one, 1e-6)

        with torch.no_grad():
            out.bias.copy_(offset / cos)  # the mean correction, the best that does not look at x
        loss, _ = method.imitation(x, angle, cond, scale)
        left = (a - 1) ** 2 * (slope**2).mean() / cos**2
        yield equal(f"unequal variances: what the best additive adapter leaves, {name}", left, loss, 1e-12, scale=1e-2)
        yield equal(f"... which is its minimum, {name}", 0.0, gradient(loss, out.bias), 1e-12, scale=1.0)
        if a > 1:
            with mistake(imitating, "guide", _away):
                turned, _ = method.imitation(x, angle, cond, scale)
            yield differs(f"... where guidance away from the class is caught, {name}", left, turned, 1e-3)

        method, out = _additive(means, same)
        with torch.no_grad():
            out.bias.copy_(-sin * (means[label] - means[-1]) / (cos**2 * same[0] ** 2 + sin**2))
        loss, _ = method.imitation(x, angle, cond, scale)
        yield equal(f"equal variances: an additive adapter is exact, {name}", 0.0, loss, 1e-24, scale=1.0)
        slopes = gradient(loss, *_network(method).adapters.parameters())
        yield equal(f"... with gradient zero, {name}", 0.0, slopes, 1e-12, scale=1.0)
        shifted = method.student(x, angle, {**cond, "guidance_scale": scale - 1}).y
        yield differs(f"... and w given for a is caught, {name}", method.teacher(x, angle, cond).y, shifted, 1e-6)
    yield from _trajectory_checks(means, same)
    yield from _base_checks(means, unequal)


def _away(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
    """The mistake of the class and "no class" swapped in guidance."""
    return guide(denoiser, x_t, t, cond, 1 - scale)


def _additive(means: Tensor, stds: Tensor) -> tuple[AdapterGuidance, nn.Linear]:
    """The method with its own additive adapter at the network's output, and the adapter's last layer."""
    method = AdapterGuidance(_Classes(means, stds).teacher(), Config())
    return method, next(module for module in _network(method).modules() if isinstance(module, Additive)).out


def _trajectory_checks(means: Tensor, stds: Tensor) -> Iterator[Check]:
    """The sampler with exact adapters makes the guided trajectory in closed form, and so do the chains."""
    teacher = _Classes(means, stds).teacher()

    def trajectory(x: Tensor, labels: Tensor, scale: Tensor, grid: Tensor, steps: Tensor) -> Tensor:
        """The guided score is that of N(mu_none + a (mu_c - mu_none), std^2), so every DDIM step is affine."""
        mean = means[-1] + scale[:, None] * (means[labels] - means[-1])
        for k in range(int(steps.max())):
            t, s = grid[k], grid[k + 1]
            rho = torch.cos(t) * stds[0] ** 2 / (torch.cos(t) ** 2 * stds[0] ** 2 + torch.sin(t) ** 2)
            factor = torch.cos(s) * rho + torch.sin(s) * (1 - torch.cos(t) * rho) / torch.sin(t)
            moved = torch.cos(s) * mean + factor * (x - torch.cos(t) * mean)
            x = torch.where((steps > k)[:, None], moved, x)
        return x

    denoiser = adapted(teacher.denoiser, _Exact(means, stds[0]), 2.5)
    sampler = AdapterGuidance(teacher, Config(sampling_steps=7), student=denoiser).sampler()
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, scale = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([1.0, 1.5, 2.0, 3.0, 4.5, 6.0]).double()
    grid, steps = sampling_grid(TrigFlow(), 7), torch.full((6,), 7)

    def sampled(cond: Cond) -> Tensor:
        x, t = sampler.input_at(6, z, cond, lambda j: torch.full_like(z, torch.nan))  # no noise is added
        return sampler.denoiser(x, t, cond).x0

    closed = trajectory(z, labels, scale, grid, steps)
    got = sampled({"class_labels": labels, "guidance_scale": scale})
    yield equal("one pass a step with exact adapters samples the guided trajectory", closed, got, 1e-12)
    wrong = sampled({"class_labels": labels, "guidance_scale": scale - 1})
    yield differs("... and w given for a is caught", closed, wrong, 1e-6)
    default = trajectory(z, labels, torch.full_like(scale, 2.5), grid, steps)
    yield equal("... at its own scale where none is given", default, sampled({"class_labels": labels}), 1e-12)

    chains, start = GuidedChains(teacher, 5, 1.0, 4.0), torch.zeros(10, 2)
    for step in range(12):
        draw = torch.randint(2, (10,), generator=torch.Generator().manual_seed(step))
        batch = Batch(10, (2,), {"class_labels": draw}, None, torch.device("cpu"), (0, step, 0))
        points = chains.points(batch, teacher.denoiser)
        stands = (torch.arange(10) // 2 + step) % 5
        yield equal(f"chains are spread over all steps, batch {step}", stands, chains.step, 0.0)
        noise = batch.randn("chains/start/z").double()  # of the first batch; later ones show where they begin
        start = noise if step == 0 else torch.where((stands == 0)[:, None], points.x_t, start)
        closed = trajectory(start, points.cond["class_labels"], points.scale, chains.grid, stands)
        yield equal(f"chains are guided trajectories, batch {step}", closed, points.x_t, 1e-12)
        inside = (points.scale >= 1) & (points.scale <= 4) & (points.scale.diff(prepend=torch.zeros(1)) != 0)
        yield equal(f"each with a scale of its own in the range, batch {step}", 10.0, float(inside.sum()), 0.0)
        chains.advance(batch, guide(teacher.denoiser, *points))


def _base_checks(means: Tensor, stds: Tensor) -> Iterator[Check]:
    """The base model is never changed, and is what adapters at scale 1 give, whatever their weights."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, cond = torch.linspace(0.1, 1.5, 8).double(), {"class_labels": torch.arange(8) % 3}
    for kind in ("additive", "attention", "mlp_gate"):
        method = AdapterGuidance(_Classes(means, stds).teacher(), Config(adapter=kind))
        plain = method.teacher(x, t, cond).y
        scale = torch.full((8,), 4.0).double()
        started = method.student(x, t, {**cond, "guidance_scale": scale}).y
        yield equal(f"{kind}: training begins at the unguided model", plain, started, 0.0)
        with torch.no_grad():
            for p in _network(method).adapters.parameters():
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
        changed = method.student(x, t, {**cond, "guidance_scale": scale}).y
        yield differs(f"{kind}: adapters change it", plain, changed, 1e-3)
        off = method.student(x, t, {**cond, "guidance_scale": torch.ones(8).double()}).y
        yield equal(f"{kind}: at scale 1 it is the base model to the bit", plain, off, 0.0)
        yield equal(f"{kind}: and after the call the base is untouched", plain, method.teacher(x, t, cond).y, 0.0)


def _network(method: AdapterGuidance) -> AdaptedNetwork:
    assert isinstance(method.student.network, AdaptedNetwork)
    return method.student.network
