"""A whole turn of the methods that halve their steps, against a straight-line rewrite of it; and their stages."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import DDIM
from diffdistill.scaffold.halving import HalvingMethod, two_step_target
from diffdistill.scaffold.method import Need
from tests.scaffold.straight import (
    CLASSES,
    EDM_,
    FLOW,
    KEY,
    SIZE,
    TRIG,
    VP,
    Plain,
    agree,
    batch_of,
    copies,
    fold,
    in_double,
    modes,
    nets,
    noised,
    normal,
    scatter,
    uniform,
    whole,
)

Values = dict[str, Tensor]
_double = pytest.fixture(autouse=True)(in_double)
FIRST, STAGE = 3, 5  # training steps of the first turns of "guided", and of a halving


class Straight:
    """A training step of progressive distillation or of guided distillation, line by line."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, step: int):
        module = describe_method(name).load()
        first = {"guidance_steps": FIRST} if name == "guided" else {}
        self.c: Any = module.Config(**{"start_steps": 8, "stage_steps": STAGE} | first | options)
        self.method: HalvingMethod = module.METHOD(plain.teacher(dropout=0.3), self.c)
        self.name, self.plain, self.key, self.step = name, plain, (KEY[0], step, KEY[2]), step
        scatter(self.method.student, 20)
        scatter(self.method.previous, 21)
        self.teacher, self.student, self.previous = nets(self.method.teacher, self.method.student, self.method.previous)
        self.batch = batch_of(self.key)
        self.labels = self.batch.cond["class_labels"]
        assert self.batch.x0 is not None
        self.image = self.batch.x0

    @property
    def halving_step(self) -> int:
        return self.step - (FIRST if self.name == "guided" else 0)

    def stage(self) -> int:
        return min(self.halving_step // STAGE, 2)  # 8 -> 4 -> 2 -> 1

    def taken(self) -> tuple[Tensor, Any]:
        """The scales of the batch, and the labels with them for a network that takes the scale."""
        c = self.c
        scale = c.guidance_min + (c.guidance_max - c.guidance_min) * uniform("student/scale", self.key)
        packed = torch.stack([self.labels.double(), scale], 1)
        return scale, packed if c.guidance_min < c.guidance_max else self.labels

    def weighted(self, x0: Tensor, target: Tensor, t: Tensor) -> Values:
        snr = (torch.cos(t) / torch.sin(t)) ** 2
        weight = torch.maximum(snr, torch.ones_like(snr)) if self.c.weight == "truncated_snr" else snr + 1
        loss = (weight * (x0 - target).flatten(1).square().mean(1)).mean()
        return {"loss": loss, "x0_error": loss}

    def turn(self) -> Values:
        if self.halving_step < 0:
            scale, labels = self.taken()
            t = self.plain.at(uniform("student/t", self.key))
            x_t = noised(self.image, t, normal("student/eps", self.key))
            target = self.plain.guided(self.teacher, x_t, t, self.labels, scale)[0].detach()
            return self.weighted(self.plain.x0_eps(self.student, x_t, t, class_labels=labels)[0], target, t)
        stream = "" if self.name == "progressive" else "student/"
        steps = 4 >> self.stage()
        stride = 8 // steps
        grid = torch.tensor([self.plain.angle(level) for level in self.plain.levels(8)] + [0.0])
        i = stride * whole(steps, f"{stream}i", self.key)
        t, mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        x_t = noised(self.image, t, normal(f"{stream}eps", self.key))
        if self.name == "snap_fusion":
            return self.mixed(x_t, t, mid, s)
        labels: Any = self.labels if self.name == "progressive" else self.taken()[1]
        with torch.no_grad():
            x_s = self.lead(self.lead(x_t, t, mid, labels), mid, s, labels)
            target = (fold(torch.sin(t)) * x_s - fold(torch.sin(s)) * x_t) / fold(torch.sin(t - s))
        return self.weighted(self.plain.x0_eps(self.student, x_t, t, class_labels=labels)[0], target, t)

    def mixed(self, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor) -> Values:
        """SnapFusion's: both guided, at scales of a share of the samples, and the error in v on the data."""
        c, labels, teacher = self.c, self.labels, self.teacher if self.stage() == 0 else self.previous
        drawn = c.compared_min + (c.compared_max - c.compared_min) * uniform("student/scale", self.key)
        scale = torch.where(uniform("student/guided", self.key) < c.guided_share, drawn, torch.ones_like(drawn))
        x = x_t
        with torch.no_grad():
            for start, end in ((t, mid), (mid, s)):
                x0, eps = self.plain.guided(teacher, x, start, labels, scale)
                x = noised(x0, end, eps)
            target = (fold(torch.sin(t)) * x - fold(torch.sin(s)) * x_t) / fold(torch.sin(t - s))
        distilled = self.weighted(self.plain.guided(self.student, x_t, t, labels, scale)[0], target, t)["loss"]
        t = self.plain.at(uniform("student/diffusion t", self.key))
        x_t = noised(self.image, t, normal("student/diffusion eps", self.key))
        x0 = self.plain.x0_eps(self.student, x_t, t, class_labels=labels)[0]
        diffusion = ((x0 - self.image).flatten(1).square().mean(1) / torch.sin(t) ** 2).mean()
        return {
            "loss": diffusion + c.distillation_weight * distilled,
            "x0_error": distilled,
            "diffusion": diffusion,
        }

    def lead(self, x: Tensor, t: Tensor, s: Tensor, labels: Any) -> Tensor:
        """A DDIM step of the stage's teacher."""
        if self.name == "progressive" and self.stage() == 0:
            x0, eps = self.plain.guided(self.teacher, x, t, labels, float(self.c.guidance_scale))
        else:
            x0, eps = self.plain.x0_eps(self.previous, x, t, class_labels=labels)
        return noised(x0, s, eps)


CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("progressive", {"guidance_scale": 2.5}, VP),
    ("progressive", {"weight": "snr_plus_one"}, EDM_),
    ("progressive", {"guidance_scale": 0.3}, FLOW),
    ("guided", {"guidance_min": 1.5, "guidance_max": 6.0}, VP),
    ("guided", {"guidance_min": 2.5, "guidance_max": 2.5, "weight": "snr_plus_one"}, EDM_),
    ("guided", {"guidance_max": 3.0}, TRIG),
    ("snap_fusion", {"final_steps": 1, "distillation_weight": 0.3}, VP),
    ("snap_fusion", {"final_steps": 1, "compared_max": 6.0, "weight": "snr_plus_one", "guided_share": 0.4}, FLOW),
]


@pytest.mark.parametrize("step", [0, 2, 4, 7, 9, 16, 40])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain, step: int) -> None:
    straight = Straight(name, options, plain, step)
    (turn,) = straight.method.turns(step)
    assert turn.player == "student"
    agree(straight.method, turn, straight.batch, straight.turn)


def test_rates_fall_within_a_stage_and_optimizers_begin_with_it() -> None:
    turns = [Straight("progressive", {}, VP, 0).method.turns(step)[0] for step in range(17)]
    falling = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [turn.lr_factor for turn in turns] == pytest.approx([*falling * 3, 0.0, 0.0], abs=1e-12)
    assert [step for step, turn in enumerate(turns) if turn.restart] == [5, 10]
    method = Straight("guided", {}, VP, 0).method
    turns = [method.turns(step)[0] for step in range(20)]
    assert [turn.lr_factor for turn in turns] == pytest.approx([1, 2 / 3, 1 / 3, *falling * 3, 0, 0], abs=1e-12)
    assert [step for step, turn in enumerate(turns) if turn.restart] == [3, 8, 13]
    assert method.whole == 18 and Straight("progressive", {}, VP, 0).method.whole == 15


@pytest.mark.parametrize("name", ["progressive", "guided"])
def test_the_student_becomes_the_teacher_of_the_next_stage(name: str) -> None:
    method = Straight(name, {}, VP, 0).method
    assert list(method.state) == ["stage"] and method.state["stage"] is method.stage
    begins = {8, 13, 3} if name == "guided" else {5, 10}
    for step in range(17):
        scatter(method.student, 60 + step)
        before, own = copies(method.previous), copies(method.student)
        method.after_step(step)
        assert int(method.stage.done) == step + 1
        expected = own if step + 1 in begins else before
        assert all(torch.equal(p, q) for p, q in zip(method.previous.parameters(), expected, strict=True)), step
        assert all(torch.equal(p, q) for p, q in zip(method.student.parameters(), own, strict=True))


@pytest.mark.parametrize("plain", [VP, EDM_, FLOW])
def test_the_sampler_takes_the_steps_of_the_stage(plain: Plain) -> None:
    for name, late in (("progressive", 0), ("guided", FIRST)):
        method = Straight(name, {"final_steps": 2}, plain, 0).method  # 8 -> 4 -> 2
        for done, steps in ((0, 2), (1, 4), (late + 5, 4), (late + 6, 2), (late + 30, 2)):
            method.stage.done.fill_(done)
            sampler = method.sampler()
            rows = plain.levels(8)[:: 8 // steps]
            assert sampler.levels == pytest.approx(rows, rel=1e-12), (name, done)
            assert sampler.step == DDIM() and sampler.denoiser is method.student


@pytest.mark.parametrize("step", [0, 4, 9])
@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_nobody_drops_units_and_the_student_alone_is_trained(
    name: str, options: dict[str, Any], plain: Plain, step: int
) -> None:
    straight = Straight(name, options, plain, step)
    parts = {"teacher": straight.teacher, "student": straight.student, "previous": straight.previous}
    (turn,) = straight.method.turns(step)
    calls = modes({k: v.dropout for k, v in parts.items()}, lambda: turn.loss(straight.batch))
    assert not any(dropping for _, dropping in calls)
    first = straight.halving_step < 0 or (name != "guided" and straight.stage() == 0)
    assert {who for who, _ in calls} == {"student", "teacher" if first else "previous"}
    assert list(straight.method.players) == ["student"] and straight.method.needs == frozenset({Need.IMAGES})
    frozen = (straight.teacher, straight.previous)
    assert not any(p.requires_grad for net in frozen for p in net.parameters())
    assert all(p.requires_grad for p in straight.method.student.parameters())


def test_without_halvings_guided_trains_its_first_stage_alone() -> None:
    module = describe_method("guided").load()
    method = module.METHOD(VP.teacher(), module.Config(start_steps=4, final_steps=4, guidance_steps=2))
    assert method.whole is None
    for step in (0, 1, 2, 30):
        (turn,) = method.turns(step)
        assert (turn.loss, turn.lr_factor, turn.restart) == (method.first_turn, 1.0, False)
    for done in (0, 7):
        method.stage.done.fill_(done)
        assert method.sampler().levels == tuple(VP.levels(4))


def test_the_students_scale_is_that_of_the_options() -> None:
    student: Any = Straight("guided", {"guidance_max": 6.0, "guidance_scale": 4.0}, VP, 0).student
    assert float(student.class_embedding.default) == 4.0
    student = Straight("guided", {"guidance_min": 2.0, "guidance_max": 6.0}, VP, 0).student
    assert float(student.class_embedding.default) == 4.0
    assert student.class_embedding.layer.num_embeddings == CLASSES + 1


def test_no_gradient_passes_the_target() -> None:
    teacher = VP.teacher().denoiser
    x_t, t = torch.randn(SIZE, 1, 3, 3, requires_grad=True), torch.full((SIZE,), 0.9)
    target = two_step_target(teacher, x_t, t, t - 0.2, t - 0.4, {"class_labels": torch.arange(SIZE) % CLASSES})
    assert not target.requires_grad


def test_rates_are_those_of_the_options() -> None:
    rates = {"student_lr": 0.1, "beta1": 0.3, "weight_decay": 0.4}
    for name in ("progressive", "guided"):
        assert Straight(name, rates, VP, 0).method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
