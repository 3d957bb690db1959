"""DisBack: its exact checks hold, known mistakes are caught, and it records, follows, resumes and refuses."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError, distill
from diffdistill.core.guidance import Guided
from diffdistill.core.prediction import OUTPUTS
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.disback import verify
from diffdistill.methods.disback import Config, DisBack
from diffdistill.scaffold import matching
from diffdistill.training.checkpoint import load_newest
from tests.methods.short_runs import same_when_resumed, trains
from tests.methods.test_wiring_matching import Straight
from tests.scaffold.straight import FLOW, VP, Plain, agree, in_double, scatter
from tests.training.test_derived import STOCK_DDPM, derived_for, teacher_of

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_TARGET, REAL_AFTER = DisBack.target, DisBack.after_step
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the teacher is all that is followed": (DisBack, "target", lambda self, step: self.targets[-1]),
    "the path is followed from the first": (DisBack, "target", lambda self, step: REAL_TARGET(self, 100 - step)),
    "the student never rests": (DisBack, "rests", lambda self, step: False),
    "nothing is recorded": (DisBack, "after_step", lambda self, step: None),
    "it is recorded a step late": (DisBack, "after_step", lambda self, step: REAL_AFTER(self, step - 1)),
    "the matching's sign": (
        matching,
        "dmd_loss",
        lambda x, t, eps, c, p, q, n, f=matching.dmd_loss: f(x, t, eps, c, q, p, n),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


class Back(Straight):
    _disback = Straight._dmd2


PATH = {"path_length": 3, "record_every": 2, "track_every": 3, "update_ratio": 1, "guidance_scale": 2.5}


@pytest.mark.parametrize(("step", "target"), [(6, 1), (8, 1), (9, 0), (11, 0), (12, None), (30, None)])
@pytest.mark.parametrize("plain", [VP, FLOW])
def test_the_students_turn_is_its_straight_line(plain: Plain, step: int, target: int | None) -> None:
    """Matched with the copies from the last but one down, each for three steps, and then with the teacher."""
    with double():
        options = PATH | {"normalise": plain is VP}
        straight = Back("disback", options, plain, (5, step, 4))
        method: Any = straight.method
        assert all(isinstance(each, Guided) and each.scale == 2.5 for each in method.targets)
        for k, each in enumerate(method.path):
            scatter(each, 50 + k)
        assert not any(p.requires_grad for p in method.path.parameters())
        if target is not None:
            straight.teacher = method.path[target].network
        turns = method.turns(step)
        assert [turn.player for turn in turns] == ["student", "fake_score"]
        agree(method, turns[0], straight.batch, straight.student_turn)
        agree(method, turns[1], straight.batch, straight.fake_turn)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def test_the_path_is_the_fake_score_as_it_was() -> None:
    with double():
        straight = Back("disback", PATH, VP)
        method: Any = straight.method
        seen = []
        for step in range(9):
            assert [turn.player for turn in method.turns(step)] == ["student"] * (step > 5) + ["fake_score"]
            scatter(method.fake_score, 70 + step)
            seen.append(flat(method.fake_score))
            method.after_step(step)
        for k, each in enumerate(method.path):
            assert torch.equal(flat(each), seen[2 * k + 1])
        assert method.state == {"path": method.path} and method.shortest == 6 + 2 * 3 + 1
        assert Back("disback", {"path_length": 0}, VP).method.state == {}


RUN = {"method": "disback", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("lora", [None, "student,fake_score"])
def test_a_resumed_run_has_the_same_bits_and_its_path(lora: str | None, tiny_teacher: Teachers, tmp_path: Path) -> None:
    path = {"path_length": 2, "record_every": 1, "track_every": 1, "update_ratio": 1, "fake_score_lr": 1e-2}
    teacher = str(tiny_teacher("vp"))
    same_when_resumed(tmp_path, stop=4, end=6, teacher=teacher, lora=lora, lora_rank=2, **path, **RUN)
    newest = load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    copies = [{k: v for k, v in newest[1]["state.path"].items() if k.startswith(f"{n}.")} for n in (0, 1)]
    assert any(not torch.equal(v, copies[1][k.replace("0.", "1.", 1)]) for k, v in copies[0].items())


@pytest.mark.parametrize("parameterization", ["edm", "flow"])
def test_it_trains_every_parameterisation(parameterization: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    path = {"path_length": 1, "record_every": 1, "update_ratio": 1}
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **path, **RUN)


def test_a_training_that_would_not_reach_the_teacher_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    path = {"path_length": 2, "record_every": 2, "track_every": 3, "update_ratio": 1}
    run = {**RUN, **path, "teacher": str(tiny_teacher("vp"))}
    with pytest.raises(
        UserError, match="steps: 7 do not bring a student of disback to its teacher, which takes 8; give"
    ):
        distill(**run, steps=7, out=tmp_path / "few")
    assert not (tmp_path / "few").exists()
    distill(**run, steps=8, out=tmp_path / "enough")
    with pytest.raises(UserError, match="path_length: -1"):
        distill(**RUN, teacher=run["teacher"], path_length=-1, steps=8, out=tmp_path / "no")


def test_a_path_is_derived_from_the_steps() -> None:
    """A tenth of the steps away, four tenths back."""
    teacher = teacher_of(STOCK_DDPM, OUTPUTS["v_prediction"])
    found = derived_for(teacher, Config, 1000)
    assert (found["record_every"].value, found["track_every"].value) == (20, 100) and "path_length" not in found
    assert derived_for(teacher, Config, 40)["path_length"].value == 0
    assert not {"record_every", "track_every"} & set(derived_for(teacher, Config, 20_000))
