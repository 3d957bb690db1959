"""The second time: the student starts as the teacher, takes r, and is exported as the stock network for its jumps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import UserError, load_teacher
from diffdistill.core.denoiser import Denoiser, Extra
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow, student_levels
from diffdistill.players.recomputing import checkpoint_activations
from diffdistill.players.sampler import DDIM, Renoise, Sampler, Step
from diffdistill.players.scale_input import plain_network
from diffdistill.players.teacher import Teacher
from diffdistill.players.two_times import second_times, time_input
from diffdistill.rng import image_generators
from diffdistill.scaffold.tangent import two_time_player
from tests.scaffold.straight import scatter

Teachers = Callable[[str], Path]
VP = DiscreteVP.from_config({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True})


def points(teacher: Teacher, n: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(n, *teacher.shape)
    return x, torch.linspace(0.4, 1.5, n, dtype=torch.float64), teacher.sample_cond(n)


@pytest.mark.parametrize(
    "schedule", [VP, LinearFlow(), LinearFlow(shift=3.0, starts_at_one=True), EDM(), TrigFlow(data_std=0.5)]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_jumps_of_a_students_levels_are_equal(schedule: Schedule, steps: int) -> None:
    levels = schedule.angle(student_levels(schedule, steps))
    gaps = -schedule.fraction(torch.cat([levels, torch.zeros(1).double()])).diff()
    # A flow in pixels starts a thousandth below 1, where its stock scheduler does.
    assert torch.allclose(gaps, torch.full((steps,), 1 / steps).double(), atol=1.1e-3)
    assert float(schedule.fraction(torch.zeros(1).double())) == pytest.approx(0, abs=1e-12)


def test_fractions_are_the_inverse_of_the_schedules_own() -> None:
    u = torch.tensor([0.2, 0.5, 0.9]).double()
    for schedule in (LinearFlow(shift=3.0, data_std=0.5), EDM(), TrigFlow()):
        assert torch.allclose(schedule.fraction(schedule.at_fraction(u)), u, atol=1e-12)
    assert torch.allclose(VP.fraction(VP.at_fraction(u)), u, atol=1e-3)  # which rounds to a timestep


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
def test_it_starts_as_the_teacher_for_every_r_and_stays_it_at_r_equal_t(
    parameterization: str, tiny_teacher: Teachers
) -> None:
    teacher = load_teacher(tiny_teacher(parameterization))
    student = two_time_player(teacher, 2, None).eval()
    x, t, cond = points(teacher)
    same = teacher.denoiser(x, t, cond).y
    for r in (t, t / 2, 0 * t):
        assert torch.equal(student(x, t, cond, Extra(r=r)).y, same)
    assert torch.equal(student(x, t, cond).y, same)
    for k, layer in enumerate(second_times(student.network)):
        scatter(layer.mlp, k)
    assert torch.equal(student(x, t, cond, Extra(r=t)).y, same)
    near, far = (student(x, t, cond, Extra(r=r)).y for r in (t / 2, 0 * t))
    assert not torch.allclose(near, same, atol=1e-3) and not torch.allclose(near, far, atol=1e-3)
    assert all(layer.given is None for layer in second_times(student.network)), "nothing of a call stays"


@pytest.mark.parametrize("parameterization", ["vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_exported_network_makes_the_samplers_jumps(
    parameterization: str, steps: int, tiny_teacher: Teachers
) -> None:
    teacher = load_teacher(tiny_teacher(parameterization))
    student = two_time_player(teacher, steps, None).eval()
    for k, layer in enumerate(second_times(student.network)):
        scatter(layer.mlp, k)
    network = plain_network(student.network)
    assert type(network) is type(teacher.denoiser.network) and not second_times(network)
    assert network.state_dict().keys() == teacher.denoiser.network.state_dict().keys()
    plain = student.with_network(network, None)
    x, _, cond = points(teacher)
    levels = student.schedule.angle(student_levels(student.schedule, steps))
    for t, r in zip(levels, [*levels[1:], torch.zeros(()).double()], strict=True):
        told = student(x, t.expand(4), cond, Extra(r=r.expand(4))).y
        assert torch.allclose(student(x, t.expand(4), cond).y, told, atol=2e-2)  # to the rounding of a grid
        assert torch.allclose(plain(x, t.expand(4), cond).y, student(x, t.expand(4), cond).y, atol=1e-5)


@pytest.mark.parametrize("step", [DDIM(), Renoise()])
def test_jumps_of_several_lengths_are_exported_to_the_last_digits(step: Step, tiny_teacher: Teachers) -> None:
    """A flow's first jump is a thousandth shorter than the others, and with fresh noise every step leads to data."""
    teacher = load_teacher(tiny_teacher("flow"))
    student = two_time_player(teacher, 3, None).eval()
    for k, layer in enumerate(second_times(student.network)):
        scatter(layer.mlp, k)
    sampler = Sampler(student, student_levels(student.schedule, 3).tolist(), step)
    assert not sampler.equal_jumps
    plain = student.with_network(sampler.network(teacher.shape, teacher.sample_cond(3)), None)
    assert not second_times(plain.network)
    x, _, cond = points(teacher)
    for k, level in enumerate(sampler.levels):
        t = student.schedule.angle(level).expand(4)
        assert torch.allclose(plain(x, t, cond).y, sampler.predict(x, t, k, cond).y, atol=1e-4)


def test_recomputed_activations_see_the_gap_of_their_pass(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    student = two_time_player(teacher, 1, None).train()
    for k, layer in enumerate(second_times(student.network)):
        scatter(layer.mlp, k)
    x, t, cond = points(teacher)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        both = [student(x, t, cond, Extra(r=r)).y.square().sum() for r in (t / 2, 0 * t)]
        return list(torch.autograd.grad(sum(both), list(student.parameters()), allow_unused=True))  # type: ignore[arg-type]

    plain = gradients()
    checkpoint_activations(student.network)
    for once, again in zip(plain, gradients(), strict=True):
        assert (once is None) == (again is None)
        assert once is None or torch.allclose(once, again, rtol=1e-4, atol=1e-5)


def test_refusals(tiny_teacher: Teachers) -> None:
    teacher = load_teacher(tiny_teacher("vp"))
    other = Denoiser(torch.nn.Linear(2, 2), teacher.denoiser.schedule, teacher.denoiser.output)
    with pytest.raises(UserError, match=r"Linear has no layer to which a second time could be added; .*time_embedding"):
        time_input(other, default=1.0)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_sampler_tells_where_each_step_leads(steps: int, tiny_teacher: Teachers) -> None:
    """Whatever number of steps the student's own sampler has; fresh noise goes on an image, which is at 0."""
    teacher = load_teacher(tiny_teacher("flow"))
    student = two_time_player(teacher, 4, None).eval()
    seen: list[tuple[float, float]] = []
    call = student.extra_call
    assert call is not None

    def noted(network: Any, x: Any, time: Any, cond: Any, extra: Extra) -> torch.Tensor:
        seen.append((round(float(time[0]) / 1000, 3), round(float(extra.gap[0]), 3)))  # type: ignore[index]
        return call(network, x, time, cond, extra)

    student.extra_call = noted
    levels = student_levels(student.schedule, steps).tolist()
    for step, ends in ((DDIM(), [*levels[1:], 0.0]), (Renoise(), [0.0] * steps)):
        seen.clear()
        Sampler(student, levels, step)(teacher.shape, teacher.sample_cond(2), image_generators(0, range(2)))
        expected = [(t, t - r) for t, r in zip(levels, ends, strict=True)]
        assert len(seen) == steps and torch.allclose(torch.tensor(seen), torch.tensor(expected), atol=2e-3)
