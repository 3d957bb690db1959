"""A whole turn of the methods that follow trajectories, against a straight-line rewrite; and their slow targets."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.call_inputs import taking
from diffdistill.players.lora import LoraSettings
from diffdistill.players.sampler import DDIM, Renoise
from diffdistill.scaffold.following import FollowingMethod
from tests.scaffold.straight import (
    CLASSES,
    EDM_,
    EPS,
    FLOW,
    KEY,
    TRIG,
    VP,
    WHOLE,
    Plain,
    agree,
    agree_alone,
    batch_of,
    copies,
    draw,
    fold,
    gaussian,
    in_double,
    mine,
    modes,
    nets,
    noised,
    normal,
    scatter,
    step_draw,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """One method's turn at a training step, line by line; the networks drop units, both passes the same ones."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int = KEY[1], lora: Any = None):
        module = describe_method(name).load()
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        self.c: Any = module.Config(**options)
        self.method: FollowingMethod[Any] = module.METHOD(replace(plain.teacher(dropout=0.3), lora=lora or {}), self.c)
        scatter(self.method.student, 20)
        if self.method.target is not self.method.student:
            scatter(self.method.target, 21)
        teacher = getattr(self.method.teacher, "denoiser", self.method.teacher)
        self.teacher, self.student, self.target = nets(teacher, self.method.student, self.method.target)
        self.batch = batch_of(self.key)
        self.labels = self.batch.cond["class_labels"]
        self.eps = normal("student/eps", self.key)
        assert self.batch.x0 is not None
        self.image = self.batch.x0

    def dropped(self) -> None:
        """The units that this step drops."""
        torch.manual_seed(draw(*self.key, "student/dropout").initial_seed())

    def turn(self) -> Values:
        return getattr(self, f"_{self.name}")()

    def guided(self, x_t: Tensor, t: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.plain.guided(self.teacher, x_t, t, self.labels, scale)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) in the data's units."""
        gap = self.plain.std * (x - y).flatten(1)
        if self.c.distance == "l2":
            return gap.square().mean(1)
        c = 0.00054 * 3 if self.c.huber_c is None else self.c.huber_c
        return torch.sqrt(gap.square().sum(1) + c**2) - c

    # -- consistency -------------------------------------------------------------------------------------------------

    def points(self) -> int:
        c = self.c
        if c.mode == "distillation":
            return c.grid_points
        share = min(self.step / c.ramp_steps, 1)
        return math.ceil(math.sqrt(share * ((c.end_scales + 1) ** 2 - c.start_scales**2) + c.start_scales**2) - 1) + 1

    def grid(self) -> Tensor:
        n, plain = self.points(), self.plain
        low, high = plain.ends()
        high = high if self.c.student_level is None else plain.angle(self.c.student_level)
        if self.c.grid == "karras":
            low, high = low or math.atan(0.004), min(high, math.atan(160.0))
            a, b = math.tan(high) ** (1 / 7), math.tan(low) ** (1 / 7)
            grid = torch.tensor([math.atan((a + k / (n - 1) * (b - a)) ** 7) for k in range(n)])
        elif plain.kind == "edm":
            a, b, last = 30 ** (1 / 7), 0.01 ** (1 / 7), n - 2
            if self.c.student_level is not None:
                a, last = self.c.student_level ** (1 / 7), n - 1
            grid = torch.tensor([math.atan((a + k / last * (b - a)) ** 7 / plain.std) for k in range(n - 1)] + [0.0])
        else:
            levels = plain.levels(n - 1, self.c.student_level)
            grid = torch.tensor([plain.angle(level) for level in levels] + [0.0])
        grid[0] = plain.angle(plain.levels(self.c.student_steps, self.c.student_level)[0])
        return grid

    def pair(self) -> tuple[Tensor, Tensor, float]:
        """t, r and the angle at which x_r itself is the target."""
        c, std = self.c, self.plain.std
        if c.mode != "easy":
            grid, i = self.grid(), whole(self.points() - 1, "student/t", self.key)
            return grid[i], grid[i + 1], float(grid[-1])
        sigma = torch.exp(c.time_mean + c.time_std * gaussian("student/t", self.key))
        low, high = self.plain.ends()
        if c.student_level is not None:
            high = self.plain.angle(c.student_level)
        t = torch.atan(sigma / std).clamp(low, high)
        ratio = min(1 - c.stage_factor ** -(1 + self.step // c.stage_steps), c.ratio_limit)
        sigma = std * torch.tan(t)
        sigma = (sigma * (1 - (1 - ratio) * (1 + 8 / (1 + torch.exp(sigma))))).clamp_min(0)
        r = torch.atan(sigma / std)
        return t, torch.where(r < low, 0.0, r), 0.0

    def solver_step(self, x_t: Tensor, t: Tensor, r: Tensor, scale: float | Tensor, kind: str) -> Tensor:
        x0, eps = self.guided(x_t, t, scale)
        euler = noised(x0, r, eps)
        if kind in ("euler", "ddim"):
            return euler
        x0_r, eps_r = self.guided(euler, r, scale)
        eps = (eps + eps_r) / 2
        slope = fold(torch.cos(r) / torch.cos(t)) * (x_t - fold(torch.sin(t)) * eps) + fold(torch.sin(r)) * eps
        x0 = (x0 + x0_r) / 2  # close to pure noise
        other = fold(torch.cos(r)) * x0 + fold(torch.sin(r) / torch.sin(t)) * (x_t - fold(torch.cos(t)) * x0)
        until = 0 if kind == "heun_x0" else math.atan(200)
        return torch.where(fold(r) == 0, euler, torch.where(fold(t) > until, other, slope))

    def _consistency(self) -> Values:
        c = self.c
        t, r, end = self.pair()
        x_t = noised(self.image, t, self.eps)
        with torch.no_grad():
            by_teacher = c.mode == "distillation" or (c.mode == "easy" and c.easy_from == "teacher")
            kind = "euler" if c.mode == "easy" else c.solver
            scale = float(c.guidance_scale)
            x_r = self.solver_step(x_t, t, r, scale, kind) if by_teacher else noised(self.image, r, self.eps)
            self.dropped()
            other = self.plain.x0_eps(self.target, x_r, r, class_labels=self.labels)[0]
            target = torch.where(fold(r) <= end, x_r / fold(torch.cos(r)), other)
        self.dropped()
        d = self.distance(self.plain.x0_eps(self.student, x_t, t, class_labels=self.labels)[0], target)
        weighted = d
        if c.loss_weight == "inverse_step" or (c.loss_weight == "auto" and c.mode == "easy"):
            weighted = d / (self.plain.std * (torch.tan(t) - torch.tan(r)))
        return {"loss": weighted.mean(), "distance": d.mean()}

    # -- lcm ---------------------------------------------------------------------------------------------------------

    def f(self, net: Any, x: Tensor, i: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
        k = self.c.ddim_steps
        t = (1000 * (k - i) / k - 1).clamp_min(0) * self.c.timestep_scaling
        skip, out = 0.25 / (t**2 + 0.25), t / torch.sqrt(t**2 + 0.25)
        labels = torch.stack([self.labels.double(), scale], 1) if self.c.takes_scale else self.labels
        x0 = self.plain.x0_eps(net, x, grid[i], class_labels=labels)[0]
        return torch.where(fold(out) > 0, fold(skip) * x + fold(out) * x0, x)

    def _lcm(self) -> Values:
        c, plain = self.c, self.plain
        levels = plain.levels(c.ddim_steps, c.student_level)
        grid = torch.tensor([plain.angle(level) for level in levels] + [plain.ends()[0]])
        i = whole(c.ddim_steps, "student/step", self.key)
        scale = c.guidance_min + (c.guidance_max - c.guidance_min) * uniform("student/scale", self.key)
        x_t = noised(self.image, grid[i], self.eps)
        with torch.no_grad():
            r = torch.where((i + 1 == c.ddim_steps) & (c.solver == "heun"), 0.0, grid[i + 1])
            x_r = self.solver_step(x_t, grid[i], r, scale, c.solver)
            self.dropped()
            target = self.f(self.target, x_r, i + 1, grid, scale)
        self.dropped()
        gap = self.f(self.student, x_t, i, grid, scale) - target
        if c.distance == "l2":
            loss = gap.square().mean()
        else:
            loss = (torch.sqrt(gap.square() + c.huber_c**2) - c.huber_c).mean()
        return {"loss": loss, "consistency": loss}

    # -- multistep consistency ---------------------------------------------------------------------------------------

    def _multistep_consistency(self) -> Values:
        c, plain = self.c, self.plain
        tops = [plain.angle(level) for level in plain.levels(c.segments)]
        ends = [*tops[1:], 0.0]
        done = min(self.step / c.anneal_steps, 1)
        parts = max(1, round(c.teacher_steps_start ** (1 - done) * c.teacher_steps_end**done / c.segments))
        made = step_draw("student/t", self.key)
        row, i = (mine(torch.randint(n, (WHOLE,), generator=made), self.key) for n in (c.segments, parts))
        top, e = torch.tensor(tops)[row], torch.tensor(ends)[row]
        t, r = (torch.lerp(top, e, k / parts).clamp_min(plain.ends()[0]) for k in (i, i + 1))
        r = torch.where(i + 1 == parts, e, r)
        x_t = noised(self.image, t, self.eps)
        with torch.no_grad():
            x_r = noised(self.image, r, self.eps) if c.mode == "training" else self.adjusted(x_t, t, r)
            self.dropped()
            z_e = noised(*_spread(plain.x0_eps(self.student, x_r, r, class_labels=self.labels), e))
            z_e = torch.where(fold(r) <= fold(e), x_r, z_e)
            ref = (fold(torch.sin(t)) * z_e - fold(torch.sin(e)) * x_t) / fold(torch.sin(t - e))
        self.dropped()
        x0, sin = plain.x0_eps(self.student, x_t, t, class_labels=self.labels)[0], torch.sin(t)
        d = self.distance(x0 / fold(sin), ref / fold(sin)) if c.loss_weight == "v" else self.distance(x0, ref)
        return {"loss": (d / sin**2 if c.loss_weight == "snr_plus_one" else d).mean(), "distance": d.mean()}

    def adjusted(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """DDIM with the noise made longer by the variance of the image, of which the conditional pass errs."""
        x0, eps = self.guided(x_t, t, float(self.c.guidance_scale))
        conditional = self.plain.x0_eps(self.teacher, x_t, t, class_labels=self.labels)[0]
        variance = self.c.eta * (conditional - self.image).flatten(1).square().mean(1)
        added = (torch.sin(t - r) / torch.sin(t)) ** 2 * variance / eps.flatten(1).square().mean(1)
        return fold(torch.cos(r)) * x0 + fold(torch.sqrt(torch.sin(r) ** 2 + added)) * eps

    # -- scott -------------------------------------------------------------------------------------------------------

    def _scott(self) -> Values:
        c, plain = self.c, self.plain
        levels = plain.levels(c.solver_steps, c.student_level)
        grid = torch.tensor([plain.angle(level) for level in levels] + [0.0])
        i = whole(c.solver_steps, "student/t", self.key)
        t, apart = grid[i], c.skip // c.sde_steps
        x_t = x = noised(self.image, t, self.eps)
        with torch.no_grad():
            r = t
            for k in range(c.sde_steps):
                now, r = r, grid[(i + (k + 1) * apart).clamp(max=c.solver_steps)]
                x0, eps = self.guided(x, now.clamp_min(1e-9), float(c.guidance_scale))
                fresh = 1 - (torch.cos(now) / torch.cos(r)) ** 2
                n = c.eta * torch.sin(r) / torch.sin(now.clamp_min(1e-9)) * torch.sqrt(fresh.clamp_min(0))
                rest = torch.sqrt((torch.sin(r) ** 2 - n**2).clamp_min(0))
                moved = fold(torch.cos(r)) * x0 + fold(rest) * eps + fold(n) * normal(f"student/sde {k}", self.key)
                x = torch.where(fold(now == r), x, moved)
            self.dropped()
            other = plain.x0_eps(self.target, x, r, class_labels=self.labels)[0]
            target = torch.where(fold(r) == 0, x, other)
        self.dropped()
        gap = plain.x0_eps(self.student, x_t, t, class_labels=self.labels)[0] - target
        loss = gap.square() if c.distance == "l2" else torch.sqrt(gap.square() + c.huber_c**2) - c.huber_c
        return {"loss": loss.mean(), "stochastic": loss.mean()}


def _spread(x0_eps: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x0_eps[0], t, x0_eps[1]


TRAINING = {"mode": "training", "start_scales": 4, "end_scales": 12, "ramp_steps": 8}
EASY = {"mode": "easy", "stage_steps": 2, "time_mean": 0.1, "time_std": 2.5}
SEGMENTS = {"teacher_steps_start": 6, "teacher_steps_end": 24, "anneal_steps": 8, "segments": 3}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("consistency", {"grid_points": 5, "guidance_scale": 2.5}, EDM_),
    ("consistency", {"grid_points": 4, "guidance_scale": 2.5}, TRIG),
    ("consistency", {"grid_points": 5, "solver": "euler", "student_steps": 2, "distance": "l2"}, VP),
    ("consistency", {"grid_points": 5, "grid": "native", "huber_c": 0.3, "loss_weight": "inverse_step"}, EPS),
    ("consistency", {"grid_points": 5, "grid": "native", "loss_weight": "inverse_step"}, EDM_),
    ("consistency", {"grid_points": 6, "solver": "euler"}, FLOW),
    ("consistency", {"grid_points": 4, "solver": "heun_x0", "grid": "native", "guidance_scale": 2.5}, VP),
    ("consistency", {"grid_points": 5, "student_level": 2.5, "grid": "native"}, EDM_),
    ("consistency", {"grid_points": 5, "student_level": 11.0, "grid": "native"}, EPS),
    ("consistency", {"grid_points": 5, "student_level": 14.0, "student_steps": 2}, VP),
    ("consistency", {**EASY, "student_level": 0.8}, FLOW),
    ("lcm", {"ddim_steps": 5, "student_level": 14.0}, VP),
    ("lcm", {"ddim_steps": 4, "student_level": 0.8, "timestep_scaling": 0.002}, FLOW),
    ("consistency", {**TRAINING, "distance": "l2"}, EDM_),
    ("consistency", {**TRAINING, "loss_weight": "inverse_step"}, FLOW),
    ("consistency", {**EASY}, EDM_),
    ("consistency", {**EASY, "stage_factor": 3.0, "ratio_limit": 0.8, "loss_weight": "uniform"}, VP),
    ("consistency", {**EASY, "easy_from": "teacher", "guidance_scale": 2.5}, EDM_),
    ("lcm", {"ddim_steps": 6, "guidance_min": 1.5, "guidance_max": 6.0, "huber_c": 0.2}, VP),
    ("lcm", {"ddim_steps": 3, "guidance_min": 2.5, "guidance_max": 2.5, "distance": "l2"}, EDM_),
    ("lcm", {"ddim_steps": 4, "timestep_scaling": 0.002, "student_steps": 2}, FLOW),
    ("lcm", {"ddim_steps": 5, "solver": "heun", "guidance_min": 1.5, "guidance_max": 6.0}, VP),
    ("lcm", {"ddim_steps": 4, "solver": "heun", "timestep_scaling": 0.002}, FLOW),
    ("lcm", {"ddim_steps": 4, "guidance_max": 3.0, "timestep_scaling": 0.002}, EPS),
    ("scott", {"solver_steps": 6, "skip": 4, "sde_steps": 2, "eta": 0.5, "guidance_scale": 2.5}, VP),
    ("scott", {"solver_steps": 5, "skip": 1, "sde_steps": 1, "distance": "huber", "huber_c": 0.2}, TRIG),
    ("multistep_consistency", {**SEGMENTS, "guidance_scale": 2.5}, VP),
    ("multistep_consistency", {**SEGMENTS, "eta": 0.3, "loss_weight": "v", "huber_c": 0.2}, EDM_),
    ("multistep_consistency", {**SEGMENTS, "eta": 0.3, "loss_weight": "uniform", "guidance_scale": 0.4}, FLOW),
    ("multistep_consistency", {**SEGMENTS, "mode": "training", "distance": "l2"}, EDM_),
]


@pytest.mark.parametrize(("name", "points"), [("consistency", "grid_points"), ("lcm", "ddim_steps")])
def test_a_student_gives_the_output_of_its_options_and_the_teacher_its_own(name: str, points: str) -> None:
    method = Straight(name, {"student_output": "v_prediction", points: 4}, EPS).method
    assert method.student.output.name == method.target.output.name == "v_prediction"
    assert method.teacher.output.name == "epsilon"


@pytest.mark.parametrize("step", [0, 3, 20])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(name, options, plain, step)
    agree_alone(straight.method, step, straight.batch, straight.turn)


@pytest.mark.parametrize("step", [0, 3])
def test_a_lora_student_of_lcm_is_its_own_target(step: int) -> None:
    options = {"ddim_steps": 4, "guidance_min": 2.5, "guidance_max": 2.5, "timestep_scaling": 0.002}
    straight = Straight("lcm", options, VP, step, lora={"student": LoraSettings(2, 3.0)})
    assert straight.method.target is straight.method.student and straight.method.state == {}
    (turn,) = straight.method.turns(step)
    agree(straight.method, turn, straight.batch, straight.turn)


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_who_is_asked_and_who_drops(name: str, options: dict[str, Any], plain: Plain) -> None:
    straight = Straight(name, options, plain)
    parts: dict[str, Any] = {"teacher": straight.teacher, "student": straight.student}
    if straight.target is not straight.student:
        parts["target"] = straight.target
    (turn,) = straight.method.turns(4)
    calls = modes({k: v.dropout for k, v in parts.items()}, lambda: turn.loss(straight.batch))
    assert all(dropping == (who != "teacher") for who, dropping in calls)
    untaught = straight.c.mode == "training" if hasattr(straight.c, "mode") else False
    untaught |= getattr(straight.c, "mode", "") == "easy" and straight.c.easy_from == "data"
    assert ("teacher" in dict(calls)) == (not untaught)
    assert not any(p.requires_grad for p in straight.teacher.parameters())


@pytest.mark.parametrize("step", [0, 3, 20])
@pytest.mark.parametrize(
    ("name", "options"), [("lcm", {"ddim_steps": 6}), ("consistency", {"grid_points": 6}), ("consistency", TRAINING)]
)
def test_the_target_is_the_students_average(name: str, options: dict[str, Any], step: int) -> None:
    straight = Straight(name, options | {"target_ema": 0.8}, VP, step)
    method = straight.method
    assert list(method.state) == ["target"] and method.state["target"] is method.target
    assert not any(p.requires_grad for p in method.target.parameters())
    decay = 0.8 ** (4 / straight.points()) if options is TRAINING else 0.8
    target, student = copies(method.target), copies(method.student)
    method.after_step(step)
    for new, old, own in zip(method.target.parameters(), target, student, strict=True):
        assert torch.allclose(new, decay * old + (1 - decay) * own, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(p, q) for p, q in zip(method.student.parameters(), student, strict=True))


@pytest.mark.parametrize(("name", "options"), [("multistep_consistency", {}), ("consistency", EASY)])
def test_without_a_slow_target_nothing_follows_the_step(name: str, options: dict[str, Any]) -> None:
    method = Straight(name, options, VP).method
    assert method.state == {} and method.target is method.student
    before = copies(method.student)
    method.after_step(3)
    assert all(torch.equal(p, q) for p, q in zip(method.student.parameters(), before, strict=True))


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for steps in (1, 3):
        sampler = Straight("consistency", {"student_steps": steps, "grid_points": 6}, plain).method.sampler()
        assert sampler.step == Renoise() and sampler.levels == pytest.approx(plain.levels(steps), rel=1e-12)
        straight = Straight("multistep_consistency", {"segments": steps}, plain)
        sampler = straight.method.sampler()
        assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(steps), rel=1e-12)
        assert sampler.denoiser is straight.method.student
    straight = Straight("lcm", {"student_steps": 3, "ddim_steps": 8}, plain)
    sampler = straight.method.sampler()
    rows = plain.levels(8)
    assert sampler.step == Renoise() and sampler.levels == pytest.approx([rows[0], rows[2], rows[5]], rel=1e-12)
    assert sampler.denoiser is straight.method.student


def test_rates_are_those_of_the_options() -> None:
    rates = {"student_lr": 0.1, "beta1": 0.3, "weight_decay": 0.4}
    for name, more in (("lcm", {"ddim_steps": 6}), ("consistency", {}), ("multistep_consistency", {})):
        assert Straight(name, {**rates, **more}, VP).method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)


def test_the_scale_is_added_to_the_class() -> None:
    """Sines and cosines of the scale through a small network, on top of the label's row."""
    embedding: Any = Straight(
        "lcm", {"ddim_steps": 6, "guidance_max": 4.0, "guidance_scale": 3.0}, VP
    ).student.class_embedding
    labels, scale = torch.tensor([0, 2, CLASSES]), torch.tensor([1.0, 2.5, 4.0])
    phase = scale[:, None] * torch.exp2(torch.linspace(-4, 1, 16))[None]
    added = embedding.mlp(torch.cat([torch.sin(phase), torch.cos(phase)], 1))
    with taking([embedding], scale):
        got = embedding(labels)
    assert torch.allclose(got, embedding.layer.weight[labels] + added, rtol=1e-6)
    assert float(embedding.default) == 3.0
