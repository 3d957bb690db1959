"""Uni-Instruct: its exact checks hold, known mistakes are caught, and it trains, resumes and refuses as it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.core.losses import sid_loss
from diffdistill.exact.checks import run_checks
from diffdistill.methods import uni_instruct
from diffdistill.methods.checks.uni_instruct import verify
from diffdistill.methods.uni_instruct import Config, uni_loss
from diffdistill.scaffold import ratio
from diffdistill.scaffold.ratio import PATHS, WEIGHTS
from tests.methods.short_runs import same_when_resumed, trains


@pytest.mark.slow
def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("integrated over noise") for c in checks) == len(WEIGHTS) == len(PATHS)


def loss_with(change: Callable[..., Any]) -> Callable[..., Tensor]:
    """uni_loss after a change of its arguments (x, x0_teacher, x0_fake, h, path)."""
    return lambda *args: REAL_LOSS(*change(*args))


REAL_LOSS = uni_instruct.uni_loss
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the teacher is detached": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x, p.detach(), q, h, c))),
    "the fake score is detached": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x, p, q.detach(), h, c))),
    "the sample is detached": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x.detach(), p, q, h, c))),
    "the networks are swapped": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x, q, p, h, c))),
    "the weight is detached": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x, p, q, h.detach(), c))),
    "the path's weight is the other": (uni_instruct, "uni_loss", loss_with(lambda x, p, q, h, c: (x, p, q, h, h))),
    "a divergence for another": (ratio, "PATHS", PATHS | {"jeffreys": PATHS["forward_kl"]}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())  # stops at the first


def test_reverse_kl_is_twice_sid_with_a_half() -> None:
    x, p, q = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    one = torch.ones(5, dtype=torch.float64)
    assert torch.allclose(uni_loss(x, p, q, one, one).mean(), 2 * sid_loss(x, p, q, 0.5, False).mean())


RUN = {"method": "uni_instruct", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_trains_every_parameterisation(
    parameterization: str, tiny_teacher: Callable[[str], Path], tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), fake_score_lr=1e-2, **RUN)


def test_refusals(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gan_weight: 0 leaves no discriminator"):
        Config(gan_weight=0.0)
    run = {**RUN, "teacher": str(tiny_teacher("vp")), "steps": 1, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=r"data: uni_instruct .* needs real images"):
        distill(**{k: v for k, v in run.items() if k != "data"})
    with pytest.raises(UserError, match="divergence"):
        distill(**run, divergence="wasserstein")
