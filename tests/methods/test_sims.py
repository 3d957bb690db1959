"""SIMS: its exact checks hold, known mistakes are caught, turns are their straight lines, and it trains and refuses."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, distill
from diffdistill.data.pairs import make_pairs
from diffdistill.exact.checks import run_checks
from diffdistill.families import student_record
from diffdistill.methods import sims
from diffdistill.methods.checks.sims import verify
from diffdistill.methods.sims import SIMS, Config
from diffdistill.players.sampler import DDIM
from tests.methods.short_runs import same_when_resumed
from tests.scaffold.straight import (  # fmt: skip
    EDM_,
    FLOW,
    KEY,
    VP,
    Plain,
    agree,
    batch_of,
    fold,
    in_double,
    nets,
    noised,
    normal,
    scatter,
    uniform,
)

Teachers = Callable[[str], Path]
double = contextmanager(in_double)


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL_EXTRAPOLATED, REAL_LOSS = SIMS.extrapolated, sims.denoising_loss
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "towards the auxiliary": (SIMS, "extrapolated", lambda self, *a: away(self, *a, sign=-1.0)),
    "one network alone": (SIMS, "extrapolated", lambda self, x, t, c: (self.teacher(x, t, c).y, x.new_zeros(()))),
    "the auxiliary learns noise": (sims, "denoising_loss", lambda p, x0, eps: REAL_LOSS(p, eps, x0)),
    "the student is first": (SIMS, "turns", lambda self, step, f=SIMS.turns: f(self, 3 - step)),
}


def away(self: SIMS, *a: Any, sign: float) -> Any:
    target, apart = REAL_EXTRAPOLATED(self, *a)
    own = self.teacher(*a).y
    return own + sign * (target - own), apart


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in verify())


@pytest.mark.parametrize("plain", [VP, FLOW, EDM_])
def test_the_turns_are_their_straight_lines(plain: Plain) -> None:
    with double():
        method = SIMS(plain.teacher(), Config(auxiliary_steps=3, extrapolation=0.7, sampling_steps=6))
        for seed, player in enumerate(method.players.values()):
            scatter(player, 20 + seed)
        teacher, student, auxiliary = nets(method.teacher, method.student, method.auxiliary)
        batch = batch_of(KEY, pairs=True)
        pair = batch.pair
        assert pair is not None

        def at(player: str) -> tuple[Any, ...]:
            t, eps = plain.at(uniform(f"{player}/t", KEY)), normal(f"{player}/eps", KEY)
            return noised(pair.x0, t, eps), t, eps

        def learn() -> dict[str, torch.Tensor]:
            x_t, t, eps = at("auxiliary")
            x0, noise = plain.x0_eps(auxiliary, x_t, t, **pair.cond)
            cos, sin = fold(torch.cos(t)), fold(torch.sin(t))
            return {"loss": ((cos * noise - sin * x0) - (cos * eps - sin * pair.x0)).square().mean()}

        def imitate() -> dict[str, torch.Tensor]:
            x_t, t, _ = at("student")
            time, _, _, factor = plain.native(t)
            own, mine, other = (net(fold(factor) * x_t, time, **pair.cond) for net in (teacher, student, auxiliary))
            apart = (own - other).detach()
            return {"loss": (mine - own.detach() - 0.7 * apart).square().mean(), "apart": apart.square().mean()}

        assert [method.turns(step)[0].player for step in (0, 2, 3, 9)] == ["auxiliary"] * 2 + ["student"] * 2
        agree(method, method.turns(2)[0], batch, learn)
        agree(method, method.turns(3)[0], batch, imitate)
        assert method.exported == "student" and isinstance(method.sampler().step, DDIM)
        assert method.sampler().levels == pytest.approx(plain.levels(6), rel=1e-12)
        assert method.optimizer("auxiliary").lr == 1e-4
        assert not any(p.requires_grad for p in teacher.parameters())


def test_it_resumes_to_the_same_bits_and_refuses(tiny_teacher: Teachers, tmp_path: Path) -> None:
    teacher = str(tiny_teacher("vp"))
    pairs = make_pairs(teacher=teacher, count=8, sampling_steps=2, device="cpu", out=str(tmp_path / "pairs"))
    run: dict[str, Any] = {"method": "sims", "teacher": teacher, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    own = {"auxiliary_steps": 2, "sampling_steps": 4}
    same_when_resumed(tmp_path, stop=3, end=5, pairs=str(pairs), student_lr=0.01, **run, **own)
    assert len(student_record(tmp_path / "run" / "student").levels) == 4
    with pytest.raises(UserError, match="steps: 2 do not bring a student of sims to its teacher, which takes 3"):
        distill(**run, **own, pairs=pairs, steps=2, out=tmp_path / "few")
    with pytest.raises(UserError, match="pairs: sims with these options needs noise-image pairs"):
        distill(**run, **own, steps=3, out=tmp_path / "none")
