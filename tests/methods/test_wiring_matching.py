"""A whole turn of the methods that match distributions, against a straight-line rewrite of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import describe_method
from diffdistill.players.sampler import Renoise
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Need
from tests.scaffold.straight import (
    EDM_,
    EPS,
    FLOW,
    KEY,
    SIZE,
    TRIG,
    VP,
    WHOLE,
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


def injected(x: Tensor, grad: Tensor) -> Tensor:
    return 0.5 * (x - (x - grad).detach()).square().mean()


def mean(x: Tensor) -> Tensor:
    """Of each sample."""
    return x.flatten(1).mean(1)


class Straight:
    """One method's turn, line by line; `options` are the Config's, all of them."""

    def __init__(self, name: str, options: dict[str, Any], plain: Plain, key: tuple[int, ...] = KEY):
        module = describe_method(name).load()
        self.name, self.plain, self.key = name, plain, key
        self.c: Any = module.Config(**options)
        self.method: MatchingMethod = module.METHOD(plain.teacher(), self.c)
        for seed, (_, player) in enumerate(self.method.players.items()):
            scatter(player, 20 + seed)
        teacher = getattr(self.method.teacher, "denoiser", self.method.teacher)
        self.teacher, self.student, self.fake = nets(teacher, self.method.student, self.method.fake_score)
        self.batch = batch_of(key, pairs=True)
        self.labels = self.batch.cond["class_labels"]
        self.shared: Tensor | None = None

    # -- samples -----------------------------------------------------------------------------------------------------

    def x0(self, net: Any, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.plain.x0_eps(net, x_t, t, class_labels=self.labels if labels is None else labels)[0]

    def level(self) -> float:
        return self.plain.levels(1)[0] if self.c.student_level is None else self.c.student_level

    def sample(self, purpose: str, labels: Tensor | None = None) -> Tensor:
        if getattr(self.c, "student_steps", 1) > 1:
            return self.simulated(labels)
        return self.x0(self.student, *self.plain.start(self.level(), normal(purpose, self.key)), labels)

    def simulated(self, labels: Tensor | None = None) -> Tensor:
        """The input of one level, which all processes draw alike, is made by the student's own steps before it."""
        levels = self.plain.levels(self.c.student_steps, self.c.student_level)
        k = int(torch.randint(len(levels), (), generator=draw(*self.key[:2], "student/level")))
        if self.c.fake_scores == "per_level":  # they take turns, each from one turn of the student to the next
            k = self.key[1] // self.c.update_ratio % len(levels)
        x_t, t = self.plain.start(levels[0], normal("z", self.key))
        for j in range(1, k + 1):
            with torch.no_grad():
                x0 = self.x0(self.student, x_t, t, labels)
            t = torch.full((SIZE,), self.plain.angle(levels[j]), dtype=torch.float64)
            x_t = noised(x0, t, normal(f"z {j}", self.key))
        return self.x0(self.student, x_t, t, labels)

    # -- times -------------------------------------------------------------------------------------------------------

    def student_t(self) -> Tensor:
        c, plain = self.c, self.plain
        if self.name == "diff_instruct":
            return plain.log_normal(gaussian("student/t", self.key), c.time_mean, c.time_std)
        if getattr(c, "times", "") == "flow":
            return self.flow_t("student")
        u = c.time_low + (c.time_high - c.time_low) * self.shifted(uniform("student/t", self.key))
        return plain.karras(u) if self.name == "sim" or getattr(c, "times", "") == "karras" else plain.at(u)

    def fake_t(self) -> Tensor:
        c, plain = self.c, self.plain
        if self.name == "diff_instruct":
            return plain.log_normal(gaussian("fake_score/t", self.key), c.time_mean, c.time_std)
        if self.name == "sim" or getattr(c, "times", "") == "karras":
            return plain.log_normal(gaussian("fake_score/t", self.key), -1.2, 1.2)
        if getattr(c, "times", "") == "flow":
            return self.flow_t("fake_score")
        if self.name == "sid":
            return plain.at(c.time_low + (c.time_high - c.time_low) * uniform("fake_score/t", self.key))
        return plain.at(self.shifted(uniform("lora/t" if self.name == "swiftbrush" else "fake_score/t", self.key)))

    def flow_t(self, player: str) -> Tensor:
        s = torch.sigmoid(math.log(2) + 1.6 * gaussian(f"{player}/t", self.key))
        return torch.atan2(s, (1 - s) * self.plain.std).clamp(*self.plain.ends())

    def shifted(self, u: Tensor) -> Tensor:
        s = getattr(self.c, "time_shift", 1.0)
        return s * u / (1 - u + s * u)

    # -- the student's turn ------------------------------------------------------------------------------------------

    def student_turn(self) -> Values:
        shares = self.name != "sid"
        x = self.sample("z" if shares else "student/z")
        if shares:
            self.shared = x.detach()
        t, eps = self.student_t(), normal("student/eps", self.key)
        values = getattr(self, f"_{self.name}")(x, t, noised(x, t, eps))
        if self.name == "dmd" and self.c.regression_weight:
            values["regression"] = self.regression()
            values["loss"] = values["loss"] + self.c.regression_weight * values["regression"]
        if getattr(self.c, "gan_weight", 0):
            t = self.plain.at(uniform("student/gan t", self.key))
            values["gan"] = F.softplus(-self.logits(noised(x, t, normal("student/gan eps", self.key)), t)).mean()
            values["loss"] = values["loss"] + self.c.gan_weight * values["gan"]
        return values

    def regression(self) -> Tensor:
        pair = self.batch.pair
        assert pair is not None
        x_t, t = self.plain.start(self.level(), pair.z)
        x = self.x0(self.student, x_t, t, pair.cond["class_labels"])
        gap = self.plain.std * (x - pair.x0)
        if self.c.distance == "l2":
            return gap.square().mean()
        c = 0.00054 * 3 if self.c.huber_c is None else self.c.huber_c
        return (torch.sqrt(gap.flatten(1).square().sum(1) + c**2) - c).mean()

    def both(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 of the guided teacher and of the fake score."""
        teacher = self.plain.guided(self.teacher, x_t, t, self.labels, float(self.c.guidance_scale))[0]
        return teacher, self.x0(self.fake, x_t, t)

    def _dmd2(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        with torch.no_grad():
            teacher, fake = self.both(x_t, t)
            size = mean((x - teacher).abs())
            weight = 1 / size if self.c.normalise else torch.tan(t) ** -2
            grad = fold(weight) * (fake - teacher)
        unit = self.plain.std if self.c.normalise else 1.0
        return {"loss": unit * injected(x, grad), "gap": (mean((fake - teacher).abs()) / size).mean()}

    _dmd = _dmd2

    def _diff_instruct(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        with torch.no_grad():
            teacher, fake = self.both(x_t, t)
        return {"loss": injected(x, fake - teacher), "gap": (fake - teacher).square().mean()}

    def _swiftbrush(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        scale = float(self.c.guidance_scale)
        with torch.no_grad():
            teacher = self.plain.guided(self.teacher, x_t, t, self.labels, scale)[1]
            gap = teacher - self.plain.guided(self.fake, x_t, t, self.labels, scale)[1]
            grad = fold(torch.sin(t) ** 2) * gap
        return {"loss": injected(x, grad), "gap": gap.square().mean()}

    def _sid(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        teacher, _ = self.both(x_t, t)
        fake = self.plain.guided(self.fake, x_t, t, self.labels, float(self.c.fake_score_guidance))[0]
        delta = teacher - fake
        each = mean(delta * ((teacher - x) - self.c.alpha * delta))
        if self.c.normalise:
            each = each / mean((x - teacher).abs()).detach()
        if self.c.times == "flow":  # alpha/(alpha + sigma)
            each = each * torch.cos(t) / (torch.cos(t) + self.plain.std * torch.sin(t))
        return {"loss": each.mean(), "gap": delta.detach().square().mean()}

    def _sim(self, x: Tensor, t: Tensor, x_t: Tensor) -> Values:
        teacher, fake = self.both(x_t, t)
        scale = torch.ones(SIZE, 1, 1, 1) if self.c.weight == "denoiser" else fold(torch.cos(t) / torch.sin(t) ** 2)
        y = scale * (fake - teacher)
        squares = y.flatten(1).square().sum(1)
        if self.c.distance == "l2":
            slope, shown = 2 * y, squares
        else:
            slope, shown = y / fold(torch.sqrt(squares + self.c.c**2)), torch.sqrt(squares + self.c.c**2) - self.c.c
        loss = -(slope * scale * (fake - x)).flatten(1).sum(1).mean()
        return {"loss": loss, "distance": shown.detach().mean()}

    # -- the fake score's turn ---------------------------------------------------------------------------------------

    def fake_turn(self) -> Values:
        if self.shared is None:
            with torch.no_grad():
                # What is drawn for this turn alone has its labels, which may be dropped.
                own = self.name == "sid"
                self.shared = self.sample("fake_score/z", self.trained_labels()) if own else self.sample("z")
        x, t = self.shared.detach(), self.fake_t()
        stream = "lora" if self.name == "swiftbrush" else "fake_score"
        eps, labels = normal(f"{stream}/eps", self.key), self.trained_labels()
        scale = getattr(self.c, "fake_score_training_guidance", 1.0)
        x0, noise = self.plain.guided(self.fake, noised(x, t, eps), t, labels, float(scale))
        if self.name == "swiftbrush":
            loss = (torch.cos(t) ** 2 * mean((noise - eps).square())).mean()
        elif self.c.fake_score_loss == "epsilon":
            loss = (noise - eps).square().mean()
        else:
            cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
            loss = ((cos * noise - sin * x0) - (cos * eps - sin * x)).square().mean()
        values = {"loss": loss, "denoising": loss}
        if getattr(self.c, "gan_weight", 0):
            t = self.plain.at(uniform("fake_score/gan t", self.key))
            assert self.batch.x0 is not None
            real = self.logits(noised(self.batch.x0, t, normal("fake_score/gan eps real", self.key)), t)
            fake = self.logits(noised(x, t, normal("fake_score/gan eps fake", self.key)), t)
            values["gan"] = F.softplus(-real).mean() + F.softplus(fake).mean()
            values["loss"] = loss + self.c.discriminator_weight * values["gan"]
        return values

    def trained_labels(self) -> Tensor:
        """A guided fake score learns without a class too."""
        if self.name == "swiftbrush":
            dropped = uniform("lora/drop", self.key) < self.c.label_dropout
        elif self.name == "sid" and (self.c.fake_score_guidance, self.c.fake_score_training_guidance) != (1, 1):
            dropped = uniform("fake_score/labels", self.key) < self.c.label_dropout
        else:
            return self.labels
        assert 0 < int(dropped.sum()) < SIZE, "some"
        return torch.where(dropped, 3, self.labels)

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        (adversary,) = self.method.adversaries
        time, _, _, factor = self.plain.native(t)
        return adversary.head(self.fake.hidden(fold(factor) * x_t, time, self.labels))


DROPS = {"guidance_scale": 2.5, "label_dropout": 0.4}
GUIDED_FAKE = {"guidance_scale": 2.5, "fake_score_guidance": 1.7, "fake_score_training_guidance": 0.6}
RANGE = {"time_low": 0.2, "time_high": 0.7}
GAN = {"gan_weight": 0.7, "discriminator_weight": 0.3, "update_ratio": 1}
CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("dmd2", {"guidance_scale": 2.5, "update_ratio": 2, "time_shift": 3.0}, VP),
    ("dmd2", {"normalise": False, **RANGE, "student_level": 9.0, "update_ratio": 1}, EPS),
    ("dmd2", {"fake_score_loss": "epsilon", **GAN}, EDM_),
    ("dmd2", {**GAN, **RANGE, "student_level": 0.8, "time_shift": 0.4}, FLOW),
    ("dmd2", {**GAN, "update_ratio": 3}, VP),
    ("dmd2", {"update_ratio": 3, "student_level": 1.2}, TRIG),
    ("dmd", {"guidance_scale": 2.5, "regression_weight": 0.6, **RANGE}, EDM_),
    ("dmd", {"student_level": 9.0, "distance": "huber", "huber_c": 0.3, "fake_score_loss": "epsilon"}, VP),
    ("dmd", {"distance": "huber", "normalise": False}, FLOW),
    ("dmd", {"regression_weight": 0.0, "student_level": 2.5}, EDM_),
    ("diff_instruct", {"guidance_scale": 2.5, "student_level": 2.5}, EDM_),
    ("diff_instruct", {"time_mean": -0.4, "time_std": 0.7, "fake_score_loss": "epsilon", "update_ratio": 2}, VP),
    ("diff_instruct", {"update_ratio": 3}, FLOW),
    ("swiftbrush", {**DROPS, **RANGE, "student_level": 9.0}, VP),
    ("swiftbrush", {**DROPS, "update_ratio": 2}, EDM_),
    ("swiftbrush", {"guidance_scale": 1.0, "label_dropout": 0.4, "update_ratio": 3}, FLOW),
    ("sid", {"student_level": 2.5, "alpha": 0.9}, EDM_),
    ("sid", {**GUIDED_FAKE, "label_dropout": 0.4, "times": "native", **RANGE, "normalise": False}, VP),
    ("sid", {"guidance_scale": 2.5, "fake_score_guidance": 1.7, "label_dropout": 0.4, "update_ratio": 2}, TRIG),
    ("sid", {"fake_score_training_guidance": 0.6, "label_dropout": 0.4, "fake_score_loss": "epsilon", **RANGE}, FLOW),
    ("sid", {"update_ratio": 3}, EDM_),
    ("sid", {**GUIDED_FAKE, "label_dropout": 0.4, "times": "flow", "normalise": False, "student_steps": 3}, FLOW),
    ("sid", {**GAN, "times": "flow", "alpha": 1.0}, VP),
    ("sid", {**GAN, "student_steps": 2, "student_level": 1.2}, TRIG),
    ("sim", {"student_level": 2.5, "c": 0.2}, EDM_),
    ("sim", {"guidance_scale": 2.5, "distance": "l2", **RANGE}, VP),
    ("sim", {"weight": "score", **RANGE, "fake_score_loss": "epsilon", "update_ratio": 2}, TRIG),
    ("sim", {"update_ratio": 3}, FLOW),
]


def play(straight: Straight) -> list[str]:
    """Every turn of the step, each after the one before has moved its player."""
    turns = straight.method.turns(straight.key[1])
    expected: dict[str, Callable[[], Values]] = {
        "student": straight.student_turn,
        "fake_score": straight.fake_turn,
    }
    for turn in turns:
        assert (turn.lr_factor, turn.restart) == (1.0, False)
        agree(straight.method, turn, straight.batch, expected[turn.player])
        scatter(straight.method.players[turn.player], 40)
    return [turn.player for turn in turns]


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_turn_is_its_straight_line(name: str, options: dict[str, Any], plain: Plain) -> None:
    order = play(Straight(name, options, plain))
    whole = ["fake_score", "student"] if name == "sid" else ["student", "fake_score"]
    assert order == (["fake_score"] if options.get("update_ratio", 5 if name == "dmd2" else 1) in (3, 5) else whole)


def test_the_student_moves_in_every_so_manieth_step() -> None:
    for name in ("dmd", "dmd2", "diff_instruct", "swiftbrush", "sid", "sim"):
        method = Straight(name, {"update_ratio": 3}, TRIG).method
        assert [len(method.turns(step)) for step in range(7)] == [2, 1, 1, 2, 1, 1, 2], name


@pytest.mark.parametrize("plain", [VP, FLOW])
def test_each_level_of_a_student_of_several_steps_is_trained_on_its_own_input(plain: Plain) -> None:
    seen = set()
    for step in range(0, 12):
        key = (5, step, 4)
        straight = Straight("dmd2", {"student_steps": 3, "update_ratio": 1, "guidance_scale": 1.6}, plain, key)
        seen.add(int(torch.randint(3, (), generator=draw(5, step, "student/level"))))
        assert play(straight) == ["student", "fake_score"]
        # Of a step in which the fake score moves alone.
        start = {"student_level": 14.0 if plain is VP else 0.8}
        alone = Straight("dmd2", {"student_steps": 3, "update_ratio": 100, **RANGE, **start}, plain, (6, step + 1, 0))
        assert play(alone) == ["fake_score"]
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, 7])
def test_each_level_has_its_own_fake_score(step: int) -> None:
    """Two steps of each in turn, of which the first is the student's too."""
    options = {"student_steps": 3, "update_ratio": 2, "fake_scores": "per_level"}
    straight = Straight("dmd2", options, VP, (5, step, 1))
    method, k = straight.method, step // 2 % 3
    role = ["fake_score", "fake_score_2", "fake_score_3"][k]
    assert list(method.players) == ["student", "fake_score", "fake_score_2", "fake_score_3"]
    straight.fake = method.fake_scores[k].network
    turns = method.turns(step)
    assert [turn.player for turn in turns] == (["student", role] if step % 2 == 0 else [role])
    for turn in turns:
        mine = straight.student_turn if turn.player == "student" else straight.fake_turn
        agree(method, turn, straight.batch, mine)
    assert method.optimizer(role) == method.optimizer("fake_score")


RATES = {"student_lr": 0.1, "fake_score_lr": 0.2, "beta1": 0.3, "weight_decay": 0.4}
METHODS = ("dmd", "dmd2", "diff_instruct", "swiftbrush", "sid", "sim")


@pytest.mark.parametrize("name", METHODS)
def test_rates_and_the_sampler_are_those_of_the_options(name: str) -> None:
    straight = Straight(name, RATES | {"student_level": 9.0}, VP)
    method = straight.method
    assert method.optimizer("student") == (0.1, (0.3, 0.999), 0.4)
    assert method.optimizer("fake_score") == (0.2, (0.3, 0.999), 0.4)
    assert method.exported == "student" and list(method.players) == ["student", "fake_score"]
    sampler = method.sampler()
    assert (sampler.denoiser, sampler.levels, sampler.step) == (method.student, (9.0,), Renoise())
    assert Straight(name, {}, VP).method.sampler().levels == (23.0,)
    assert not any(p.requires_grad for p in straight.teacher.parameters())
    assert method.needs == (frozenset({Need.PAIRS}) if name == "dmd" else frozenset())
    assert method.state == {}


@pytest.mark.parametrize("name", METHODS)
def test_what_the_fake_score_learns_from_gets_no_gradient(name: str) -> None:
    straight = Straight(name, {}, TRIG)
    x, t = torch.randn(SIZE, 1, 3, 3, requires_grad=True), torch.linspace(0.3, 1.2, SIZE)
    loss = straight.method.denoising(x, t, torch.randn(SIZE, 1, 3, 3), straight.batch.cond)
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)


def test_what_dmd2_needs_and_its_levels() -> None:
    method = Straight("dmd2", GAN, VP).method
    assert method.needs == frozenset({Need.IMAGES})
    (adversary,) = method.adversaries
    theirs = {id(p) for p in method.players["fake_score"].parameters()}
    assert theirs == {id(p) for part in (adversary.head, method.fake_score) for p in part.parameters()}
    assert Straight("dmd", {"regression_weight": 0.0}, VP).method.needs == frozenset()
    for plain in (VP, FLOW, EDM_):
        sampler = Straight("dmd2", {"student_steps": 4}, plain).method.sampler()
        assert sampler.step == Renoise()
        assert sampler.levels == pytest.approx(plain.levels(4), rel=1e-12)


@pytest.mark.parametrize(("ratio", "step"), [(1, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_whose_dropout_is_on(name: str, ratio: int, step: int) -> None:
    """`own`: in the student, and in the fake score in its own turn; `mover`: in who moves; the teacher never.

    In the last case the fake score moves alone, on samples that it draws itself.
    """
    straight = Straight(name, {"update_ratio": ratio} | ({"gan_weight": 0.5} if name == "dmd2" else {}), TRIG)
    parts = {"teacher": straight.teacher, "student": straight.student, "fake_score": straight.fake}
    drops: dict[str, dict[str, set[str]]] = {
        "own": {"student": {"student"}, "fake_score": {"student", "fake_score"}},
        "mover": {"student": {"student"}, "fake_score": {"fake_score"}},
        "off": {"student": set(), "fake_score": set()},
    }
    kind = {"diff_instruct": "own", "sim": "own", "sid": "mover"}.get(name, "off")
    for turn in straight.method.turns(step):
        calls = modes({k: v.dropout for k, v in parts.items()}, lambda turn=turn: turn.loss(straight.batch))
        assert {who for who, dropping in calls if dropping} == drops[kind][turn.player] & {w for w, _ in calls}


@pytest.mark.parametrize("name", METHODS)
def test_only_the_batch_says_what_is_drawn(name: str) -> None:
    """Another step, place in it or seed draws everything anew, and the global generator takes no part."""
    losses = []
    for key in ((5, 4, 1), (5, 4, 0), (5, 6, 1), (3, 4, 1), (5, 4, 1)):
        torch.manual_seed(0)  # of the weights
        straight = Straight(name, {"update_ratio": 1}, TRIG, key)
        batch = batch_of(pairs=True)
        batch = Batch(SIZE, batch.shape, batch.cond, batch.x0, batch.device, key, batch.pair, WHOLE)
        torch.manual_seed(len(losses))
        losses.append([float(turn.loss(batch).loss.detach()) for turn in straight.method.turns(0)])
    assert losses[0] == losses[-1]
    for k in range(2):
        assert len({row[k] for row in losses}) == 4


def test_straight_lines_see_a_difference() -> None:
    """The comparison itself fails where a weight is another."""

    def fails(turn: Any, straight: Straight) -> bool:
        try:
            agree(straight.method, turn, straight.batch, straight.student_turn)
        except AssertionError:
            return True
        return False

    straight = Straight("dmd2", GAN, VP)
    straight.method.gan_weight *= 1.001
    assert fails(straight.method.turns(0)[0], straight)
