"""GDD: its exact checks hold, known mistakes are caught, and it freezes, trains, resumes and refuses as it should."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import UserError, distill, load_teacher
from diffdistill.core.schedule import TrigFlow
from diffdistill.exact.checks import run_checks
from diffdistill.methods import gdd
from diffdistill.methods.checks.gdd import verify
from diffdistill.methods.gdd import GDD, Config
from diffdistill.players.lora import LoraSettings
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Outcome
from tests.methods.short_runs import same_when_resumed, trains
from tests.scaffold.straight import SHAPE, Net

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def hinge(self: GDD, batch: Batch) -> Outcome:
    x = self.sampler().one_step(batch.randn("z"), batch.cond)
    return Outcome(-self.adversary.logits(x, *self.adversary.noise("student/gan", batch), batch.cond).mean())


REAL_PENALTY = GDD.penalty
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the penalty's root": (GDD, "penalty", lambda self, batch: REAL_PENALTY(self, batch).sqrt()),
    "everything is frozen": (gdd, "frozen_layers", lambda network: list(network.children())),
    "nothing is frozen": (GDD, "freeze", lambda self, kind, lora: None),
    "the hinge where the logistic loss is said": (GDD, "student_turn", hinge),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


RUN = {"method": "gdd", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("freeze", ["auto", "none"])
def test_what_is_frozen_stays_and_the_rest_is_trained(freeze: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    folder = tiny_teacher("edm")
    run = {**RUN, "teacher": str(folder), "student_lr": 0.01, "freeze": freeze, "steps": 2}
    student = distill(**run, out=tmp_path / "run").student
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / file), load_file(student / file)
    same = {name for name in before if torch.equal(before[name], after[name])}
    convolutions = {
        name for name, w in before.items() if w.ndim == 4 and "blocks." in name + "blocks." * ("mid_block" in name)
        and "shortcut" not in name
    }  # fmt: skip
    assert len(convolutions) > 10
    assert same >= convolutions if freeze == "auto" else not same & convolutions
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    assert not torch.equal(before["time_embedding.linear_1.weight"], after["time_embedding.linear_1.weight"])


@pytest.mark.parametrize("parameterization", ["vp", "flow"])
def test_it_trains_every_parameterisation(parameterization: str, tiny_teacher: Teachers, tmp_path: Path) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), r1_every=1, **RUN)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, r1_every=3, **RUN)


def test_what_cannot_be_frozen_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    own = Teacher.around(Net(), SHAPE, TrigFlow(), "v_prediction", num_classes=3, feature_layer="middle")
    with pytest.raises(UserError, match="freeze: this network has no convolutions in blocks; use auto or none"):
        GDD(own, Config(freeze="convolutions"))
    GDD(own, Config())
    lora = replace(load_teacher(tiny_teacher("vp")), lora={"student": LoraSettings(2, None, None)})
    with pytest.raises(UserError, match="freeze: a LoRA student trains no layer of its base; use auto or none"):
        GDD(lora, Config(freeze="convolutions"))
    assert any(p.requires_grad for p in GDD(lora, Config()).student.parameters())
    run = {**RUN, "teacher": str(tiny_teacher("vp")), "steps": 1, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=r"data: gdd .* needs real images"):
        distill(**{k: v for k, v in run.items() if k != "data"})
    with pytest.raises(UserError, match="r1_weight: -1"):
        distill(**run, r1_weight=-1)
    assert not (tmp_path / "run").exists()
