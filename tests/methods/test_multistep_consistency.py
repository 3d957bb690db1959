"""Multistep consistency: the exact checks hold, known mistakes are caught, it trains, resumes and is exported."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill import UserError, load_teacher
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step
from diffdistill.core.prediction import expand
from diffdistill.exact.checks import run_checks
from diffdistill.methods import multistep_consistency
from diffdistill.methods.checks.multistep_consistency import verify
from diffdistill.methods.multistep_consistency import Config, MultistepConsistency, Segment
from diffdistill.players.sampler import Sampler
from diffdistill.scaffold import following
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(": the product of" in c.name for c in checks) == 6


def with_gradient(self: MultistepConsistency, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Any) -> Any:
    t, r, e = interval
    with torch.enable_grad():
        z_e = torch.where(expand(r - e, x_r) <= 0, x_r, self.student(x_r, r, cond).at(e))
        return multistep_consistency.inverse_ddim(z_e, x_t, t, e)


def to_zero(self: MultistepConsistency, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Any) -> Any:
    t, r, e = interval
    return REAL["reference"](self, x_t, x_r, Segment(t, r, torch.zeros_like(e)), cond)


def x0_itself(self: MultistepConsistency, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Any) -> Any:
    with torch.no_grad():
        return self.student(x_r, interval.r, cond).x0


def no_end(self: MultistepConsistency, x_t: Tensor, x_r: Tensor, interval: Segment, cond: Any) -> Any:
    t, r, e = interval
    with torch.no_grad():
        z_e = self.student(x_r, r.clamp_min(0.1), cond).at(e)
    return multistep_consistency.inverse_ddim(z_e, x_t, t, e)


def guided_variance(pred: Any, s: Tensor, x_var: Tensor) -> Tensor:
    """Lengthens x0 instead of the noise."""
    return pred.at(s) + expand(torch.sqrt(torch.sin(s) ** 2 + x_var) - torch.sin(s), pred.x_t) * pred.x0


def swapped(self: MultistepConsistency, x_t: Tensor, x_r: Tensor, interval: Segment, *rest: Any, **kw: Any) -> Any:
    t, r, e = interval
    return REAL["following"](self, x_r, x_t, Segment(r, t, e), *rest, **kw)


REAL = {n: getattr(MultistepConsistency, n) for n in ("reference", "following", "sampler", "per_segment")}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "x_ref gets a gradient": (MultistepConsistency, "reference", with_gradient),
    "consistent down to zero, not to the segment's end": (MultistepConsistency, "reference", to_zero),
    "x_ref is f(x_r, r), as with one segment": (MultistepConsistency, "reference", x0_itself),
    "z_e is not x_r at the end": (MultistepConsistency, "reference", no_end),
    "the gradient goes through the less noisy point": (MultistepConsistency, "following", swapped),
    "adjusted DDIM lengthens x0": (multistep_consistency, "addim_step", guided_variance),
    "plain DDIM whatever eta": (multistep_consistency, "addim_step", lambda pred, s, x_var: pred.at(s)),
    "the sampler adds noise": (
        MultistepConsistency,
        "sampler",
        lambda self: Sampler(self.student, REAL["sampler"](self).levels),
    ),
    "N_teacher in a segment": (
        MultistepConsistency,
        "per_segment",
        lambda self, step: REAL["per_segment"](self, step) * self.config.segments,
    ),
    "each pass drops its own units": (following, "seeded", lambda *_: contextlib.nullcontext()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize("segments", [1, 4])
def test_times_lie_in_one_segment(parameterization: str, segments: int, tiny_teacher: Teachers) -> None:
    method = MultistepConsistency(load_teacher(tiny_teacher(parameterization)), Config(segments=segments))
    batch = Batch(512, (1, 8, 8), {}, torch.zeros(1), torch.device("cpu"), (0, 3, 0))
    t, r, e = method.interval(3, batch)
    tops = torch.stack([method.schedule.angle(level) for level in method.sampler().levels])
    assert len(tops) == segments
    ends = [*tops[1:].tolist(), 0.0]
    assert set(e.tolist()) == set(ends)
    top = tops[[ends.index(value) for value in e.tolist()]]
    assert bool(((top >= t) & (t >= r) & (r >= e) & (t > e)).all())
    assert bool(((r == e) | (r >= method.schedule.t_min)).all())


def test_points_below_the_least_level_are_moved_there(tiny_teacher: Teachers) -> None:
    config = Config(segments=2, teacher_steps_start=2000)
    method = MultistepConsistency(load_teacher(tiny_teacher("vp")), config)
    grid = method.grid(0)
    assert grid.shape == (2, 1001)
    assert float(grid[1, -2]) == method.schedule.t_min
    t = torch.full((4,), method.schedule.t_min, dtype=torch.float64)
    x, cond = torch.randn(4, 1, 8, 8), {"class_labels": torch.arange(4)}
    for r in (t, torch.zeros_like(t)):
        interval = Segment(t, r, torch.zeros_like(t))
        x_r = method.less_noisy(x, torch.zeros_like(x), torch.zeros_like(x), interval, cond)
        loss = method.following(x, x_r, interval, cond).loss
        loss.backward()
        grads = [p.grad for p in method.student.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_guidance_is_one_call_and_the_variance_is_the_conditional_ones(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = MultistepConsistency(teacher, Config(guidance_scale=3.0, eta=0.0))
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.9, dtype=torch.float64), {"class_labels": torch.arange(4)}
    seen: list[int] = []
    method.teacher.network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    got = method.less_noisy(x, torch.zeros_like(x), x, Segment(t, t - 0.2, t - 0.2), cond)
    assert seen == [8]
    torch.testing.assert_close(got, ddim_step(guided(teacher.denoiser, 3.0), x, t, t - 0.2, cond))
    _, conditional = method.predictions(x, t, cond)
    torch.testing.assert_close(conditional.x0, teacher.denoiser(x, t, cond).x0, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"guidance_scale: 3.0 guides the teacher's step"):
        MultistepConsistency(teacher, Config(guidance_scale=3.0, mode="training"))


RUN = {"method": "multistep_consistency", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("parameterization", "options"),
    [
        ("vp", {"segments": 2}),
        ("vp", {"segments": 1, "mode": "training"}),
        ("edm", {"segments": 4, "loss_weight": "v"}),
        ("flow", {"segments": 1, "distance": "l2"}),
    ],
)
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


def test_a_resumed_run_has_the_same_bits(tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), anneal_steps=4, segments=2, **RUN)
