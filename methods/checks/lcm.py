"""Exact checks of lcm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, Extra, call_by_keyword, scale_by_keyword
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, solve
from diffdistill.core.prediction import ROWS, diffuse
from diffdistill.exact.analytic import class_gaussians_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, two_points
from diffdistill.methods.lcm import LCM, Config, Skip

# How it is trained in the plane, where its student must reach the limits of exact/plane.py.
PLANE = {"guidance_max": 2.0, "guidance_scale": 1.5, "steps": 3000, "student_lr": 0.001}


class AffineStudent(nn.Module):
    """x0 = slope x_t + base + scale * gain, with its own three at each of the given angles, for one class."""

    def __init__(self, angles: Tensor, slope: Tensor, base: Tensor, gain: Tensor):
        super().__init__()
        self.angles = nn.Buffer(angles)
        self.slope, self.base, self.gain = nn.Parameter(slope), nn.Parameter(base), nn.Parameter(gain)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        k = (t[:, None] - self.angles).abs().argmin(1)
        return self.slope[k] * x_t + self.base[k] + guidance_scale[:, None] * self.gain[k]


def verify() -> Iterator[Check]:
    """A class and "no class" of one variance: guided DDIM steps are affine, and so is their composition."""
    mu, s = torch.tensor([[0.7, -0.4], [-1.1, 0.6]]).double(), torch.tensor([0.5, 1.3]).double()
    teacher, K = class_gaussians_teacher(mu, s), 10
    z, eps = two_points(2)
    cond = {"class_labels": torch.zeros(len(z), dtype=torch.int64)}
    angles = torch.linspace(torch.pi / 2, 0, K + 1, dtype=torch.float64)
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    # One step multiplies x - cos mu_a by a factor, mu_a = mu_none + a (mu_class - mu_none), and keeps mu_a.
    factors = (cos[1:] * cos[:-1] * s**2 + sin[1:] * sin[:-1]) / (cos[:-1] ** 2 * s**2 + sin[:-1] ** 2)
    product = torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1, 2).double()])
    timestep = torch.cat([1000 * torch.arange(K, 0, -1).double() / K - 1, torch.zeros(1).double()])[:, None]
    skip = 0.5**2 / ((10 * timestep) ** 2 + 0.5**2)
    out = 10 * timestep / ((10 * timestep) ** 2 + 0.5**2).sqrt()
    rest, inverse = 1 - product * cos, torch.where(out > 0, 1 / out, 0)
    exact = [(product - skip) * inverse, rest * mu[1] * inverse, rest * (mu[0] - mu[1]) * inverse]

    def method(shift: Tensor | None = None, **options: object) -> LCM:
        """The student whose f is the exact composition, or that much beside it at each angle (K + 1, 2)."""
        moved = exact[1] if shift is None else exact[1] + shift
        network = AffineStudent(angles, exact[0].clone(), moved.clone(), exact[2].clone())
        call = scale_by_keyword(call_by_keyword)
        student = Denoiser(network, teacher.denoiser.schedule, ROWS["sample"], extra_call=call)
        settings: dict = {"ddim_steps": K, "guidance_min": 1.0, "guidance_max": 9.0} | options
        return LCM(teacher, Config(**settings), student=student)

    def loss(lcm: LCM, k: int, scale: Tensor) -> Tensor:
        x_t = diffuse(z, angles[k].expand(len(z)), eps)
        skip = skip_at(k, scale)
        return lcm.following(x_t, lcm.less_noisy(x_t, z, eps, skip, cond), skip, cond).loss

    def skip_at(k: int, scale: Tensor) -> Skip:
        return Skip(angles[k].expand(len(z)), torch.full((len(z),), k), scale)

    def parameters(lcm: LCM) -> list[Tensor]:
        return list(lcm.student.network.parameters())

    def base_of(denoiser: Denoiser) -> Tensor:
        return dict(denoiser.network.named_parameters())["base"]

    lcm = method()
    yield equal("the grid, from pure noise to the least angle", angles, lcm.grid, 1e-12)
    both = torch.tensor([2.0, 8.5]).double()
    for a in both.tolist():
        scale = torch.full((len(z),), a).double()
        x = solve(ddim_step, guided(teacher.denoiser, a), z, angles, cond)
        mean = mu[1] + a * (mu[0] - mu[1])
        yield equal(f"{K} guided DDIM steps are the product of the factors, scale {a}", product[0] * z + mean, x, 1e-9)
        got = lcm.f(lcm.student, z, torch.zeros(len(z), dtype=torch.int64), cond, Extra(scale))
        yield equal(f"the fixed point is their composition, scale {a}", x, got, 1e-9)
        other = lcm.f(lcm.student, z, torch.zeros(len(z), dtype=torch.int64), cond, Extra(scale - 1))
        yield differs(f"w in place of 1 + w as the input is caught, scale {a}", x, other, 1e-2)

    mixed = both.repeat(len(z) // 2)
    beside = 0.1 * torch.cos(torch.arange(2 * K + 2).double()).reshape(K + 1, 2)
    c = 0.001
    for k in (0, 4, K - 1):
        for distance in ("huber", "l2"):
            lcm = method(distance=distance)
            value = loss(lcm, k, mixed)
            yield equal(f"{distance} is zero there, both scales in a batch, point {k}", 0.0, value, 1e-12, scale=1.0)
            slope = gradient(value, *parameters(lcm))
            yield equal(f"... and its gradient, point {k}", 0.0, slope, 1e-9, scale=1.0)
            # Beside it at every point, the student by 0.3 more: f is off by c_out times that, at x_t and at x_r.
            lcm = method(beside, distance=distance)
            with torch.no_grad():
                base_of(lcm.student).add_(0.3)
            gap = out[k] * (beside[k] + 0.3) - out[k + 1] * beside[k + 1]
            root = (gap**2 + c**2).sqrt()
            closed = (root - c if distance == "huber" else gap**2).mean()
            value = loss(lcm, k, mixed)
            yield equal(f"{distance} beside it, point {k}", closed, value, 1e-7)

            def pull(gap: Tensor, k: int = k, distance: str = distance) -> Tensor:
                found = torch.zeros(K + 1, 2).double()
                found[k] = out[k] * (gap / (gap**2 + c**2).sqrt() if distance == "huber" else 2 * gap) / 2
                return found.flatten()

            own = gradient(value, base_of(lcm.student))
            yield equal(f"its gradient, at the noisier point alone, point {k}", pull(gap), own, 1e-7)
            lcm = method(beside, distance=distance)
            lcm.target = lcm.student  # as that of a LoRA student is
            closed = pull(out[k] * beside[k] - out[k + 1] * beside[k + 1])
            own = gradient(loss(lcm, k, mixed), base_of(lcm.student))
            yield equal(f"... and with the student as its own target, point {k}", closed, own, 1e-7)
            x_t = diffuse(z, angles[k].expand(len(z)), eps)
            through = gradient(_undetached(lcm, x_t, k, mixed, mixed, cond), base_of(lcm.student))
            if k < K - 1:  # the last point's target is x_r itself
                yield differs(f"a gradient through the target is caught, point {k}", closed, through, 1e-3)
        wrong = _undetached(method(), x_t, k, mixed, mixed + 1, cond)
        yield differs(f"1 + scale in the teacher is caught, point {k}", 0.0, wrong, 1e-3, scale=1.0)

    lcm = method(beside)
    i = torch.full((len(z),), K)
    end = lcm.f(lcm.target, z, i, cond, Extra(mixed))
    yield equal("at the last point f is x_r itself, exactly", z, end, 0.0)
    for k, t in ((0, 999.0), (K - 1, 99.0), (K, 0.0)):
        closed = torch.tensor([0.25 / (100 * t**2 + 0.25), 10 * t / (100 * t**2 + 0.25) ** 0.5])
        got = torch.stack([part[0] for part in lcm.scalings(torch.tensor([k]))])
        yield equal(f"c_skip and c_out at timestep {t:g}", closed, got, 1e-6)

    before, parameter = beside + exact[1], base_of(lcm.student)
    with torch.no_grad():
        parameter += 1.0
    lcm.after_step(0)
    averaged = base_of(lcm.target)
    yield equal("the target follows by 1 - 0.95", before + 0.05, averaged, 1e-12)
    ends = lcm.scales(torch.tensor([0.0, 0.25, 1.0]).double())
    yield equal("scales from guidance_min to guidance_max", torch.tensor([1.0, 3.0, 9.0]), ends, 1e-12)
    plain = LCM(teacher, Config(), student=teacher.denoiser)
    x_t, ones = diffuse(z, plain.grid[3].expand(len(z)), eps), torch.ones(len(z)).double()
    i = torch.full((len(z),), 3)
    plain.guides = True
    expected = plain.less_noisy(x_t, z, eps, Skip(plain.grid[i], i, ones), cond)
    plain.guides = False
    yield equal(
        "scale 1 is the unguided step",
        expected,
        plain.less_noisy(x_t, z, eps, Skip(plain.grid[i], i, ones), cond),
        1e-12,
    )
    for steps in (1, 2, 5):
        levels = method(student_steps=steps).sampler().levels
        yield equal(
            f"{steps} sampling steps, on the grid",
            angles[: K : K // steps],
            torch.tensor(levels, dtype=torch.float64),
            1e-12,
        )


def _undetached(lcm: LCM, x_t: Tensor, k: int, scale: Tensor, teachers: Tensor, cond: Cond) -> Tensor:
    """The loss with the target in the graph, and with another scale for the teacher."""
    i, extra = torch.full((len(x_t),), k), Extra(scale)
    x_r = lcm.less_noisy(x_t, x_t, x_t, Skip(lcm.grid[i], i, teachers), cond)
    return lcm.distance(lcm.f(lcm.student, x_t, i, cond, extra), lcm.f(lcm.target, x_r, i + 1, cond, extra))
