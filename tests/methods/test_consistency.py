"""Consistency models: the exact checks hold, known mistakes are caught, every mode trains, resumes and is exported."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import UserError, load_teacher
from diffdistill.core import distances
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow
from diffdistill.core.times import karras_grid
from diffdistill.exact.checks import run_checks
from diffdistill.methods import consistency
from diffdistill.methods.checks.consistency import verify
from diffdistill.methods.consistency import Config, Consistency, Step
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.scaffold import following
from diffdistill.scaffold.method import Batch
from tests.methods.short_runs import same_when_resumed, trains

Teachers = Callable[[str], Path]


def test_every_exact_check_holds() -> None:
    checks = run_checks(verify)
    assert [c for c in checks if not c.ok] == []
    assert sum(c.name.startswith("product of the step factors") for c in checks) == 6


def at_the_same_time(self: Consistency, x_t: Tensor, x_r: Tensor, interval: Step, *rest: Any, **kw: Any) -> Any:
    return REAL["following"](self, x_t, x_r, Step(interval.t, interval.t), *rest, **kw)


def swapped(self: Consistency, x_t: Tensor, x_r: Tensor, interval: Step, *rest: Any, **kw: Any) -> Any:
    return REAL["following"](self, x_r, x_t, Step(interval.r, interval.t), *rest, **kw)


def with_gradient(self: Consistency, x_r: Tensor, r: Tensor, cond: Any) -> Tensor:
    """The target's own prediction, through the student, with no boundary in its way."""
    inside = (r > self.end)[:, None]
    with torch.enable_grad():
        return torch.where(inside, self.student(x_r, r, cond).x0, REAL["target_x0"](self, x_r, r, cond))


def no_boundary(self: Consistency, x_r: Tensor, r: Tensor, cond: Any) -> Tensor:
    with torch.no_grad():
        return self.target(x_r, r, cond).x0


def unscaled_boundary(self: Consistency, x_r: Tensor, r: Tensor, cond: Any) -> Tensor:
    return torch.where((r > self.end)[:, None], REAL["target_x0"](self, x_r, r, cond), x_r)


def other_noise(self: Consistency, x_t: Tensor, x0: Tensor, eps: Tensor, interval: Step, cond: Any) -> Tensor:
    if self.from_teacher:
        return REAL["less_noisy"](self, x_t, x0, eps, interval, cond)
    return diffuse(x0, interval.r, eps.roll(1, 0))


def fast_average(self: Consistency, step: int) -> None:
    with torch.no_grad():
        for average, p in zip(self.target.parameters(), self.student.parameters(), strict=True):
            average.lerp_(p, self.target_decay(step))


REAL = {
    name: getattr(Consistency, name) for name in ("following", "target_x0", "less_noisy", "sampler", "easy_partner")
}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the target is read at t": (Consistency, "following", at_the_same_time),
    "the gradient goes through the less noisy point": (Consistency, "following", swapped),
    "the target gets a gradient": (Consistency, "target_x0", with_gradient),
    "no boundary": (Consistency, "target_x0", no_boundary),
    "the boundary is not in the scale of x0": (Consistency, "target_x0", unscaled_boundary),
    "training draws new noise for x_r": (Consistency, "less_noisy", other_noise),
    "Euler for Heun": (consistency, "heun_step", consistency.ddim_step),
    "the average runs the other way": (Consistency, "after_step", fast_average),
    "the sampler is deterministic": (
        Consistency,
        "sampler",
        lambda self: Sampler(self.student, REAL["sampler"](self).levels, DDIM()),
    ),
    "N(k) without its + 1": (
        consistency,
        "grid_points_at",
        lambda k, total, s0, s1, f=consistency.grid_points_at: max(2, f(k, total, s0, s1) - 1),
    ),
    "the stages of easy are ignored": (
        Consistency,
        "easy_partner",
        lambda self, t, step: REAL["easy_partner"](self, t, 0),
    ),
    "the l2 norm of each element": (
        distances,
        "pseudo_huber",
        lambda x, y, c: per_sample_mean(torch.sqrt((x - y).square() + c**2) - c),
    ),
    "each pass drops its own units": (following, "seeded", lambda *_: contextlib.nullcontext()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    torch.manual_seed(0)
    assert any(not c.ok for c in verify())  # stops at the first


# -- grids and times -------------------------------------------------------------------------------------------


def test_the_karras_grid_is_edms_own() -> None:
    schedule = EDM()
    got = schedule.data_std * torch.tan(karras_grid(schedule, 18, schedule.t_max))
    torch.testing.assert_close(got, schedule.levels(18), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        LinearFlow(),
        DiscreteVP.from_config({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
        DiscreteVP.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ],
)
def test_the_karras_grid_stays_within_what_is_known(schedule: Any) -> None:
    grid = karras_grid(schedule, 40, schedule.t_max)
    assert bool((grid.diff() < 0).all())
    assert schedule.t_min <= float(grid[-1]) < 0.05
    assert float(grid[0]) <= schedule.t_max
    assert 14 < float(torch.tan(grid[0])) <= 160 * (1 + 1e-12)


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize("grid", ["karras", "native"])
def test_the_first_point_is_where_the_sampler_starts(parameterization: str, grid: Any, tiny_teacher: Teachers) -> None:
    method = Consistency(load_teacher(tiny_teacher(parameterization)), Config(grid=grid, grid_points=10))
    points = method.grid(0)
    assert len(points) == 10
    assert float(points[0]) == float(method.schedule.angle(method.sampler().levels[0]))
    draw = Batch(64, (1, 8, 8), {}, torch.zeros(64, 1, 8, 8), torch.device("cpu"), (0, 3, 0))
    t, r = method.interval(3, draw)
    drawn = [int((points == a).nonzero()) for a in t]
    assert set(drawn) == set(range(9))
    assert torch.equal(r, points[torch.tensor(drawn) + 1])


def test_easy_draws_its_times_from_the_log_normal_distribution(tiny_teacher: Teachers) -> None:
    method = Consistency(load_teacher(tiny_teacher("edm")), Config(mode="easy"))
    batch = Batch(4000, (1, 8, 8), {}, torch.zeros(1), torch.device("cpu"), (0, 0, 0))
    t, r = method.interval(0, batch)
    log_sigma = torch.log(0.5 * torch.tan(t))
    assert abs(float(log_sigma.mean()) + 1.1) < 0.1
    assert abs(float(log_sigma.std()) - 2.0) < 0.1
    assert bool((r < t).all())
    assert bool(((r == 0) | (r >= method.schedule.t_min)).all())


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mode": "training"}, {"mode": "easy"}])
def test_guidance_needs_a_teacher_step(options: dict[str, Any], tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    with pytest.raises(UserError, match=r"guidance_scale: 2.0 guides the teacher's step"):
        Consistency(teacher, Config(guidance_scale=2.0, **options))


def test_a_grid_finer_than_the_schedule_is_refused(tiny_teacher: Teachers) -> None:
    flow = load_teacher(tiny_teacher("flow"))
    with pytest.raises(UserError, match="grid_points: 1500 points are more than the teacher's schedule"):
        Consistency(flow, Config(grid="native", grid_points=1500))


# -- training --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def calls(**networks: nn.Module) -> Iterator[list[tuple[str, int]]]:
    """(name, batch size) of each network pass inside the block."""
    seen: list[tuple[str, int]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, len(args[0]))))
        for name, module in networks.items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def batch_of(method: Consistency) -> Batch:
    cond = {"class_labels": torch.arange(4)}
    return Batch(4, (1, 8, 8), cond, torch.randn(4, 1, 8, 8), torch.device("cpu"), (0, 0, 0))


@pytest.mark.parametrize(
    ("options", "teacher_passes"),
    [
        ({"solver": "heun"}, [4, 4]),
        ({"solver": "euler", "guidance_scale": 3.0}, [8]),
        ({"mode": "training"}, []),
        ({"mode": "easy"}, []),
        ({"mode": "easy", "easy_from": "teacher"}, [4]),
    ],
)
def test_no_network_runs_twice_and_guidance_is_the_teachers_alone(
    options: dict[str, Any], teacher_passes: list[int], tiny_teacher: Teachers
) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    method = Consistency(teacher, Config(**options))
    target = {"target": method.target.network} if method.state else {}
    with calls(teacher=teacher.denoiser.network, student=method.student.network, **target) as seen:
        method.turns(0)[0].loss(batch_of(method)).loss.backward()
    assert [n for name, n in seen if name == "teacher"] == teacher_passes
    assert [n for name, n in seen if name == "student"] == ([4] if method.state else [4, 4])
    assert all(p.grad is None for p in method.target.parameters()) or not method.state
    assert method.target.training, "dropout must be on in both passes"


def test_the_students_dropout_is_as_said_and_the_teachers_as_it_was(tiny_teacher: Teachers) -> None:
    def shares(denoiser: nn.Module) -> set[float]:
        return {m.p for name, m in denoiser.named_modules() if isinstance(m, nn.Dropout) and name.endswith("dropout")}

    teacher = load_teacher(tiny_teacher("vp"))
    method = Consistency(teacher, Config(student_dropout=0.2))
    assert shares(method.student) == shares(method.target) == {0.2} and shares(teacher.denoiser) == {0.1}
    attention = [m.p for m in method.student.modules() if isinstance(m, nn.Dropout) and m.p != 0.2]
    assert attention and set(attention) == {0.0}  # which has dropout layers too, and stays without
    assert shares(Consistency(teacher, Config()).student) == {0.1}
    with pytest.raises(UserError, match=r"student_dropout: 0\.2 was given, and the student's network has no dropout"):
        following.set_dropout(nn.Linear(2, 2), 0.2)


RUN = {"method": "consistency", "data": "digits", "batch_size": 4, "sample_every": 0, "device": "cpu"}


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize("options", [{"grid_points": 8}, {"mode": "training", "grid": "native"}, {"mode": "easy"}])
def test_it_trains_every_parameterisation(
    parameterization: str, options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path
) -> None:
    trains(tmp_path, teacher=str(tiny_teacher(parameterization)), **RUN, **options)


@pytest.mark.parametrize("options", [{"target_ema": 0.5}, {"mode": "training", "ramp_steps": 4}])
def test_a_resumed_run_has_the_same_bits(options: dict[str, Any], tiny_teacher: Teachers, tmp_path: Path) -> None:
    same_when_resumed(tmp_path, teacher=str(tiny_teacher("vp")), student_lr=1e-2, **RUN, **options)
