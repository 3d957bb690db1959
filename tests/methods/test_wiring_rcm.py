"""A whole turn of rCM, which plays two games, against a straight-line rewrite of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.rcm import RCM, Config
from diffdistill.players.sampler import Renoise
from diffdistill.scaffold.method import Need
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
    SIZE,
    TRIG,
    VP,
    Plain,
    agree,
    batch_of,
    draw,
    fold,
    gaussian,
    in_double,
    modes,
    nets,
    noised,
    normal,
    scatter,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """The turns of a training step, line by line; no network drops units."""

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        self.plain, self.key, self.step = plain, (KEY[0], step, KEY[2]), step
        self.c: Any = Config(**options)
        self.method = RCM(plain.teacher(dropout=0.3), self.c)
        for seed, player in enumerate(self.method.players.values()):
            scatter(player, 20 + seed)
        teacher = getattr(self.method.teacher, "denoiser", self.method.teacher)
        self.teacher, self.student, self.fake = nets(teacher, self.method.student, self.method.fake_score)
        self.batch = batch_of(self.key)
        self.labels, self.image = self.batch.cond["class_labels"], self.batch.images
        self.share = min(1.0, step / self.c.tangent_warmup) if self.c.tangent_warmup else 1.0
        self.x: Tensor | None = None

    def x0(self, net: Any, x_t: Tensor, t: Tensor) -> Tensor:
        return self.plain.x0_eps(net, x_t, t, class_labels=self.labels)[0]

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        x0, eps = self.plain.x0_eps(self.student, x_t, t, class_labels=self.labels)
        return fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0

    def guided(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain.guided(self.teacher, x_t, t, self.labels, float(self.c.guidance_scale))

    def consistency(self) -> Tensor:
        c = self.c
        t = self.plain.log_normal(gaussian("path/t", self.key), c.time_mean, c.time_std)
        cos, sin, x_t = fold(torch.cos(t)), fold(torch.sin(t)), noised(self.image, t, normal("path/eps", self.key))
        x0, eps = self.guided(x_t, t)
        v, speed = (cos * eps - sin * x0).detach(), torch.cos(t) * torch.sin(t)
        if c.derivative == "exact":
            change = torch.func.jvp(self.velocity, (x_t, t), (fold(speed) * v, speed))[1]
        else:  # semi
            h, low = c.derivative_step, self.plain.ends()[0]
            h = torch.where(t - h < low, -h, h)
            along = torch.func.jvp(lambda x: self.velocity(x, t), (x_t,), (v,))[1]
            before = self.velocity(x_t, t - h)
            change = fold(speed) * (along + (fold(h.cos()) * self.velocity(x_t, t) - before) / fold(h.sin()))
        f, r = self.velocity(x_t, t), self.share
        g = -cos * (1 - r**2 * sin**2).sqrt() * (f - v) - r * (cos * sin * x_t + change)
        if c.norm != "none":
            size = g.square().flatten(1)
            g = g / (fold((size.mean(1) if c.norm == "rms" else size.sum(1)).sqrt()) + c.norm_c)
        return (f - (f + g).detach()).square().flatten(1).mean(1).mean()

    def sample(self) -> Tensor:
        c, levels = self.c, self.plain.levels(self.c.student_steps, self.c.student_level)
        k = int(torch.randint(len(levels), (), generator=draw(*self.key[:2], "student/level"))) if levels[1:] else 0
        if c.fake_scores == "per_level":
            k = self.step // c.update_ratio % len(levels)
        x_t, t = self.plain.start(levels[0], normal("z", self.key))
        least = torch.full((SIZE,), 9.0)
        for j in range(1, k + 1):
            with torch.no_grad():
                x0 = self.x0(self.student, x_t, t)
            least = torch.minimum(least, self.plain.at(uniform(f"z {j}/t", self.key)))
            t = least if c.simulated_times == "drawn" else torch.full((SIZE,), self.plain.angle(levels[j]))
            x_t = noised(x0, t, normal(f"z {j}", self.key))
        return self.x0(self.student, x_t, t)

    def student_turn(self) -> Values:
        c, consistency = self.c, self.consistency()
        x = self.sample()
        self.x = x.detach()
        values = {"loss": c.consistency_weight * consistency, "consistency": consistency}
        if self.share < 1:
            return values
        t = self.plain.at(c.time_low + (c.time_high - c.time_low) * uniform("student/t", self.key))
        with torch.no_grad():
            x_t = noised(x, t, normal("student/eps", self.key))
            teacher, fake = self.guided(x_t, t)[0], self.x0(self.fake, x_t, t)
            size = (x - teacher).abs().flatten(1).mean(1)
            push = fold(1 / size if c.normalise else torch.tan(t) ** -2) * (fake - teacher)
        matching = 0.5 * (x - (x - push).detach()).square().mean()
        gap = ((fake - teacher).abs().flatten(1).mean(1) / size).mean()
        return values | {"loss": values["loss"] + matching, "gap": gap}

    def fake_turn(self) -> Values:
        if self.x is None:
            with torch.no_grad():
                self.x = self.sample()
        t, eps = self.plain.at(uniform("fake_score/t", self.key)), normal("fake_score/eps", self.key)
        x0, noise = self.plain.x0_eps(self.fake, noised(self.x, t, eps), t, class_labels=self.labels)
        cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
        loss = ((cos * noise - sin * x0) - (cos * eps - sin * self.x)).square().mean()
        return {"loss": loss, "denoising": loss}


EXACT = {"derivative": "exact", "time_mean": 0.2, "time_std": 1.1, "norm_c": 0.3, "update_ratio": 1, "student_steps": 4}
CASES: list[tuple[dict[str, Any], Plain]] = [
    ({**EXACT, "guidance_scale": 2.5, "tangent_warmup": 6, "student_steps": 1}, TRIG),
    ({**EXACT, "guidance_scale": 2.5, "tangent_warmup": 0, "consistency_weight": 3.0, "norm": "rms"}, VP),
    ({**EXACT, "tangent_warmup": 4, "time_low": 0.2, "time_high": 0.7, "norm": "none"}, FLOW),
    ({**EXACT, "tangent_warmup": 4, "simulated_times": "levels", "student_steps": 3, "normalise": False}, EDM_),
    ({**EXACT, "derivative": "semi", "derivative_step": 0.125, "student_level": 20.0}, EDM_),
    ({**EXACT, "tangent_warmup": 0, "fake_scores": "per_level", "student_steps": 2}, EPS),
]


def play(straight: Straight) -> list[str]:
    """Every turn of the step, each after the one before has moved its player."""
    turns = straight.method.turns(straight.step)
    for turn in turns:
        if turn.player != "student":  # of those of its level
            straight.fake = straight.method.fake_scores[int(turn.player[11:] or 1) - 1].network
        expected: Callable[[], Values] = straight.student_turn if turn.player == "student" else straight.fake_turn
        agree(straight.method, turn, straight.batch, expected)
        scatter(straight.method.players[turn.player], 40)
    return [turn.player for turn in turns]


@pytest.mark.parametrize("step", [3, 4, 20, 21])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    k = step % 2 if options.get("fake_scores") else 0
    straight.fake = straight.method.fake_scores[k].network
    assert play(straight) == ["student", f"fake_score_{k + 1}" if k else "fake_score"]


def test_the_fake_score_moves_alone_between_the_students_turns() -> None:
    for step in range(1, 8):
        straight = Straight({**EXACT, "update_ratio": 4}, FLOW, step)
        assert play(straight) == ([] if step % 4 else ["student"]) + ["fake_score"]


def test_nothing_drops_units() -> None:
    straight = Straight({**EXACT, "tangent_warmup": 0}, VP)
    parts = {"teacher": straight.teacher, "student": straight.student, "fake": straight.fake}
    for turn in straight.method.turns(4):
        calls = modes({name: net.dropout for name, net in parts.items()}, lambda turn=turn: turn.loss(straight.batch))
        assert not any(dropping for _, dropping in calls)
    assert not any(p.requires_grad for p in straight.teacher.parameters())


def test_needs_rates_and_the_sampler() -> None:
    rates = {"student_lr": 0.1, "fake_score_lr": 0.2, "beta1": 0.3, "weight_decay": 0.4}
    method = Straight({**EXACT, **rates, "student_steps": 3}, VP).method
    assert method.needs == frozenset({Need.IMAGES}) and list(method.players) == ["student", "fake_score"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("fake_score") == (0.2, (0.3, 0.999), 0.4)
    sampler = method.sampler()
    assert (sampler.denoiser, sampler.step) == (method.student, Renoise())
    assert sampler.levels == pytest.approx(VP.levels(3), rel=1e-12)
