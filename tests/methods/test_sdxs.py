"""SDXS: its exact checks hold, known mistakes are caught, a turn is its straight line, and it trains from pairs."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, distill
from diffdistill.core import distances
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.exact.checks import run_checks
from diffdistill.methods import sdxs
from diffdistill.methods.checks.sdxs import verify
from diffdistill.methods.sdxs import SDXS, Config
from tests.methods.short_runs import same_when_resumed, with_pairs
from tests.methods.test_wiring_matching import Straight, Values
from tests.scaffold.straight import EDM_, FLOW, VP, Plain, agree, fold, in_double, noised, normal, uniform

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    assert [c for c in run_checks(verify) if not c.ok] == []


REAL = distances.dissimilarity
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "alpha does not fall": (SDXS, "alpha", lambda self, step: 1.0),
    "alpha falls at once": (SDXS, "alpha", lambda self, step: self.config.boundary),
    "the whole range is matched": (SDXS, "times", lambda self, player, batch: super(SDXS, self).times(player, batch)),
    "unlike features are wanted": (sdxs, "dissimilarity", lambda x, y: -REAL(x, y)),
    "a mean square": (sdxs, "dissimilarity", lambda x, y: (x - y).square().flatten(1).mean(1)),
    "the features are the student's own": (sdxs, "dissimilarity", lambda x, y: REAL(x, x.flip(0))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    assert any(not c.ok for c in run_checks(verify))


class Segmented(Straight):
    """SDXS's student: above the boundary as DMD's, below by the features of the pairs."""

    def __init__(self, options: dict[str, Any], plain: Plain, step: int):
        super().__init__("sdxs", options, plain, (5, step, 4))
        c = self.c
        self.alpha = c.boundary + (1 - c.boundary) * max(0.0, 1 - step / c.boundary_steps)

    def student_t(self) -> Tensor:
        low = (1 - self.alpha) * self.c.time_low + self.alpha * self.c.time_high
        return self.plain.at(low + (self.c.time_high - low) * self.shifted(uniform("student/t", self.key)))

    def student_turn(self) -> Values:
        x, t = self.sample("z"), self.student_t()
        self.shared = x.detach()
        values = self._dmd2(x, t, noised(x, t, normal("student/eps", self.key)))
        pair = self.batch.pair
        assert pair is not None
        labels = pair.cond["class_labels"]
        made = self.x0(self.student, *self.plain.start(self.level(), pair.z), labels)
        eps = normal("features/eps", self.key)
        at = self.plain.at(torch.full((len(made),), self.c.feature_noise, dtype=torch.float64))
        time, _, _, factor = self.plain.native(at)
        ours, theirs = (
            self.teacher.hidden(fold(factor) * noised(image, at, eps), time, labels) for image in (made, pair.x0)
        )
        unlike = REAL(ours, theirs.detach()).mean()
        values["features"], values["alpha"] = unlike, torch.tensor(self.alpha)
        values["loss"] = (1 - self.alpha) * values["loss"] + self.alpha * self.c.feature_weight * unlike
        return values


double = contextmanager(in_double)


@pytest.mark.parametrize("step", [0, 3, 20])
@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"guidance_scale": 2.5, "time_shift": 3.0, "boundary_steps": 10, "feature_noise": 0.3}, VP),
        ({"normalise": False, "time_low": 0.2, "time_high": 0.7, "boundary": 0.2, "boundary_steps": 6}, FLOW),
        ({"feature_weight": 0.3, "boundary_steps": 10, "student_level": 2.5}, EDM_),
    ],
)
def test_a_turn_is_its_straight_line(options: dict[str, Any], plain: Plain, step: int) -> None:
    with double():
        straight = Segmented(options, plain, step)
        turns = straight.method.turns(step)
        assert [turn.player for turn in turns] == ["student", "fake_score"]
        for turn in turns:
            mine = straight.student_turn if turn.player == "student" else straight.fake_turn
            agree(straight.method, turn, straight.batch, mine)


RUN = {"method": "sdxs", "batch_size": 4, "ema": 0.5, "sample_every": 0, "device": "cpu", "student_lr": 1e-3}


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, **with_pairs(tmp_path, tiny_teacher("vp")), boundary_steps=4, **RUN)


def test_what_it_cannot_do_is_one_line(tiny_teacher: Teachers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs: sdxs with these options needs noise-image pairs; make them with"):
        distill(**RUN, teacher=str(tiny_teacher("vp")), steps=1, out=tmp_path / "without")
    with pytest.raises(UserError, match="feature_depths: this teacher's network has no layer"):
        SDXS(gaussian_teacher([0.0], 1.0), Config())


def test_a_map_of_zeros_has_a_distance() -> None:
    zeros = torch.zeros(2, 3, 8, 8)
    assert torch.equal(distances.dissimilarity(zeros, zeros), torch.zeros(2))
    assert distances.dissimilarity(zeros, torch.ones(2, 3, 8, 8)).isfinite().all()
