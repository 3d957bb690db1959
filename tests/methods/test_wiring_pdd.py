"""Whole turns of pdd, against a straight-line rewrite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.pdd import PDD, Config
from diffdistill.players.sampler import DDIM
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
    SIZE,
    TRIG,
    VP,
    Plain,
    agree_alone,
    batch_of,
    draw,
    fold,
    in_double,
    noised,
    normal,
    scatter,
    uniform,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)


class Straight:
    """A training step, line by line."""

    def __init__(self, options: dict[str, Any], plain: Plain, step: int = KEY[1]):
        self.plain, self.key = plain, (KEY[0], step, KEY[2])
        self.c: Any = Config(**options)
        self.method = PDD(plain.teacher(dropout=0.3), self.c)
        scatter(self.method.student, 20)
        self.batch = batch_of(self.key, images=False)
        self.labels = self.batch.cond["class_labels"]
        self.levels = plain.levels(self.c.intervals, self.c.student_level)
        self.angles = [*(plain.angle(level) for level in self.levels), 0.0]

    def heads(self, x: Tensor, first: int) -> Tensor:
        """(N, B, 1, h, w) what a pass at that step says."""
        net: Any = self.method.student.network
        s = torch.full((SIZE,), self.angles[first])
        return self.plain.output(net, x, s, class_labels=self.labels).movedim(1, 0)[:, :, None]

    def step(self, y: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x after the step k by that head's output, and v there."""
        t, s = (torch.full((SIZE,), angle) for angle in self.angles[k : k + 2])
        x0, eps = self.plain.x0_eps(lambda *_, **__: y, x, t)
        return noised(x0, s, eps), fold(torch.cos(t)) * eps - fold(torch.sin(t)) * x0

    def turn(self) -> Values:
        c, plain = self.c, self.plain
        numbers = list(dict.fromkeys([c.student_steps, *c.more_steps]))
        passes = numbers[int(torch.randint(len(numbers), (), generator=draw(*self.key[:2], "student/passes")))]
        k = int(torch.randint(passes, (), generator=draw(*self.key[:2], "student/level")))
        block = c.intervals // passes
        x, _ = plain.start(self.levels[0], normal("z", self.key))
        with torch.no_grad():
            for j in range(k):
                y = self.heads(x, j * block)
                for i in range(j * block, (j + 1) * block):
                    x, _ = self.step(y[i], x, i)
        y, rows = self.heads(x, k * block), torch.arange(SIZE)
        said, states, theirs = [], [], []
        for i in range(k * block, (k + 1) * block):
            states.append(x)
            with torch.no_grad():
                theirs.append(self.taught(x, i))
                after, _ = self.step(y[i], x, i)
            said.append(self.step(y[i], x, i)[1])
            x = after
        errors = torch.stack([(a - b).square().flatten(1).mean(1) for a, b in zip(said, theirs, strict=True)])
        count = min(c.states or block, block)
        u = uniform("student/head", self.key)
        chosen = [errors[torch.floor((j + u) * block / count).long(), rows] for j in range(count)]
        loss = torch.stack(chosen).mean()
        return {"loss": loss, "imitation": loss}

    def taught(self, x: Tensor, k: int) -> Tensor:
        """v of the step that does as the guided teacher's several."""
        n, (t, s) = self.c.solver_steps, self.angles[k : k + 2]
        teacher: Any = self.method.teacher
        net, end = getattr(teacher, "denoiser", teacher).network, x
        for j in range(n):
            here, there = (torch.full((SIZE,), t + (j + i) / n * (s - t)) for i in (0, 1))
            x0, eps = self.plain.guided(net, end, here, self.labels, float(self.c.guidance_scale))
            end = noised(x0, there, eps)
        way = torch.tensor(t - s)
        return (torch.cos(way) * x - end) / torch.sin(way)


CASES: list[tuple[dict[str, Any], Plain]] = [
    ({"intervals": 6, "student_steps": 3, "guidance_scale": 2.5}, VP),
    ({"intervals": 8, "student_steps": 2, "more_steps": (4, 1), "states": 3}, TRIG),
    ({"intervals": 4, "student_steps": 2, "states": 2, "solver_steps": 3}, EDM_),
    ({"intervals": 6, "student_steps": 1, "more_steps": (3,), "student_level": 0.9}, FLOW),
    ({"intervals": 4, "student_steps": 2, "student_level": 19.0}, EPS),
]


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(("options", "plain"), CASES)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(options, plain, step)
    straight.method.student.eval()  # dropout is that of one pass
    agree_alone(straight.method, step, straight.batch, straight.turn)


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
@pytest.mark.parametrize("passes", [2, 4])
def test_a_sample_is_where_the_heads_lead(plain: Plain, passes: int) -> None:
    straight = Straight({"intervals": 8, "student_steps": 2, "more_steps": (4,)}, plain)
    straight.method.student.eval()
    straight.method.in_steps(passes)
    sampler = straight.method.sampler()
    assert sampler.step == DDIM() and sampler.levels == pytest.approx(straight.levels[:: 8 // passes], rel=1e-12)
    z = torch.randn(SIZE, *straight.batch.shape)
    x, t = sampler.input_at(passes - 1, z, straight.batch.cond, lambda j: z)
    got = sampler.denoiser(x, t, straight.batch.cond).x0
    y, _ = plain.start(sampler.levels[0], z)
    for k in range(8):
        if k % (8 // passes) == 0:
            heads = straight.heads(y, k)
        y, _ = straight.step(heads[k], y, k)
    assert torch.allclose(got, y, rtol=1e-9), (got - y).abs().max()
