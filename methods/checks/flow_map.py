"""Exact checks of flow_map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.prediction import OUTPUTS, diffuse
from diffdistill.core.schedule import LinearFlow, Schedule, TrigFlow
from diffdistill.exact.analytic import GaussianJumps, GaussianMixture, gaussian_teacher
from diffdistill.exact.checks import Check, differs, equal, gradient, mistake, two_points
from diffdistill.methods.flow_map import Config, FlowMap
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.simulation import rolled_out
from diffdistill.scaffold.tangent import Point, moving

# Its trainings in the plane, after each of which its student must be within the limits of exact/plane.py.
PLANE = {
    "lagrangian": {
        "objective": "lagrangian",
        "equal_share": 0.25,
        "end_share": 0.5,
        "weight_power": 0.5,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "student_steps": 1,
        "max_grad_norm": 1.0,
        "steps": 2000,
    },
    "eulerian": {
        "objective": "eulerian",
        "equal_share": 0.25,
        "end_share": 0.5,
        "weight_power": 0.75,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "student_steps": 1,
        "max_grad_norm": 1.0,
        "steps": 2000,
    },
    "progressive": {
        "objective": "progressive",
        "equal_share": 0.75,
        "end_share": 0.5,
        "weight_power": 0.5,
        "guidance_scale": 1.5,
        "student_lr": 0.001,
        "student_steps": 1,
        "max_grad_norm": 1.0,
        "steps": 2000,
    },
}

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.3]).double()
SPANS = ((0.3, 0.0), (0.9, 0.4), (1.5, 0.2), (math.pi / 2, 0.0), (1.2, 1.2))
MODES: tuple[Any, ...] = ("distillation", "training")
OBJECTIVES: tuple[Any, ...] = ("lagrangian", "eulerian", "progressive")


def verify() -> Iterator[Check]:
    """Section 2.7's, 13.2's and 13.8's sanity items, and the mistakes that they must catch."""
    yield from _exact_maps()
    yield from _as_the_papers()
    yield from _central_difference()
    yield from _error_of_all_jumps()
    yield from _guided_stage_one()
    yield from _share_below_one()
    yield from _rollouts()


def _student(network: nn.Module, schedule: Schedule, output: str, what: str, **more: Any) -> Denoiser:
    """A denoiser whose network takes `what` of the second time, its angle or the gap."""

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond, extra: Extra) -> Tensor:
        return network(x, time, getattr(extra, what), **cond)

    return Denoiser(network, schedule, OUTPUTS[output], extra_call=call, **more)


def _at(t: float, r: float, count: int = 16) -> tuple[Tensor, Tensor]:
    return tuple(torch.full((count,), angle, dtype=torch.float64) for angle in (t, r))  # type: ignore[return-value]


def _error(method: FlowMap, at: Point) -> Tensor:
    """The objective's error (B, ...) at a point, in the normal form's units."""
    if method.config.objective == "lagrangian":
        return method.lagrangian(at)
    f = method.velocity(at, Extra(r=at.r)).detach()
    return method.eulerian(f, at, 1.0) if method.config.objective == "eulerian" else method.progressive(f, at)


def _exact_maps() -> Iterator[Check]:
    """The exact map of a Gaussian has no error by any objective, with a teacher and without."""
    teacher, exact = gaussian_teacher(MEAN.tolist(), STD), GaussianMixture(MEAN[None], STD[None])
    student = _student(GaussianJumps(MEAN, STD), TrigFlow(), "v_prediction", "r")
    x0, eps = two_points(2)
    for objective in OBJECTIVES:
        for mode in MODES:
            method = FlowMap(teacher, Config(mode=mode, objective=objective, derivative="exact"), student=student)
            for span in SPANS:
                t, r = _at(*span)
                x_t = diffuse(MEAN + STD * x0, t, eps)
                marginal = teacher.denoiser(x_t, t, {}).v
                data = moving(MEAN + STD * x0, t, eps)
                where = f"{objective}, {mode}, from {span[0]:.3g} to {span[1]:.3g}"
                at = Point(x_t, t, marginal, r, {}, 3)
                error = _error(method, at)
                yield equal(f"the exact map has no error, {where}", 0.0, error, 1e-10, scale=1.0)
                if objective == "eulerian" and mode == "distillation":
                    yield differs(f"... but along the data's own path, {where}", 0.0,
                                  _error(method, at._replace(v=data)), 1e-3, scale=1.0)  # fmt: skip
                if span[0] == span[1]:
                    yield differs(f"... but against the data's own direction, {where}", 0.0,
                                  _error(method, at._replace(v=data)), 1e-3, scale=1.0)  # fmt: skip
                elif objective == "progressive":
                    with mistake(FlowMap, "parts", _swapped):
                        yield differs(
                            f"... but with the parts swapped, {where}", 0.0, _error(method, at), 1e-3, scale=1.0
                        )
                elif objective == "lagrangian":
                    with mistake(FlowMap, "own", _where_it_starts):
                        yield differs(f"... but with b where the jump starts, {where}", 0.0, _error(method, at), 1e-3,
                                      scale=1.0)  # fmt: skip
    t, r = _at(1.4, 0.3)
    x_t, s = diffuse(MEAN + STD * x0, t, eps), torch.full_like(t, 0.8)
    half = student(x_t, t, {}, Extra(r=s)).at(s)
    yield equal("two jumps are one", exact.flow_map(x_t, t, r), student(half, s, {}, Extra(r=r)).at(r), 1e-12)


REAL: dict[str, Any] = {name: getattr(FlowMap, name) for name in ("parts", "own", "residual")}


def _swapped(self: FlowMap, t: Tensor, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return REAL["parts"](self, t, s, r)[::-1]


def _where_it_starts(self: FlowMap, x: Tensor, t: Tensor, at: Point) -> Tensor:
    return REAL["own"](self, at.x_t, at.t, at)


class _AnyJumps(nn.Module):
    """A smooth network of two dimensions, the time and the gap, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2)).double()

    def forward(self, x: Tensor, time: Tensor, gap: Tensor) -> Tensor:
        """(B, 2) for x (B, 2), the times (B,) and gaps (B,)."""
        time, gap = time.to(x)[:, None], gap.to(x)[:, None]
        return self.layers(torch.cat([x, torch.sin(time), torch.cos(2 * time), torch.sin(gap)], 1))


def _paper(objective: str, u: nn.Module, z: Tensor, v: Tensor, s: Tensor, q: Tensor, m: Tensor) -> Tensor:
    """(B, 2) the error in the papers' coordinates, with its gradient: z at the flow time s, to q, over m."""
    far = (s - q)[:, None]
    if objective == "lagrangian":

        def leads_to(q: Tensor) -> Tensor:
            return z - (s - q)[:, None] * u(z, s, s - q)

        moved = jvp(leads_to, (q,), (torch.ones_like(q),))
        aim = u(moved[0], q, 0 * q) if float(far[0]) else v
        return moved[1] - aim.detach()
    own = u(z, s, 0 * s).detach() if float(far[0]) else v
    if objective == "eulerian":
        change = jvp(lambda z, s: u(z, s, s - q), (z, s), (own, torch.ones_like(s)))[1]
        return u(z, s, s - q) - (own - far * change).detach()
    if not float(far[0]):
        return u(z, s, s - q) - v
    h = (m - q)[:, None] / far
    z_m = z - (s - m)[:, None] * u(z, s, s - m)
    return u(z, s, s - q) - ((1 - h) * u(z, s, s - m) + h * u(z_m, m, m - q)).detach()


def _as_the_papers() -> Iterator[Check]:
    """For any flow-matching network loss and gradient are those of the papers' formulas in their own coordinates."""
    for std in (1.0, 0.5):
        schedule = LinearFlow(data_std=std, time_scale=1.0)
        network = _AnyJumps()
        student = _student(network, schedule, "flow_prediction", "gap")
        teacher = Teacher(_student(_AnyJumps(), schedule, "flow_prediction", "gap"), (2,))
        x0, eps = two_points(2)
        x0 = MEAN + STD * x0
        for objective in OBJECTIVES:
            config = Config(mode="training", objective=objective, derivative="exact", weight_power=0.75, weight_c=0.1,
                            split="midpoint")  # fmt: skip
            method = FlowMap(teacher, config, student=student)
            for time, end in ((0.8, 0.1), (1.0, 0.0), (0.5, 0.5)):
                s, q = _at(time, end)
                t, r = schedule.angle(s), schedule.angle(q)
                z, v = (1 - time) * std * x0 + time * eps, eps - std * x0
                middle = schedule.native((t + r) / 2).sigma
                square = _paper(objective, network, z, v, s, q, middle).square().sum(1)
                paper = (square / (square.detach() + 0.1) ** 0.75).mean()
                at = Point(diffuse(x0, t, eps), t, moving(x0, t, eps), r, {})
                got = method.regression(0, at).loss
                where = f"{objective}, {time:g} to {end:g}, data of deviation {std:g}"
                yield equal(f"the loss is the paper's, {where}", paper, got, 1e-10)
                slopes = gradient(paper, *network.parameters())
                yield equal(f"... and its gradient, {where}", slopes, gradient(got, *network.parameters()), 1e-9)
                if std < 1 and end:
                    with mistake(FlowMap, "rho", lambda self, t: torch.ones_like(t)):
                        wrong = method.regression(0, at).loss
                    yield differs(f"... which one in other coordinates is not, {where}", paper, wrong, 1e-6)


def _central_difference() -> Iterator[Check]:
    """AnyFlow's central difference errs by the square of its step, one to the side by the step."""
    teacher = gaussian_teacher(MEAN.tolist(), STD)
    student = _student(GaussianJumps(MEAN, STD), TrigFlow(), "v_prediction", "r")
    t, r = _at(0.9, 0.3)
    x0, eps = two_points(2)
    x_t = diffuse(MEAN + STD * x0, t, eps)
    at = Point(x_t, t, teacher.denoiser(x_t, t, {}).v, r, {})
    kinds: tuple[tuple[Any, Any, float], ...] = (
        ("eulerian", "central", 4.0), ("eulerian", "backward", 2.0), ("lagrangian", "central", 4.0),
    )  # fmt: skip
    for objective, kind, ratio in kinds:
        sizes = []
        for h in (0.02, 0.01):
            config = Config(objective=objective, derivative=kind, derivative_step=h)
            sizes.append(float(_error(FlowMap(teacher, config, student=student), at).detach().norm()))
        yield equal(
            f"{objective}: half the step divides the {kind} error by {ratio:g}", ratio, sizes[0] / sizes[1], 0.05
        )


def _error_of_all_jumps() -> Iterator[Check]:
    """How many times an error that all jumps share comes back in the target; beyond 1 where the map widens."""
    teacher = gaussian_teacher(MEAN.tolist(), STD)

    class Off(GaussianJumps):
        def forward(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return super().forward(x_t, t, r) + 0.01

    student = _student(Off(MEAN, STD), TrigFlow(), "v_prediction", "r")
    x0, eps = two_points(2)
    for start, end in ((math.pi / 2, 0.0), (1.1, 0.3)):
        t, r = _at(start, end)
        x_t = diffuse(MEAN + STD * x0, t, eps)
        at, middle = Point(x_t, t, teacher.denoiser(x_t, t, {}).v, r, {}), (start + end) / 2
        widths = [math.cos(angle) ** 2 * STD**2 + math.sin(angle) ** 2 for angle in (end, middle)]
        rho = [math.cos(angle) + math.sin(angle) for angle in (start, end)]
        back = {
            "progressive": (1 + torch.sqrt(widths[0] / widths[1])) / (2 * math.cos((start - end) / 2)),
            "eulerian": torch.full_like(STD, 1 - math.cos(start - end) * rho[0] / rho[1]),  # never beyond 1
        }
        for objective, times in back.items():
            config = Config(objective=objective, derivative="exact", split="midpoint")  # type: ignore[arg-type]
            got = 1 - _error(FlowMap(teacher, config, student=student), at).mean(0) / 0.01
            where = f"{objective}, {start:.3g} to {end:.3g}"
            yield equal(f"an error that all jumps share comes back so many times, {where}", times, got, 1e-9)


# -- guided without a teacher: a class N(1, 0.4^2), no class N(0, 1), guidance 3 --------------------------------------

SCALE = 3.0


def _legendre(n: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of the mean over [0, 1]."""
    import numpy

    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.legendre.leggauss(n))
    return (nodes + 1) / 2, weights / 2


def _variance(std: float, s: Tensor) -> Tensor:
    return ((1 - s) * std) ** 2 + s**2


def _rate(std: float, s: Tensor) -> Tensor:
    """The slope in z of the velocity of N(., std^2) at the flow time s."""
    return (s - (1 - s) * std**2) / _variance(std, s)


def _flow(mean: float, std: float, z: Tensor, s: Tensor) -> Tensor:
    """The velocity dz/ds of N(mean, std^2)."""
    return _rate(std, s) * (z - (1 - s) * mean) - mean


class _GuidedJumps(nn.Module):
    """u (B, 1) of the guided flow's exact map, or of AnyFlow's published fixed point; unguided without a class.

    Both are averages over the nodes of a quadrature. label 0: the class; 1: none.
    """

    def __init__(self, published: bool):
        super().__init__()
        self.published = published

    def forward(self, z: Tensor, s: Tensor, gap: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 1) at z (B, 1), the flow times s (B,) and gaps s - q (B,)."""
        s, gap = s[:, None], gap[:, None]
        none = self.without_class(z, s, gap)
        guided = SCALE * _flow(1.0, 0.4, z, s) + (1 - SCALE) * _flow(0.0, 1.0, z, s)
        jump = self.average(z, s, gap) if self.published else self.mapped(z, s, gap)
        return torch.where(class_labels[:, None] == 1, none, torch.where(gap == 0, guided, jump))

    def without_class(self, z: Tensor, s: Tensor, gap: Tensor) -> Tensor:
        slope = torch.sqrt(_variance(1.0, s - gap) / _variance(1.0, s))
        return torch.where(gap == 0, _flow(0.0, 1.0, z, s), (1 - slope) * z / torch.where(gap == 0, 1.0, gap))

    def mapped(self, z: Tensor, s: Tensor, gap: Tensor) -> Tensor:
        """The linear equation dz/ds = a z + b, solved backwards."""
        nodes, weights = _legendre()
        q = s - gap

        def slope(start: Tensor) -> Tensor:
            powers = (0.4, SCALE / 2), (1.0, (1 - SCALE) / 2)
            parts = [(_variance(std, q) / _variance(std, start)) ** power for std, power in powers]
            return parts[0] * parts[1]

        tau = q + gap * nodes
        shift = SCALE * (-1 - _rate(0.4, tau) * (1 - tau))
        z_q = slope(s) * z - gap * (weights * slope(tau) * shift).sum(1, keepdim=True)
        return (z - z_q) / torch.where(gap == 0, 1.0, gap)

    def average(self, z: Tensor, s: Tensor, gap: Tensor) -> Tensor:
        """The mean of SCALE u_class(tau) + (1 - SCALE) u_none(tau, q) along the unguided path of the class."""
        nodes, weights = _legendre()
        tau = s - gap + gap * nodes
        z_tau = 1 - tau + (z - 1 + s) * torch.sqrt(_variance(0.4, tau) / _variance(0.4, s))
        both = SCALE * _flow(1.0, 0.4, z_tau, tau) + (1 - SCALE) * self.without_class(z_tau, tau, gap * nodes)
        return (weights * both).sum(1, keepdim=True)


def _published(self: FlowMap, f: Tensor, at: Point) -> Tensor:
    """AnyFlow's: P = (F - (1 - g) F_none(t, r))/g against v - (t - r) DF/g, along the unguided path; times g."""
    assert self.student.null is not None
    none = self.student(at.x_t, at.t, self.student.null(at.cond), Extra(r=at.r)).v
    guided = self.config.guidance_scale * at.v + (1 - self.config.guidance_scale) * none
    return REAL["residual"](self, f, at) - (guided - at.v)


def _guided_stage_one() -> Iterator[Check]:
    """The corrected target's fixed point is the guided flow map; the published one's is another, and is shown too."""
    schedule = LinearFlow(time_scale=1.0)
    labels = {"class_labels": torch.zeros(9, dtype=torch.int64)}
    z = torch.linspace(-2, 2, 9).double()[:, None]
    points = ((1.0, 0.0), (0.7, 0.2), (0.5, 0.25))
    null = {"null": lambda cond: {"class_labels": torch.ones_like(cond["class_labels"])}}
    jumps: dict[bool, Tensor] = {}
    for published in (False, True):
        student = _student(_GuidedJumps(published), schedule, "flow_prediction", "gap", **null)
        config = Config(mode="training", objective="eulerian", path="data", derivative="exact", guidance_scale=SCALE,
                        label_dropout=0.0)  # fmt: skip
        method = FlowMap(Teacher(student, (1,), 1), config, student=student)
        name = "the published fixed point" if published else "the guided flow map"
        for start, end in points:
            s, q = _at(start, end, 9)
            t, r = schedule.angle(s), schedule.angle(q)
            x_t = z / schedule.native(t).scale[:, None]
            # The class's velocity of the normal form, as the mean over the data gives it.
            u = _flow(1.0, 0.4, z, s[:, None])
            v = student(x_t, t, labels, Extra(r=t)).with_output(u).v
            batch = Batch(9, (1,), labels, x_t, torch.device("cpu"), (0, 0, 0))
            inside = method.direction(x_t, v, t, batch, labels)
            f = student(x_t, t, labels, Extra(r=r)).v
            corrected = method.residual(f, Point(x_t, t, inside, r, labels))
            with mistake(FlowMap, "residual", _published):
                theirs = method.residual(f, Point(x_t, t, v, r, labels))
            where = f"{start:g} to {end:g}"
            if published:
                yield equal(f"{name} has no error by the published target, {where}", 0.0, theirs, 1e-9, scale=1.0)
                yield differs(f"... and one by the corrected target, {where}", 0.0, corrected, 1e-2, scale=1.0)
            else:
                yield equal(f"{name} has no error by the corrected target, {where}", 0.0, corrected, 1e-9, scale=1.0)
                yield differs(f"... and one by the published target, {where}", 0.0, theirs, 1e-2, scale=1.0)
        one, none = torch.ones(2).double(), torch.zeros(2).double()
        ends = torch.tensor([[0.0], [1.0]]).double()
        jumps[published] = ends - student.network(ends, one, one - none, labels["class_labels"][:2])
        line = torch.stack([jumps[published][0], jumps[published][1] - jumps[published][0]])
        expected = torch.tensor([[2.11], [-1.47]] if published else [[1.32], [0.06]]).double()
        yield equal(f"{name}: offset and slope of the jump from noise to data", expected, line, 0.01)
    yield differs("the two lead to different images", jumps[False], jumps[True], 0.1)


class _SharedJumps(nn.Module):
    """u (B, 1) of the fixed point at a share of the derivative below 1, of N(0.3, 0.5^2): 13.8's integral."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, z: Tensor, s: Tensor, gap: Tensor) -> Tensor:
        """(B, 1) the mean of v(q + gap y^share) over y in [0, 1] along the path; y = w^10 makes it smooth."""
        s, gap = s[:, None], gap[:, None]
        nodes, weights = _legendre()
        tau = s - gap + gap * nodes ** (10 * self.share)
        z_tau = (1 - tau) * 0.3 + (z - (1 - s) * 0.3) * torch.sqrt(_variance(0.5, tau) / _variance(0.5, s))
        return (10 * weights * nodes**9 * _flow(0.3, 0.5, z_tau, tau)).sum(1, keepdim=True)


def _share_below_one() -> Iterator[Check]:
    """AYF: at a share below 1 the fixed point is an average that counts the noisy end more, as 13.8 has it."""
    schedule = LinearFlow(time_scale=1.0)
    z = torch.linspace(-2, 2, 9).double()[:, None]
    s, q = _at(0.8, 0.1, 9)
    t, r = schedule.angle(s), schedule.angle(q)
    x_t = z / schedule.native(t).scale[:, None]
    for share, slope in ((1.0, 0.5), (0.99, 0.496), (0.9, 0.455)):
        student = _student(_SharedJumps(share), schedule, "flow_prediction", "gap")
        method = FlowMap(Teacher(student, (1,)), Config(objective="eulerian", derivative="exact"), student=student)
        v = student(x_t, t, {}, Extra(r=t)).v
        at = Point(x_t, t, v, r, {})
        f = method.velocity(at, Extra(r=r)).detach()
        yield equal(f"the fixed point at the share {share:g} has no error", 0.0, method.eulerian(f, at, share), 1e-9,
                    scale=1.0)  # fmt: skip
        if share < 1:
            yield differs(f"... and is not the flow map, {share:g}", 0.0, method.eulerian(f, at, 1.0), 1e-4, scale=1.0)
        one = torch.ones(2).double()
        ends = torch.tensor([[0.0], [1.0]]).double()
        image = ends - student.network(ends, one, one)
        yield equal(f"... whose slope from noise to data is {slope:g}", slope, image[1] - image[0], 2e-3)


def _rollouts() -> Iterator[Check]:
    """The exact map's few jumps are one, the student that is right is not moved, and a gradient passes all jumps."""
    teacher, exact = gaussian_teacher(MEAN.tolist(), STD), GaussianMixture(MEAN[None], STD[None])
    student = _student(GaussianJumps(MEAN, STD), TrigFlow(), "v_prediction", "r")
    network = _AnyJumps()
    other = _student(network, TrigFlow(), "v_prediction", "gap")
    for step in range(6):
        batch = Batch(64, (2,), {}, None, torch.device("cpu"), (0, step, 0))
        z = batch.randn("z")
        x, t = z.double(), torch.full((64,), math.pi / 2, dtype=torch.float64)
        with mistake(Batch, "randn", lambda self, purpose, z=z: z.double()):
            got = rolled_out(student, (2, 4, 8), None, batch)
            yield equal(f"the exact map's jumps are one, draw {step}", exact.flow_map(x, t, 0 * t), got, 1e-12)
            end = rolled_out(other, (4, 8), None, batch)
        slopes = gradient(end.square().sum(), *network.parameters())
        yield differs(f"a gradient passes the jumps, draw {step}", 0.0, slopes, 1e-3, scale=1.0)
    method = FlowMap(teacher, Config(matching_weight=1.0), student=other, fake_score=teacher.denoiser)
    with mistake(Batch, "randn", lambda self, purpose: z.double()):
        outcome = method.second_term(batch)
    assert outcome is not None
    still = gradient(outcome.loss, *network.parameters())
    yield equal("samples that the fake score calls the teacher's are not moved", 0.0, still, 1e-12, scale=1.0)
