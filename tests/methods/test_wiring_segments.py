"""Whole turns of the methods whose student jumps to the end of a segment, against a straight-line rewrite."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import DDIM
from diffdistill.scaffold.segments import SegmentMethod
from tests.scaffold.straight import (
    CLASSES,
    EDM_,
    FLOW,
    KEY,
    TRIG,
    VP,
    Plain,
    agree,
    batch_of,
    draw,
    fold,
    in_double,
    nets,
    noised,
    normal,
    scatter,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """One method's turn at a training step, line by line; the networks drop units, both passes the same ones."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        module = describe_method(name).load()
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        self.c: Any = module.Config(**options)
        self.method: SegmentMethod = module.METHOD(replace(plain.teacher(dropout=0.3), lora={}), self.c)
        scatter(self.method.student, 20)
        self.teacher, self.student = nets(self.method.teacher, self.method.student)
        self.slow = self.student
        if self.method.target is not self.method.student:
            scatter(self.method.target, 21)
            _, self.slow = nets(self.method.teacher, self.method.target)
        self.batch = batch_of(self.key, images=name != "mlcm")
        self.labels = self.batch.cond["class_labels"]
        self.copies = getattr(self.c, "states", 1)
        if getattr(self.c, "reward_weight", 0):
            self.method.reward = lambda x, batch, gradient: self.reward(x, batch.cond["class_labels"])
        if self.c.gan_weight:
            scatter(self.method.adversary.heads, 22)
        self.image = self.batch.x0
        levels = plain.levels(self.c.solver_steps, self.c.student_level)
        self.grid = torch.tensor([plain.angle(level) for level in levels] + [0.0])

    # -- what each method says ---------------------------------------------------------------------------------------

    def _pcm(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """The phase of each step, by looking where it lies."""
        n = self.c.solver_steps // self.c.phases
        below = torch.tensor([n * (int(k) // n) for k in i])
        return self.grid[below], self.grid[below + n]

    def _tscd(self, i: Tensor) -> tuple[Tensor, Tensor]:
        stages = self.c.stages
        n = self.c.solver_steps // stages[min(self.step // self.c.stage_steps, len(stages) - 1)]
        below = torch.tensor([n * (int(k) // n) for k in i])
        return self.grid[below], self.grid[below + n]

    _mlcm = _tscd

    def _tdd(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """One sample after the other, in timesteps or levels."""
        c, plain = self.c, self.plain
        levels = [*plain.levels(c.solver_steps, c.student_level), None]  # None: clean data

        def time(level: float | None) -> float:
            return 0.0 if level is None else float(self.fraction(torch.tensor([plain.angle(level)]).double()))

        picks = {k * c.solver_steps // n for n in range(c.steps_min, c.steps_max + 1) for k in range(1, n)}
        targets = [None, *(levels[j] for j in sorted(picks, reverse=True))]
        u, v = uniform("student/target", self.key), uniform("student/shorter", self.key)
        tops, ends = [], []
        for row, k in enumerate(i.tolist()):
            low = [level for level in targets if time(level) <= time(levels[k + 1]) + 1e-9]
            near = [level for level in low if time(level) >= time(low[-1]) - c.reach - 1e-9]
            level = near[int(u[row] * len(near))]
            made = None if level is None else level * (1 - c.eta * float(v[row]))
            s = torch.tensor(0.0) if made is None else self.between(made)
            ends.append(s)
            at = self.fraction(s[None])[0] + 1 / c.steps_min
            tops.append(plain.at(at.clamp(max=1.0)[None])[0].clamp(max=self.grid[0]))
        return torch.stack(tops), torch.stack(ends)

    def between(self, level: float) -> Tensor:
        """The angle of a level, also between two timesteps."""
        if self.plain.kind != "vp":
            return torch.tensor(self.plain.angle(level))
        table, k = self.plain.table(), int(level)
        return table[k] + (level - k) * (table[min(k + 1, len(table) - 1)] - table[k])

    # -- the turn ----------------------------------------------------------------------------------------------------

    def jump(self, net: Any, x: Tensor, t: Tensor, e: Tensor) -> Tensor:
        torch.manual_seed(draw(*self.key[:2], self.copies * self.key[2], "student/dropout").initial_seed())
        x0, eps = self.plain.x0_eps(net, x, t, class_labels=self.labels)
        return noised(x0, e, eps)

    def walked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f, its target, the end and the segment's noisiest angle, on states of the teacher's trajectories."""
        c, plain, labels = self.c, self.plain, self.batch.cond["class_labels"]
        x = plain.start(plain.levels(1, c.student_level)[0], normal("z", self.key))[0]
        states = [x]
        with torch.no_grad():
            scale = c.guidance_scale + c.guidance_spread * (2 * uniform("teacher/scale", self.key) - 1)
            for t, s in zip(self.grid[:-1], self.grid[1:], strict=True):
                x0, eps = plain.guided(self.teacher, states[-1], t.expand(len(x)), labels, scale)
                states.append(noised(x0, s.expand(len(x)), eps))
        i = whole(c.solver_steps, "student/step", self.key, self.copies)
        row, self.labels = torch.arange(len(i)) // self.copies, labels.repeat_interleave(self.copies)
        top, e = self._mlcm(i)
        x_t, x_r = (torch.stack([states[k][n] for k, n in zip(at.tolist(), row, strict=True)]) for at in (i, i + 1))
        if self.last():
            return self.jump(self.student, x_t, self.grid[i], e), states[-1][row], e, top
        with torch.no_grad():
            r = self.grid[i + 1]
            target = torch.where(fold(r) <= fold(e), x_r, self.jump(self.student, x_r, r, e))
        return self.jump(self.student, x_t, self.grid[i], e), target, e, top

    def last(self) -> bool:
        """Whether the training step is of the last stage."""
        return self.step >= self.c.stage_steps * (len(self.c.stages) - 1)

    def reward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Of samples under their labels."""
        return torch.sin(3 * x).flatten(1).mean(1) * (1 + labels)

    def ends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f, its target, the end and the segment's noisiest angle."""
        if self.name == "mlcm":
            return self.walked()
        c, plain = self.c, self.plain
        if getattr(c, "label_dropout", 0):
            dropped = uniform("student/drop", self.key) < c.label_dropout
            self.labels = torch.where(dropped, CLASSES, self.batch.cond["class_labels"])
        i = whole(c.solver_steps, "student/step", self.key)
        t, r = self.grid[i], self.grid[i + 1]
        top, e = getattr(self, f"_{self.name}")(i)
        x_t = noised(self.image, t, normal("student/eps", self.key))
        with torch.no_grad():
            scale = c.guidance_scale + c.guidance_spread * (2 * uniform("student/scale", self.key) - 1)
            x0, eps = plain.guided(self.teacher, x_t, t, self.labels, scale)
            x_r = noised(x0, r, eps)
            target = torch.where(fold(r) <= fold(e), x_r, self.jump(self.slow, x_r, r, e))
        return self.jump(self.student, x_t, t, e), target, e, top

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.c.huber_c
        d = x - y
        return (d.square() if self.c.distance == "l2" else torch.sqrt(d.square() + c**2) - c).mean()

    def fraction(self, t: Tensor) -> Tensor:
        """Of the schedule's own time."""
        plain = self.plain
        if plain.kind == "trig":
            return t / (math.pi / 2)
        if plain.kind == "vp":
            time = plain.native(t)[0]
            return torch.where(t < plain.table()[0], t / plain.table()[0], 1 + time) / plain.steps
        raise AssertionError(plain.kind)

    def logits(self, x: Tensor, e: Tensor, top: Tensor, stream: str, noise: str) -> Tensor:
        (head,) = self.method.adversary.heads
        u = uniform(f"{stream} t", self.key, self.copies)
        t = self.plain.at(self.fraction(e) + u * (self.fraction(top) - self.fraction(e)))
        kept = fold(torch.cos(t) / torch.cos(e))
        x_t = kept * x + torch.sqrt(1 - kept**2) * normal(noise, self.key, self.copies)
        time, _, _, factor = self.plain.native(t)
        return head(self.teacher.hidden(fold(factor) * x_t, time, self.labels))

    def turn(self) -> Values:
        f, target, e, top = self.ends()
        loss = d = self.distance(f, target)
        values = {"consistency": d}
        distance, gan = self.weights()
        loss = distance * d
        if gan:
            values["gan"] = torch.relu(1 - self.logits(f, e, top, "student/gan", "student/gan eps")).mean()
            loss = loss + gan * values["gan"]
        if getattr(self.c, "reward_weight", 0) and self.last():
            values["reward"] = self.reward(f, self.labels).mean()
            loss = loss - self.c.reward_weight * values["reward"]
        return {"loss": loss, **values}

    def weights(self) -> tuple[float, float]:
        c = self.c
        if self.name != "tscd":
            return 1.0, c.gan_weight
        k = min(self.step // c.stage_steps, len(c.stages) - 1)
        share = k / (len(c.stages) - 1)
        return 1 - share + share * c.last_distance, c.gan_weight * (k + 1) / len(c.stages)

    def critic(self) -> Values:
        f, target, e, top = self.ends()
        real, fake = (
            self.logits(x.detach(), e, top, "discriminator/gan", f"discriminator/gan eps {kind}")
            for x, kind in ((target, "real"), (f, "fake"))
        )
        loss = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
        return {"loss": loss, "gan": loss}


GAN = {"gan_weight": 0.7}
SPREAD = {"guidance_scale": 2.5, "guidance_spread": 0.5}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("pcm", {"solver_steps": 6, "phases": 3, "guidance_scale": 2.5, "guidance_spread": 0.5}, VP),
    ("pcm", {"solver_steps": 6, "phases": 2, "distance": "l2"}, EDM_),
    ("pcm", {"solver_steps": 4, "phases": 1, "guidance_scale": 0.4, "huber_c": 0.2}, FLOW),
    ("pcm", {"solver_steps": 6, "phases": 2, **GAN}, TRIG),
    ("pcm", {"solver_steps": 6, "phases": 2, "student_level": 17.0, **GAN}, VP),
    ("tscd", {"solver_steps": 4, "stages": (4, 2, 1), "stage_steps": 2, "guidance_scale": 2.5}, EDM_),
    ("tscd", {"solver_steps": 4, "stages": (4, 1), "stage_steps": 2, "last_distance": 0.3, **GAN}, VP),
    ("tscd", {"solver_steps": 4, "stages": (2, 1), "stage_steps": 2, "reward_weight": 0.6, **GAN}, TRIG),
    ("mlcm", {"solver_steps": 4, "stages": (4, 2, 1), "stage_steps": 1, "guidance_scale": 2.5, "states": 3}, EDM_),
    ("mlcm", {"solver_steps": 4, "stages": (4, 2, 1), "stage_steps": 2, "states": 2, **SPREAD, **GAN}, TRIG),
    ("mlcm", {"solver_steps": 4, "stages": (2, 1), "stage_steps": 3, "states": 2, "reward_weight": 0.6, **GAN}, VP),
    ("tdd", {"solver_steps": 8, "steps_min": 2, "steps_max": 4, "guidance_scale": 2.5, **GAN}, TRIG),
    ("tdd", {"solver_steps": 8, "steps_min": 2, "steps_max": 3, "label_dropout": 0.5, "reach": 0.4, **GAN}, VP),
]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(name, options, plain, step)
    turns = straight.method.turns(step)
    assert [turn.player for turn in turns] == ["student"] + ["discriminator"] * ("gan_weight" in options)
    for turn, expected in zip(turns, (straight.turn, straight.critic), strict=False):
        agree(straight.method, turn, straight.batch, expected)


def test_the_target_is_the_students_average_or_the_student() -> None:
    method = Straight("tscd", {"solver_steps": 4, "stages": (2, 1), "target_ema": 0.8}, VP).method
    assert sorted(method.state) == ["stage", "target"] and method.state["target"] is method.target
    before, student = ([p.detach().clone() for p in net.parameters()] for net in (method.target, method.student))
    method.after_step(0)
    for new, old, own in zip(method.target.parameters(), before, student, strict=True):
        assert torch.allclose(new, 0.8 * old + 0.2 * own, rtol=1e-12, atol=1e-14) and not new.requires_grad
    for name, options in (("mlcm", {"stages": (2, 1)}), ("pcm", {"phases": 2})):
        method = Straight(name, {"solver_steps": 4, **options}, VP).method
        assert method.target is method.student and "target" not in method.state


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_samplers_levels_and_step(plain: Plain) -> None:
    for phases in (1, 3):
        straight = Straight("pcm", {"solver_steps": 6, "phases": phases}, plain)
        sampler = straight.method.sampler()
        assert sampler.step == DDIM() and sampler.levels == pytest.approx(plain.levels(phases), rel=1e-12)
        assert sampler.denoiser is straight.method.student
