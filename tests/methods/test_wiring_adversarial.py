"""A whole turn of the methods whose discriminator reads the frozen teacher, against a straight-line rewrite of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import Renoise
from diffdistill.scaffold.method import Need
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
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
    noised,
    normal,
    scatter,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """One method's turns at a training step, line by line."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        module = describe_method(name).load()
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        self.c: Any = module.Config(**options)
        self.method: Any = module.METHOD(plain.teacher(dropout=0.3), self.c)
        for seed, player in enumerate(self.method.players.values()):
            scatter(player, 20 + seed)
        self.teacher = self.method.adversary.teacher.network
        if name == "sana_sprint":
            scatter(self.method.weight, 5)
        self.student = self.method.student.network
        self.batch = batch_of(self.key)
        self.labels, self.image = self.batch.cond["class_labels"], self.batch.images
        self.x: Tensor | None = None

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        (head,) = self.method.adversary.heads
        time, _, _, factor = self.plain.native(t)
        return head(self.teacher.hidden(fold(factor) * x_t, time, self.labels))

    def noise(self, stream: str) -> tuple[Tensor, Tensor]:
        t = self.plain.log_normal(gaussian(f"{stream} t", self.key), self.c.gan_time_mean, self.c.gan_time_std)
        return t, normal(f"{stream} eps", self.key)

    def gan(self, x: Tensor) -> Tensor:
        t, eps = self.noise("student/gan")
        d = self.logits(noised(x, t, eps), t)
        return -d.mean() if self.c.gan_loss == "hinge" else F.softplus(-d).mean()

    def discriminator_turn(self) -> Values:
        if self.x is None:
            with torch.no_grad():
                self.x = self.sample()
        t, eps = self.noise("discriminator/gan")
        real, fake = self.logits(noised(self.image, t, eps), t), self.logits(noised(self.x, t, eps), t)
        if self.c.misaligned:
            t, eps = self.noise("discriminator/misaligned")
            others = torch.cat([self.image[-1:], self.image[:-1]])
            fake = torch.cat([fake, self.logits(noised(others, t, eps), t)])
        if self.c.gan_loss == "hinge":
            loss = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
        else:
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        if self.name == "gdd" and self.c.r1_weight and self.step % self.c.r1_every == 0:
            r1 = self.flat()
            return {"loss": loss + self.c.r1_every * self.c.r1_weight / 2 * r1, "gan": loss, "r1": r1}
        return {"loss": loss, "gan": loss}

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.plain.x0_eps(self.student, x_t, t, class_labels=self.labels)[0]

    # -- gdd ---------------------------------------------------------------------------------------------------------

    def one_step(self) -> Tensor:
        level = self.plain.levels(1)[0] if self.c.student_level is None else self.c.student_level
        return self.x0(*self.plain.start(level, normal("z", self.key)))

    def flat(self) -> Tensor:
        """|d'|^2 at the images, by a difference along noise."""
        t, eps = self.noise("discriminator/gan")
        near = self.image + 0.01 * normal("discriminator/r1", self.key)
        d = self.logits(noised(near, t, eps), t) - self.logits(noised(self.image, t, eps), t)
        return (d / 0.01).square().mean()

    # -- ladd --------------------------------------------------------------------------------------------------------

    def sample(self) -> Tensor:
        c, levels = self.c, self.plain.levels(self.c.student_steps, self.c.student_level)
        z, n = normal("z", self.key), len(levels)
        k = whole(n, "student/level", self.key)
        if c.noisiest_share is not None and n > 1:
            later = 1 + whole(n - 1, "student/level", self.key)
            k = torch.where(uniform("student/first", self.key) < c.noisiest_share, torch.zeros_like(later), later)
        t = torch.tensor([self.plain.angle(level) for level in levels])[k]
        noise, _ = self.plain.start(levels[0], z)
        return self.x0(torch.where(fold(k) == 0, noise, noised(self.image, t, z)), t)

    def student_turn(self) -> Values:
        if self.name == "sana_sprint":
            return self.sana_turn()
        x = self.one_step() if self.name == "gdd" else self.sample()
        self.x = x.detach()
        loss = self.gan(x)
        return {"loss": loss, "gan": loss}

    # -- sana_sprint -------------------------------------------------------------------------------------------------

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """All passes of the first term drop the same units."""
        torch.manual_seed(draw(*self.key, "student/dropout").initial_seed())
        x0, eps = self.plain.x0_eps(self.scaled(), x_t, t, class_labels=self.labels)
        return fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0

    def scales(self) -> Tensor:
        return self.c.guidance_min + (self.c.guidance_max - self.c.guidance_min) * uniform("student/scale", self.key)

    def scaled(self) -> Any:
        """The student's network, which finds the scale beside the label where there are several."""
        if self.c.guidance_min == self.c.guidance_max:
            return self.student
        scales = self.scales()
        return lambda x, time, class_labels: self.student(x, time, torch.stack([class_labels.double(), scales], 1))

    def consistency(self) -> tuple[Tensor, Tensor]:
        """(B,) weighted errors, and t."""
        c = self.c
        t = self.plain.log_normal(gaussian("student/t", self.key), c.time_mean, c.time_std)
        cos, sin, x_t = fold(torch.cos(t)), fold(torch.sin(t)), noised(self.image, t, normal("student/eps", self.key))
        x0, eps = self.plain.guided(self.teacher, x_t, t, self.labels, self.scales())
        v, speed = (cos * eps - sin * x0).detach(), torch.cos(t) * torch.sin(t)
        change = torch.func.jvp(self.velocity, (x_t, t), (fold(speed) * v, speed))[1]
        f = self.velocity(x_t, t)
        share = min(1.0, self.step / c.tangent_warmup) if c.tangent_warmup else 1.0
        g = -(cos**2) * (f - v) - share * (cos * sin * x_t + change)
        size = g.square().flatten(1)
        g = g / (fold((size.mean(1) if c.norm == "rms" else size.sum(1)).sqrt()) + c.norm_c)
        return (f - (f + g).detach()).square().flatten(1).mean(1) / torch.tan(t), t

    def sana_turn(self) -> Values:
        c = self.c
        state = torch.get_rng_state()  # the passes of the first term leave the global generator as it was
        error, t = self.consistency()
        torch.set_rng_state(state)
        self.errors = error.detach(), t
        s, z = (
            self.plain.log_normal(gaussian("student/gan input t", self.key), c.time_mean, c.time_std),
            normal("z", self.key),
        )
        noise, top = self.plain.start(self.plain.levels(c.student_steps, c.student_level)[0], z)
        first = uniform("student/first", self.key) < c.noisiest_share
        s, x_t = torch.where(first, top, s), torch.where(fold(first), noise, noised(self.image, s, z))
        x = self.plain.x0_eps(self.scaled(), x_t, s, class_labels=self.labels)[0]
        self.x, gan = x.detach(), self.gan(x)
        loss = (torch.exp(-self.method.weight(t)).detach() * error).mean() + c.gan_weight * gan
        return {"loss": loss, "error": error.mean(), "gan": gan}

    def weight_turn(self) -> Values:
        error, t = self.errors
        w = self.method.weight(t)
        return {"loss": (torch.exp(-w) * error + w).mean()}


SEEN = {"gan_time_mean": -0.4, "gan_time_std": 0.8}
SCM = {**SEEN, "derivative": "exact", "tangent_warmup": 8, "time_mean": 0.1, "time_std": 1.2, "norm_c": 0.3}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("ladd", {**SEEN}, TRIG),
    ("ladd", {**SEEN, "gan_loss": "logistic", "student_level": 9.0}, VP),
    ("ladd", {**SEEN, "student_steps": 3, "misaligned": True}, FLOW),
    ("ladd", {**SEEN, "student_steps": 3, "noisiest_share": 0.4, "update_ratio": 2}, EDM_),
    ("ladd", {"student_steps": 2, "student_level": 20.0, "gan_loss": "logistic", "misaligned": True}, EPS),
    ("gdd", {**SEEN, "r1_weight": 0.7, "r1_every": 3}, TRIG),
    ("gdd", {**SEEN, "r1_weight": 0.7, "r1_every": 4, "gan_loss": "hinge", "student_level": 9.0}, VP),
    ("gdd", {**SEEN, "r1_weight": 0.0, "r1_every": 2, "misaligned": True}, FLOW),
    ("gdd", {"student_level": 2.5, "r1_weight": 0.3, "r1_every": 1}, EDM_),
    ("sana_sprint", {**SCM}, TRIG),
    ("sana_sprint", {**SCM, "tangent_warmup": 0, "noisiest_share": 0.3, "student_steps": 2, "misaligned": True}, FLOW),
    ("sana_sprint", {**SCM, "guidance_min": 2.5, "guidance_max": 2.5, "norm": "rms", "gan_weight": 0.9}, EDM_),
    ("sana_sprint", {**SCM, "guidance_min": 2.0, "guidance_max": 5.0, "gan_loss": "logistic"}, VP),
]


def play(straight: Straight) -> list[str]:
    """Every turn of the step, each after the one before has moved its player."""
    turns = straight.method.turns(straight.step)
    for turn in turns:
        expected: Callable[[], Values] = getattr(straight, f"{turn.player}_turn")
        agree(straight.method, turn, straight.batch, expected)
        scatter(straight.method.players[turn.player], 40)
    return [turn.player for turn in turns]


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    order = play(Straight(name, options, plain, step))
    assert order == ["student", "discriminator"] + ["weight"] * (name == "sana_sprint")


def test_the_discriminator_moves_alone_between_the_students_turns() -> None:
    for step in range(4):
        straight = Straight("ladd", {**SEEN, "update_ratio": 3, "student_steps": 3}, TRIG, step)
        assert play(straight) == ([] if step % 3 else ["student"]) + ["discriminator"]


@pytest.mark.parametrize(("name", "options", "plain"), [CASES[k] for k in (0, 1, 3, 5, 10)])
def test_who_drops_units(name: str, options: dict[str, Any], plain: Plain) -> None:
    """The student as its network does, the teacher never."""
    straight = Straight(name, options, plain)
    parts = {"teacher": straight.teacher.dropout, "student": straight.student.dropout}
    for turn in straight.method.turns(4):
        calls = modes(parts, lambda turn=turn: turn.loss(straight.batch))
        assert all(dropping == (who == "student") for who, dropping in calls)
    assert not any(p.requires_grad for p in straight.teacher.parameters())


def test_needs_rates_and_the_sampler() -> None:
    rates = {"student_lr": 0.1, "discriminator_lr": 0.2, "beta1": 0.3, "weight_decay": 0.4}
    method = Straight("ladd", {**rates, "student_steps": 3}, VP).method
    assert method.needs == frozenset({Need.IMAGES}) and list(method.players) == ["student", "discriminator"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("discriminator") == (0.2, (0.3, 0.999), 0.4)
    sampler = method.sampler()
    assert (sampler.denoiser, sampler.step) == (method.student, Renoise())
    assert sampler.levels == pytest.approx(VP.levels(3), rel=1e-12)
    method = Straight("gdd", {**rates, "student_level": 9.0}, VP).method
    assert method.needs == frozenset({Need.IMAGES}) and list(method.players) == ["student", "discriminator"]
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("discriminator") == (0.2, (0.3, 0.999), 0.4)
    assert (method.sampler().denoiser, method.sampler().levels) == (method.student, (9.0,))
    method = Straight("sana_sprint", {**rates, "weight_lr": 0.7, "student_steps": 3}, VP).method
    assert list(method.players) == ["student", "discriminator", "weight"] and method.needs == frozenset({Need.IMAGES})
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("discriminator") == (0.2, (0.3, 0.999), 0.4)
    assert method.optimizer("weight") == (0.7, (0.3, 0.999), 0.0)
    assert method.sampler().levels == pytest.approx(VP.levels(3), rel=1e-12)
