"""CTMSR: the exact checks hold, known mistakes are caught, it trains and resumes, with an image beside or without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, distill, load_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods.checks.ctmsr import verify
from diffdistill.methods.ctmsr import CTMSR, Config
from tests.methods.short_runs import same_when_resumed, trains
from tests.methods.test_yonos import own_teacher, views

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


def test_refusals(tiny_teacher: Teachers) -> None:
    with pytest.raises(
        UserError, match=r"matching_high: of a grid of 3 steps no point lies between 0.1 \(matching_low\)"
    ):
        CTMSR(load_teacher(tiny_teacher("vp")), Config(matching_high=0.3))


RUN: dict[str, Any] = {"method": "ctmsr", "batch_size": 4, "sample_every": 0, "device": "cpu", "student_lr": 1e-2}
OWN = {"consistency_steps": 1, "matching_steps": 3, "renew_every": 2, "ramp_steps": 2}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {**OWN, "student_steps": 2}),
        ("edm", {"distance": "l1", **OWN}),
        ("flow", {"matching_steps": 0, "kappa": 1.0}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), data="digits", **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, stop=3, end=6, teacher=str(tiny_teacher("vp")), data="digits", **RUN, **OWN)


def test_a_network_of_ones_own_reads_the_small_image(tmp_path: Path) -> None:
    data = views()["data"]
    run = distill(teacher=own_teacher(), data=data, **RUN, **OWN, steps=3, out=tmp_path / "run")
    draws = [torch.Generator().manual_seed(k) for k in range(2)]
    one, other = (run.sampler()((1, 8, 8), {"image": y[:2]}, draws) for y in (data.cond["image"], -data.cond["image"]))
    assert one.shape == (2, 1, 8, 8) and not torch.allclose(one, other)
