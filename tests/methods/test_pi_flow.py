"""pi-Flow: the exact checks hold, known mistakes are caught, it trains without images, resumes and refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers import scheduling_piflow
from torch import Tensor, nn

from diffdistill import Teacher, UserError, distill, load_teacher
from diffdistill.core.policies import Mixture, Nodes, Policy
from diffdistill.core.schedule import LinearFlow
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.pi_flow import verify
from diffdistill.methods.pi_flow import Config, PiFlow
from diffdistill.scaffold.method import Need
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


MIXTURE, NODES, ROLL, VELOCITY, DROPPED, TURN = (
    Mixture.x0, Nodes.x0, Policy.roll, PiFlow.velocity, PiFlow.dropped, PiFlow.student_turn,
)  # fmt: skip


def forgets(**changes: Any) -> Callable[..., Tensor]:
    return lambda self, x, t: MIXTURE(replace(self, **{k: of(getattr(self, k)) for k, of in changes.items()}), x, t)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the beginning is forgotten": (Mixture, "x0", forgets(x_s=lambda x: 0 * x)),
    "weights stay": (Mixture, "x0", forgets(logits=lambda logits: 0 * logits)),
    "the width is half": (Mixture, "x0", forgets(log_std=lambda log_std: log_std - 0.7)),
    "the policy is its beginning's": (Mixture, "x0", lambda self, x, t: MIXTURE(self, self.x_s, self.s - 1e-9)),
    "nodes are a step function": (Nodes, "x0", lambda self, x, t: NODES(self, x, t.round(decimals=1))),
    "half of the steps": (Policy, "roll", lambda self, x, t, r, steps: ROLL(self, x, t, r, -(-steps // 2))),
    "the window is one": (PiFlow, "velocity", lambda self, policy, x, t: policy.v(x, t)),
    "no Gaussian is left out": (PiFlow, "dropped", lambda self, policy, batch: policy),
    "the teacher's share stays": (PiFlow, "share", lambda self, step: self.config.teacher_share),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


def test_values_on_the_way_are_those_of_stock_diffusers_where_the_angle_is_its_time() -> None:
    """diffusers' own policy of that kind (Kandinsky 6), whose nodes are even in the flow's time, at its nodes."""
    y, z = torch.randn(3, 5, 4, 6), torch.randn(3, 4, 6)
    one = torch.ones(3)
    theirs = scheduling_piflow.DXPolicy(y, z, one, segment_size=0.6)
    sigma = torch.tensor([0.4, 0.55, 0.7, 0.85, 1.0])
    schedule = LinearFlow()
    ours = Nodes(z, schedule.angle(one), schedule.angle(0.4 * one), z[:, None] - y)
    for k, t in enumerate(torch.lerp(ours.e, ours.s, k / 4) for k in range(5)):
        x0 = z - theirs.pi(z, sigma[k] * one) * sigma[k]
        assert torch.allclose(ours.x0(z, t), x0, atol=1e-6)


RUN = {"method": "pi_flow", "batch_size": 4, "sample_every": 0, "device": "cpu", "substeps": 4, "components": 3}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"guidance_scale": 2.0, "student_steps": 2}),
        ("edm", {"student_steps": 1, "policy": "nodes", "window": 2}),
        ("flow", {"levels": (0.9, 0.5, 0.2), "teacher_share": 1.0, "component_dropout": 0.2}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    assert Need.IMAGES not in PiFlow.needs
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), **RUN, component_dropout=0.2, teacher_share=0.5)


def test_what_makes_no_sense_is_refused(tiny_teacher: Teachers, tmp_path: Path) -> None:
    for options, message in (
        ({"states": 5, "substeps": 4}, "states: 5 is more than the 4 substeps"),
        ({"policy": "nodes", "components": 2}, "components: 2 values on the way are too few"),
        ({"policy": "nodes", "component_dropout": 0.1}, "component_dropout: values on the way are no mixture"),
    ):
        with pytest.raises(UserError, match=message):
            Config(**options)  # type: ignore[arg-type]
    method = PiFlow(load_teacher(tiny_teacher("vp")), Config(student_steps=2))
    with pytest.raises(UserError, match="student_steps: this student is trained for 2 steps and no others"):
        method.in_steps(4)
    own = Teacher.around(Mine(), (2,), LinearFlow(), "flow_prediction")
    with pytest.raises(UserError, match="policy: a student of policies is saved with a scheduler of its own"):
        distill(method="pi_flow", teacher=own, steps=1, device="cpu", out=str(tmp_path / "run"))


class Mine(nn.Module):
    """A network that diffusers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x)
