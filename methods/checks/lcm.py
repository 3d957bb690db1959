"""Exact checks of lcm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra, call_by_keyword, scale_by_keyword
from diffdistill.core.guidance import guide, guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import OUTPUTS, Prediction, diffuse
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.lcm import LCM, Config, Skip
from diffdistill.players import scale_input

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "one step": {
        "guidance_min": 1.0,
        "guidance_max": 2.0,
        "guidance_scale": 1.5,
        "student_steps": 1,
        "ddim_steps": 50,
        "steps": 2500,
        "student_lr": 0.001,
    },
    "two steps": {
        "guidance_min": 1.0,
        "guidance_max": 2.0,
        "guidance_scale": 1.5,
        "student_steps": 2,
        "ddim_steps": 50,
        "steps": 2500,
        "student_lr": 0.001,
    },
}


class AffineStudent(nn.Module):
    """x0 = slope x_t + base + scale * gain, with its own three at each of the given angles, for one class."""

    def __init__(self, angles: Tensor, slope: Tensor, base: Tensor, gain: Tensor):
        super().__init__()
        self.angles = nn.Buffer(angles)
        self.slope, self.base, self.gain = nn.Parameter(slope), nn.Parameter(base), nn.Parameter(gain)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        """(B, d) x0."""
        k = (t[:, None] - self.angles).abs().argmin(1)
        return self.slope[k] * x_t + self.base[k] + guidance_scale[:, None] * self.gain[k]


class _Plane:
    """A class and "no class" of one variance: guided DDIM steps are affine, and so is their composition.

    One step multiplies x - cos mu_a by a factor, mu_a = mu_none + a (mu_class - mu_none), and keeps mu_a.
    """

    mu, s = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
    K, c = 10, 0.001

    def __init__(self) -> None:
        K = self.K
        self.teacher = class_gaussians_teacher(self.mu, self.s)
        self.z, self.eps = two_points(2)
        self.size = len(self.z)
        self.cond = {"class_labels": torch.zeros(self.size, dtype=torch.int64)}
        self.angles = torch.linspace(torch.pi / 2, 0, K + 1, dtype=torch.float64)
        cos, sin = torch.cos(self.angles)[:, None], torch.sin(self.angles)[:, None]
        factors = (cos[1:] * cos[:-1] * self.s**2 + sin[1:] * sin[:-1]) / (cos[:-1] ** 2 * self.s**2 + sin[:-1] ** 2)
        self.product = torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1, 2).double()])
        timestep = torch.cat([1000 * torch.arange(K, 0, -1).double() / K - 1, torch.zeros(1).double()])[:, None]
        skip = 0.5**2 / ((10 * timestep) ** 2 + 0.5**2)
        self.out = 10 * timestep / ((10 * timestep) ** 2 + 0.5**2).sqrt()
        rest, inverse = 1 - self.product * cos, torch.where(self.out > 0, 1 / self.out, 0)
        self.slope, self.base, self.gain = (
            part * inverse for part in (self.product - skip, rest * self.mu[1], rest * (self.mu[0] - self.mu[1]))
        )
        self.mixed = torch.tensor([2.0, 8.5]).double().repeat(self.size // 2)  # two scales in a batch
        self.beside = 0.1 * torch.cos(torch.arange(2 * K + 2).double()).reshape(K + 1, 2)

    def method(self, shift: Tensor | None = None, **options: object) -> LCM:
        """The student whose f is the exact composition, or that much beside it at each angle (K + 1, 2)."""
        moved = self.base if shift is None else self.base + shift
        network = AffineStudent(self.angles, self.slope.clone(), moved.clone(), self.gain.clone())
        call = scale_by_keyword(call_by_keyword)
        student = Denoiser(network, self.teacher.denoiser.schedule, OUTPUTS["sample"], extra_call=call)
        settings: dict[str, Any] = {"ddim_steps": self.K, "guidance_min": 1.0, "guidance_max": 9.0} | options
        return LCM(self.teacher, Config(**settings), student=student)

    def noisy(self, k: int) -> Tensor:
        """(B, 2) x_t at point k of the grid."""
        return diffuse(self.z, self.angles[k].expand(self.size), self.eps)

    def loss(self, lcm: LCM, k: int) -> Tensor:
        """The loss at point k, with both scales in the batch."""
        x_t = self.noisy(k)
        skip = Skip(self.angles[k].expand(self.size), torch.full((self.size,), k), self.mixed)
        return lcm.following(x_t, lcm.less_noisy(x_t, self.z, self.eps, skip, self.cond), skip, self.cond).loss

    def pull(self, gap: Tensor, k: int, distance: str) -> Tensor:
        """The gradient in the bases of a student that is off by gap (2,) at point k."""
        slope = torch.zeros(self.K + 1, 2).double()
        slope[k] = self.out[k] * (gap / (gap**2 + self.c**2).sqrt() if distance == "huber" else 2 * gap) / 2
        return slope.flatten()


def _one_more(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Prediction:
    """The mistake of 1 + a for the scale a."""
    return guide(denoiser, x_t, t, cond, scale + 1)


def _base_of(denoiser: Denoiser) -> Tensor:
    return dict(denoiser.network.named_parameters())["base"]


def verify() -> Iterator[Check]:
    """The fixed point, the loss and its gradient there and beside it, the scalings, the target and the sampler."""
    plane = _Plane()
    yield from _fixed_point(plane)
    for k in (0, 4, plane.K - 1):
        for distance in ("huber", "l2"):
            yield from _loss(plane, k, distance)
        with mistake(scale_input, "guide", _one_more):
            wrong = plane.loss(plane.method(), k)
        yield differs(f"1 + scale in the teacher is caught, point {k}", 0.0, wrong, 1e-3, scale=1.0)
    yield from _scalings(plane)
    yield from _target_and_scales(plane)
    yield from _sampler(plane)


def _fixed_point(plane: _Plane) -> Iterator[Check]:
    lcm, z, cond = plane.method(), plane.z, plane.cond
    first = torch.zeros(plane.size, dtype=torch.int64)
    yield equal("the grid, from pure noise to the least angle", plane.angles, lcm.grid, 1e-12)
    for a in (2.0, 8.5):
        scale = torch.full((plane.size,), a).double()
        x = solve(ddim_step, guided(plane.teacher.denoiser, a), z, plane.angles, cond)
        closed = plane.product[0] * z + (plane.mu[1] + a * (plane.mu[0] - plane.mu[1]))
        yield equal(f"{plane.K} guided DDIM steps are the product of the factors, scale {a}", closed, x, 1e-9)
        got = lcm.f(lcm.student, z, first, cond, Extra(scale))
        yield equal(f"the fixed point is their composition, scale {a}", x, got, 1e-9)
        other = lcm.f(lcm.student, z, first, cond, Extra(scale - 1))
        yield differs(f"w in place of 1 + w as the input is caught, scale {a}", x, other, 1e-2)


def _loss(plane: _Plane, k: int, distance: str) -> Iterator[Check]:
    """At point k: zero at the fixed point, and in closed form beside it."""
    out, beside, c = plane.out, plane.beside, plane.c
    game = plane.method(distance=distance)
    value = plane.loss(game, k)
    yield equal(f"{distance} is zero there, both scales in a batch, point {k}", 0.0, value, 1e-12, scale=1.0)
    slope = gradient(value, *game.student.network.parameters())
    yield equal(f"... and its gradient, point {k}", 0.0, slope, 1e-9, scale=1.0)
    # Beside it at every point, the student by 0.3 more: f is off by c_out times that, at x_t and at x_r.
    game = plane.method(beside, distance=distance)
    with torch.no_grad():
        _base_of(game.student).add_(0.3)
    gap = out[k] * (beside[k] + 0.3) - out[k + 1] * beside[k + 1]
    closed = ((gap**2 + c**2).sqrt() - c if distance == "huber" else gap**2).mean()
    value = plane.loss(game, k)
    yield equal(f"{distance} beside it, point {k}", closed, value, 1e-7)
    own = gradient(value, _base_of(game.student))
    yield equal(f"its gradient, at the noisier point alone, point {k}", plane.pull(gap, k, distance), own, 1e-7)
    game = plane.method(beside, distance=distance)
    game.target = game.student  # as that of a LoRA student is
    closed = plane.pull(out[k] * beside[k] - out[k + 1] * beside[k + 1], k, distance)
    own = gradient(plane.loss(game, k), _base_of(game.student))
    yield equal(f"... and with the student as its own target, point {k}", closed, own, 1e-7)
    if k < plane.K - 1:  # the last point's target is x_r itself
        with mistake(torch, "no_grad", nullcontext):
            through = gradient(plane.loss(game, k), _base_of(game.student))
        yield differs(f"a gradient through the target is caught, point {k}", closed, through, 1e-3)


def _scalings(plane: _Plane) -> Iterator[Check]:
    lcm, K = plane.method(plane.beside), plane.K
    end = lcm.f(lcm.target, plane.z, torch.full((plane.size,), K), plane.cond, Extra(plane.mixed))
    yield equal("at the last point f is x_r itself, exactly", plane.z, end, 0.0)
    for k, t in ((0, 999.0), (K - 1, 99.0), (K, 0.0)):
        closed = torch.tensor([0.25 / (100 * t**2 + 0.25), 10 * t / (100 * t**2 + 0.25) ** 0.5])
        got = torch.stack([part[0] for part in lcm.scalings(torch.tensor([k]))])
        yield equal(f"c_skip and c_out at timestep {t:g}", closed, got, 1e-6)


def _target_and_scales(plane: _Plane) -> Iterator[Check]:
    lcm = plane.method(plane.beside)
    with torch.no_grad():
        _base_of(lcm.student).add_(1.0)
    lcm.after_step(0)
    followed = plane.beside + plane.base + 0.05
    yield equal("the target follows by 1 - 0.95", followed, _base_of(lcm.target), 1e-12)
    ends = lcm.config.drawn(torch.tensor([0.0, 0.25, 1.0]).double())
    yield equal("scales from guidance_min to guidance_max", torch.tensor([1.0, 3.0, 9.0]), ends, 1e-12)
    plain = LCM(plane.teacher, Config(), student=plane.teacher.denoiser)
    i = torch.full((plane.size,), 3)
    skip = Skip(plain.grid[i], i, torch.ones(plane.size).double())
    x_t = diffuse(plane.z, skip.t, plane.eps)
    plain.guidance.guides = True
    expected = plain.less_noisy(x_t, plane.z, plane.eps, skip, plane.cond)
    plain.guidance.guides = False
    got = plain.less_noisy(x_t, plane.z, plane.eps, skip, plane.cond)
    yield equal("scale 1 is the unguided step", expected, got, 1e-12)


def _sampler(plane: _Plane) -> Iterator[Check]:
    for steps in (1, 2, 5):
        levels = torch.tensor(plane.method(student_steps=steps).sampler().levels, dtype=torch.float64)
        closed = plane.angles[: plane.K : plane.K // steps]
        yield equal(f"{steps} sampling steps, on the grid", closed, levels, 1e-12)
