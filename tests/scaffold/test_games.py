"""The games that methods are written on: what a method may override, who moves when, on which samples and how."""

import ast
import importlib
import inspect
import math
import sys
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import scaffold
from diffdistill.catalogue import describe_method, method_names
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS, Prediction, diffuse
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.analytic import AffineGenerator, LearnedGaussian, gaussian_teacher
from diffdistill.options import MatchingOptions
from diffdistill.players.sampler import DDIM, Renoise, Sampler, Step
from diffdistill.scaffold.matching import MatchingMethod, fake_score_loss
from diffdistill.scaffold.method import Batch, Method, Outcome

MODULES = [importlib.import_module(f"{scaffold.__name__}.{info.name}") for info in iter_modules(scaffold.__path__)]
BASES = {
    cls
    for module in MODULES
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Method) and cls.__module__ == module.__name__
}


def final_members(game: type) -> set[str]:
    """The members that a class's source marks as final; `__final__` itself is there from Python 3.11 on."""
    source = inspect.getsourcefile(game)
    assert source is not None
    for node in ast.parse(Path(source).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == game.__name__:
            functions = [member for member in node.body if isinstance(member, ast.FunctionDef)]
            return {f.name for f in functions if "final" in map(ast.unparse, f.decorator_list)}
    raise AssertionError(f"{game} is not in {source}")


def test_the_decorators_and_what_they_leave_agree() -> None:
    assert {Method, MatchingMethod} < BASES
    assert {"turns", "sampler", "generate"} <= final_members(MatchingMethod)
    if sys.version_info >= (3, 11):
        for game in BASES:
            members = {n: getattr(v, "fget", v) for n, v in vars(game).items()}
            marked = {name for name, member in members.items() if getattr(member, "__final__", False)}
            assert marked == final_members(game), game


@pytest.mark.parametrize("name", method_names())
def test_a_method_lies_one_level_above_a_game_and_overrides_nothing_final(name: str) -> None:
    module = describe_method(name).load()
    methods = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method)]
    own = [c for c in methods if c.__module__ == module.__name__]
    assert module.METHOD in own
    for cls in own:
        (base,) = cls.__bases__
        assert base in BASES
        finals = {name for game in cls.__mro__[1:] if game in BASES for name in final_members(game)}
        assert not finals & set(vars(cls))


# -- the game of matching ----------------------------------------------------------------------------------------------


class Recording(MatchingMethod):
    """Notes who is called in whose turn, in which mode and on which samples."""

    def __init__(self, config: MatchingOptions):
        teacher = gaussian_teacher([0.3, -0.2], 0.7)
        schedule, row = teacher.denoiser.schedule, teacher.denoiser.output
        student = Denoiser(AffineGenerator(torch.zeros(2), torch.ones(2)), schedule, row)
        super().__init__(teacher, config, student=student, fake_score=Denoiser(LearnedGaussian(2), schedule, row))
        self.calls: list[tuple[str, bool]] = []
        self.samples: dict[str, Tensor] = {}
        for role, denoiser in (("student", self.student), ("fake_score", self.fake_score)):
            denoiser.register_forward_hook(lambda m, args, out, role=role: self.calls.append((role, m.training)))

    def times(self, player: str, batch: Batch) -> Tensor:
        return 0.2 + batch.uniform(f"{player}/t")

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        self.samples["student"] = x
        gap = self.fake_score(diffuse(x, t, eps), t, cond).x0 - self.teacher(diffuse(x, t, eps), t, cond).x0
        return Outcome((gap * x).mean())

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        self.samples["fake_score"] = x
        return fake_score_loss(self.fake_score, x, t, eps, cond)


def recording(update_ratio: int = 1, **attributes: Any) -> Recording:
    cls: Any = type("Recording", (Recording,), attributes)
    return cls(MatchingOptions(update_ratio=update_ratio))


def play(method: Recording, step: int = 0) -> dict[str, list[tuple[str, bool]]]:
    """The calls in each player's turn of a training step."""
    batch = Batch(8, (2,), {}, None, torch.device("cpu"), (0, step, 0))
    calls = {}
    for turn in method.turns(step):
        method.calls.clear()
        turn.loss(batch)
        calls[turn.player] = list(method.calls)
    return calls


@pytest.mark.parametrize("student_first", [True, False])
def test_the_fake_score_moves_in_every_step_and_the_student_in_every_third(student_first: bool) -> None:
    method = recording(update_ratio=3, student_first=student_first)
    both = ["student", "fake_score"] if student_first else ["fake_score", "student"]
    alone = ["fake_score"]
    orders = [[turn.player for turn in method.turns(step)] for step in range(6)]
    assert orders == [both, alone, alone, both, alone, alone]


def test_the_fake_score_learns_from_the_samples_that_the_student_was_judged_by() -> None:
    method = recording(update_ratio=2)
    calls = play(method)
    assert [role for role, _ in calls["student"]].count("student") == 1
    assert [role for role, _ in calls["fake_score"]] == ["fake_score"]
    assert torch.equal(method.samples["student"], method.samples["fake_score"])
    assert method.samples["student"].requires_grad and not method.samples["fake_score"].requires_grad
    # Where the fake score moves alone, it draws samples for itself, of that step's noise.
    before = method.samples["fake_score"]
    assert [role for role, _ in play(method, 1)["fake_score"]] == ["student", "fake_score"]
    assert not torch.equal(method.samples["fake_score"], before)
    assert not method.samples["fake_score"].requires_grad


@pytest.mark.parametrize("student_first", [True, False])
def test_players_that_share_no_samples_draw_of_their_own_noise(student_first: bool) -> None:
    method = recording(student_first=student_first, shares_samples=False)
    calls = play(method)
    assert [role for role, _ in calls["fake_score"]] == ["student", "fake_score"]
    assert not torch.equal(method.samples["student"], method.samples["fake_score"])
    assert method.samples["student"].requires_grad and not method.samples["fake_score"].requires_grad


def test_a_fake_score_that_moves_first_draws_the_students_samples() -> None:
    method = recording(student_first=False)
    play(method)
    assert torch.equal(method.samples["student"].detach(), method.samples["fake_score"])


@pytest.mark.parametrize(
    ("dropout", "dropping"),
    [
        ("off", {"student": set(), "fake_score": set()}),
        ("own", {"student": {"student"}, "fake_score": {"student", "fake_score"}}),
        ("mover", {"student": {"student"}, "fake_score": {"fake_score"}}),
    ],
)
@pytest.mark.parametrize("student_first", [True, False])
def test_whose_dropout_is_on_in_whose_turn(student_first: bool, dropout: str, dropping: dict[str, set[str]]) -> None:
    method = recording(student_first=student_first, shares_samples=False, dropout=dropout)
    for step in range(2):
        for player, calls in play(method, step).items():
            assert {role for role, _ in calls} == {"student", "fake_score"}
            assert {role for role, training in calls if training} == dropping[player]


# -- steps of a sampler ------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A network whose image is 0.4 whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.value.expand_as(x)


def test_a_step_is_its_formula() -> None:
    x0, eps, fresh = torch.randn(3, 4, 2).double().unbind()
    t, s = torch.tensor([1.5, 1.0, 0.6, 0.3]).double(), torch.tensor([1.2, 0.2, 0.0, 0.1]).double()
    x_t = torch.cos(t)[:, None] * x0 + torch.sin(t)[:, None] * eps
    a, b = torch.tensor([0.3, 1.0, 0.0, -0.8]).double(), torch.tensor([1.0, 0.0, 1.0, 0.6]).double()
    prediction = Prediction(x_t, t, a[:, None] * x0 + b[:, None] * eps, a, b)
    cos, sin = torch.cos(s)[:, None], torch.sin(s)[:, None]

    def never() -> Tensor:
        raise AssertionError("a deterministic step draws no noise")

    assert torch.allclose(DDIM()(prediction, s, s, never), cos * x0 + sin * eps, rtol=0, atol=1e-12)
    assert torch.allclose(Renoise()(prediction, 0 * s, s, lambda: fresh), cos * x0 + sin * fresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [Renoise(), DDIM()])
def test_a_sampler_takes_its_step_from_each_level_to_the_next(step: Step) -> None:
    sampler = Sampler(Denoiser(Constant(), TrigFlow(), OUTPUTS["sample"]), [1.5, 1.0, 0.4], step)
    angles = [float(sampler.denoiser.schedule.angle(level)) for level in sampler.levels]
    z, *noise = torch.randn(3, 5, 2).double().unbind()
    expected, _ = sampler.start(z)
    for k, t in enumerate(angles):
        if k:
            before = angles[k - 1]
            eps = (expected - 0.4 * math.cos(before)) / math.sin(before) if step.name == "ddim" else noise[k - 1]
            expected = 0.4 * math.cos(t) + math.sin(t) * eps
        x_t, at = sampler.input_at(k, z, {}, lambda j: noise[j - 1])
        assert torch.allclose(x_t, expected, rtol=0, atol=1e-12)
        assert torch.allclose(at, torch.full((5,), t, dtype=torch.float64), rtol=0, atol=1e-12)
