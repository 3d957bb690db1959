"""Schedules and time distributions against diffusers' schedulers and the formulas of the papers."""

import math
import warnings
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor

from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow, sampling_grid, student_levels
from diffdistill.core.times import log_normal, logit_normal, native_uniform
from diffdistill.errors import UserError

TRAINED = [0.001 + 0.0003 * i for i in range(50)]
VP_CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": TRAINED, "num_train_timesteps": len(TRAINED)},
    "short": {"beta_schedule": "linear", "num_train_timesteps": 100},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vp(name: str, zero_snr: bool = False, data_std: float = 1.0) -> DiscreteVP:
    return DiscreteVP.from_config({**VP_CONFIGS[name], "rescale_betas_zero_snr": zero_snr}, data_std)


def close(got: Tensor, want: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


# -- DiscreteVP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", VP_CONFIGS)
@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_alphas_cumprod_are_those_of_diffusers(scheduler: Any, name: str, zero_snr: bool) -> None:
    stock = scheduler(**VP_CONFIGS[name], rescale_betas_zero_snr=zero_snr)
    ours = DiscreteVP.from_config(dict(stock.config))
    assert ours.alphas_cumprod.dtype == torch.float64
    close(ours.alphas_cumprod, stock.alphas_cumprod, atol=1e-6)
    if zero_snr:
        assert float(ours.alphas_cumprod[-1]) == 0 and ours.t_max == math.pi / 2


def test_sigmoid_betas_are_those_of_diffusers() -> None:
    stock = diffusers.DDPMScheduler(beta_schedule="sigmoid", beta_end=0.01)
    close(DiscreteVP.from_config(dict(stock.config)).alphas_cumprod, stock.alphas_cumprod, atol=1e-6)


def test_an_empty_config_means_the_defaults_of_diffusers() -> None:
    close(DiscreteVP.from_config({}).alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod, atol=1e-6)


def test_an_unknown_beta_schedule_is_named() -> None:
    with pytest.raises(UserError, match="laplace"):
        DiscreteVP.from_config({"beta_schedule": "laplace"})


@pytest.mark.parametrize("data_std", [1.0, 0.5])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", VP_CONFIGS)
def test_vp_is_exact_at_every_timestep(name: str, zero_snr: bool, data_std: float) -> None:
    schedule = vp(name, zero_snr, data_std)
    abar = schedule.alphas_cumprod
    levels = torch.arange(len(abar))
    angles = schedule.angle(levels)
    close(angles, torch.atan2((1 - abar).sqrt(), abar.sqrt() * data_std), atol=1e-15)
    native = schedule.native(angles)
    assert native.time.tolist() == levels.tolist()
    close(native.alpha, abar.sqrt(), atol=1e-14)
    close(native.sigma, (1 - abar).sqrt(), atol=1e-14)
    assert (schedule.t_min, schedule.t_max) == (float(angles[0]), float(angles[-1]))


@pytest.mark.parametrize("name", VP_CONFIGS)
def test_vp_time_and_angle_are_inverse_between_timesteps(name: str) -> None:
    schedule = vp(name)
    u = torch.rand(200, generator=generator(), dtype=torch.float64)
    angles = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    close(schedule.angle(schedule.native(angles).time), angles, atol=1e-13)
    levels = u * (len(schedule.alphas_cumprod) - 1)
    close(schedule.native(schedule.angle(levels)).time, levels, atol=1e-9)
    assert float(schedule.angle(2)) < float(schedule.angle(2.5)) < float(schedule.angle(3))


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20, 48, 50, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_vp_grid_is_ddims_trailing_one(name: str, steps: int) -> None:
    stock = diffusers.DDIMScheduler(**VP_CONFIGS[name], timestep_spacing="trailing")
    stock.set_timesteps(steps)
    schedule = vp(name)
    grid = sampling_grid(schedule, steps)
    assert schedule.native(grid[:-1]).time.tolist() == stock.timesteps.tolist()
    assert float(grid[-1]) == 0


def test_impossible_numbers_of_steps_are_refused() -> None:
    every: list[Schedule] = [vp("linear"), LinearFlow(), EDM(), TrigFlow()]
    for schedule in every:
        with pytest.raises(UserError, match="steps: 0"):
            schedule.levels(0)
    with pytest.raises(UserError, match="1000 or fewer"):
        vp("linear").levels(1001)


def test_an_expanded_angle_gives_no_warning() -> None:
    """torch warns, once a process, that searchsorted copies a non-contiguous tensor."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vp("linear").native(torch.tensor(0.5, dtype=torch.float64).expand(4))
    finally:
        torch.set_warn_always(False)


# -- flow matching, EDM, TrigFlow -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("timesteps", [1000, 500])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_is_that_of_flow_match_euler(shift: float, timesteps: int, steps: int) -> None:
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=timesteps)
    stock.set_timesteps(steps)
    schedule = LinearFlow(shift, time_scale=timesteps, train_timesteps=timesteps)
    native = schedule.native(sampling_grid(schedule, steps))
    close(native.sigma, stock.sigmas, atol=1e-6)
    close(native.time[:-1], stock.timesteps, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 18])
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_edm_grid_is_that_of_edm_euler(rho: float, steps: int) -> None:
    stock = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7, rho=rho)
    stock.set_timesteps(steps)
    schedule = EDM(0.01, 50.0, 0.7, rho)
    grid = sampling_grid(schedule, steps)
    close(0.7 * torch.tan(grid), stock.sigmas, atol=0, rtol=1e-6)
    native = schedule.native(grid[:-1])
    close(native.sigma, stock.sigmas[:-1], atol=0, rtol=1e-6)
    close(native.time, stock.timesteps, atol=1e-6)


def test_trigflow_grid_is_uniform_from_noise_to_data() -> None:
    close(sampling_grid(TrigFlow(), 4), torch.arange(4, -1, -1, dtype=torch.float64) * math.pi / 8, atol=1e-15)


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_level_and_angle_are_inverse(data_std: float) -> None:
    u = torch.rand(200, generator=generator(), dtype=torch.float64)
    flow, edm, trig = LinearFlow(data_std=data_std), EDM(data_std=data_std), TrigFlow(data_std)
    close(flow.native(flow.angle(u)).sigma, u, atol=1e-14)
    close(flow.native(flow.angle(u)).time, 1000 * u, atol=1e-11)
    sigma = 0.002 * 40_000**u
    close(edm.native(edm.angle(sigma)).sigma, sigma, atol=0, rtol=1e-12)
    close(edm.native(edm.angle(sigma)).time, sigma.log() / 4, atol=1e-12)
    close(trig.native(trig.angle(u)).time, u, atol=0)
    # The angle is that of a signal of std data_std against unit noise.
    close(torch.tan(flow.angle(u)), u / ((1 - u) * data_std), atol=0, rtol=1e-13)
    close(torch.tan(edm.angle(sigma)), sigma / data_std, atol=0, rtol=1e-13)


def test_ends_of_the_flow_and_of_edm() -> None:
    flow = LinearFlow().native(torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    assert flow.sigma.tolist() == [0.0, 1.0] and flow.time.tolist() == [0.0, 1000.0]
    edm = EDM().native(torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    close(edm.sigma, torch.tensor([0.002, 80.0]), atol=1e-12, rtol=1e-7)
    close(torch.tensor([math.tan(EDM().t_min), math.tan(EDM().t_max)]), torch.tensor([0.004, 160.0]), atol=0, rtol=1e-6)


STOCK_STARTS: dict[str, tuple[Any, Schedule]] = {
    "DDIM": (diffusers.DDIMScheduler(timestep_spacing="trailing"), vp("linear")),
    "EDM": (diffusers.EDMEulerScheduler(sigma_max=50.0), EDM(sigma_max=50.0)),
    "CM": (
        diffusers.CMStochasticIterativeScheduler(sigma_max=50.0),
        EDM(sigma_max=50.0, time_scale=250.0, unit_init=False),
    ),
    "flow": (
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, final_sigmas_type="zero"
        ),
        LinearFlow(),
    ),
}


@pytest.mark.parametrize("name", STOCK_STARTS)
def test_one_step_students_start_as_the_stock_scheduler_does(name: str) -> None:
    """init_level is its first time, init_scale makes its first network input."""
    stock, schedule = STOCK_STARTS[name]
    stock.set_timesteps(1)
    z = torch.randn(5, generator=generator())
    want = stock.scale_model_input(z * stock.init_noise_sigma, stock.timesteps[0])
    t = schedule.angle(schedule.init_level)
    native = schedule.native(t)
    close(native.scale * schedule.init_scale(float(t)) * z.double(), want, atol=1e-6)
    close(native.time, stock.timesteps[0], atol=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [vp("linear"), LinearFlow(shift=3.0, starts_at_one=True), EDM(), TrigFlow()],
    ids=lambda s: type(s).__name__,
)
def test_levels_from_the_noisiest_start_are_those_without_one(schedule: Schedule) -> None:
    for steps in (1, 2, 4):
        close(student_levels(schedule, steps, schedule.init_level), student_levels(schedule, steps), atol=1e-12)


@pytest.mark.parametrize("start", [3, 399, 750, 998])
def test_levels_from_a_start_are_the_row_of_the_stock_scheduler_of_that_chain(start: int) -> None:
    stock = diffusers.LCMScheduler(num_train_timesteps=start + 1, original_inference_steps=start + 1)
    for steps in (1, 2, 3, 4):
        stock.set_timesteps(steps)
        assert student_levels(vp("linear"), steps, start).tolist() == stock.timesteps.tolist()
    with pytest.raises(UserError, match="student_level: 3 leaves no 5 timesteps; give 4 or more"):
        student_levels(vp("linear"), 5, 3)


def test_levels_of_a_flow_and_of_edm_divide_the_way_from_their_start() -> None:
    """A flow's before the shift: a sigma of 0.9 at shift 3 is the time 0.75."""
    close(student_levels(LinearFlow(), 4, 0.8), torch.tensor([0.8, 0.6, 0.4, 0.2]), atol=1e-7)
    times = torch.tensor([0.75, 0.5, 0.25])
    close(student_levels(LinearFlow(shift=3.0), 3, 0.9), 3 * times / (1 + 2 * times), atol=1e-7)
    close(student_levels(EDM(), 3, 2.5), EDM(sigma_max=2.5).levels(4)[:-1], atol=1e-12)


def test_init_scale_with_data_that_is_not_of_unit_variance() -> None:
    """The stock schedulers draw x_native from N(0, I), and x_native is scale * x_t."""
    for schedule in (vp("linear", data_std=0.5), LinearFlow(data_std=0.5)):
        t = schedule.angle(schedule.init_level)
        native = schedule.native(t)
        close(native.scale * schedule.init_scale(float(t)), torch.tensor(1.0), atol=1e-14)
    assert TrigFlow().init_scale(1.0) == 1 and TrigFlow().init_level == math.pi / 2
    # A whole timestep whatever the shift: the stock flow scheduler truncates the times it gives the network.
    assert LinearFlow(3.0).init_level * 1000 == 999


# -- distributions over the angle ------------------------------------------------------------------------------

N = 20_000


def check_moments(x: Tensor, mean: float, std: float) -> None:
    """Within four standard errors (of a normal, the widest distribution here)."""
    assert x.dtype == torch.float64 and x.shape == (N,)
    assert abs(float(x.mean()) - mean) < 4 * std / N**0.5
    assert abs(float(x.std()) - std) < 4 * std / (2 * N) ** 0.5


def test_native_uniform_hits_the_timesteps_between_the_bounds_and_no_others() -> None:
    schedule = vp("scaled")
    levels = schedule.native(native_uniform(schedule, N, generator(), 0.02, 0.98)).time
    assert set(levels.tolist()) == set(range(20, 980))
    check_moments(levels, 499.5, 960 / 12**0.5)
    assert set(schedule.native(native_uniform(schedule, N, generator())).time.tolist()) == set(range(1000))
    assert float(schedule.at_fraction(torch.tensor(1.0, dtype=torch.float64))) == schedule.t_max


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_native_uniform_of_a_flow_is_the_shifted_uniform(shift: float) -> None:
    schedule = LinearFlow(shift)
    sigma = schedule.native(native_uniform(schedule, N, generator(), 0.1, 0.7)).sigma
    u = sigma / (shift - (shift - 1) * sigma)
    assert float(u.min()) >= 0.1 - 1e-12 and float(u.max()) <= 0.7 + 1e-12
    check_moments(u, 0.4, 0.6 / 12**0.5)


def test_native_uniform_of_edm_is_uniform_on_the_karras_grid() -> None:
    schedule = EDM()
    sigma = 0.5 * torch.tan(native_uniform(schedule, N, generator()))
    assert float(sigma.min()) >= 0.002 and float(sigma.max()) <= 80
    u = (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    check_moments(u, 0.5, 12**-0.5)
    ends = schedule.at_fraction(torch.tensor([0.0, 1.0], dtype=torch.float64))
    close(ends, torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64), atol=1e-14)


def test_native_uniform_of_trigflow_is_uniform_in_the_angle() -> None:
    schedule = TrigFlow(t_min=0.1, t_max=1.3)
    t = native_uniform(schedule, N, generator(), 0.25, 0.75)
    assert float(t.min()) >= 0.4 and float(t.max()) <= 1.0
    check_moments(t, 0.7, 0.6 / 12**0.5)


@pytest.mark.parametrize("schedule", [EDM(), LinearFlow(data_std=2.0), TrigFlow()])
def test_log_normal(schedule: Schedule) -> None:
    t = log_normal(schedule, N, generator(), -1.2, 1.1)
    assert float(t.min()) > 0 and float(t.max()) < math.pi / 2
    check_moments(torch.log(schedule.data_std * torch.tan(t)), -1.2, 1.1)


@pytest.mark.parametrize("schedule", [LinearFlow(3.0), LinearFlow(data_std=0.5)])
def test_logit_normal(schedule: LinearFlow) -> None:
    t = logit_normal(schedule, N, generator(), 0.3, 0.8)
    assert float(t.min()) > 0 and float(t.max()) < math.pi / 2
    check_moments(torch.logit(schedule.native(t).sigma), 0.3, 0.8)


@pytest.mark.parametrize("grid", ["own", "given"])
def test_a_shift_may_depend_on_the_number_of_steps(grid: Literal["own", "given"]) -> None:
    """It moves the stock row alone: a student's levels and the meaning of a time are those of the usual shift."""
    schedule = LinearFlow(3.0, grid=grid, log_shift=(-0.01, 0.9))
    for steps in (1, 4, 50):
        expected = LinearFlow(math.exp(0.9 - 0.01 * steps), grid=grid)
        assert torch.equal(schedule.levels(steps), expected.levels(steps))
        assert torch.equal(schedule.trailing(steps), LinearFlow(3.0).trailing(steps))
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(schedule.at_fraction(u), LinearFlow(3.0).at_fraction(u))


def test_times_are_a_function_of_the_generator() -> None:
    schedule = LinearFlow()
    for draw in (
        lambda g: native_uniform(schedule, 5, g),
        lambda g: log_normal(schedule, 5, g, 0.0, 1.0),
        lambda g: logit_normal(schedule, 5, g, 0.0, 1.0),
    ):
        assert torch.equal(draw(generator(1)), draw(generator(1)))
        assert not torch.equal(draw(generator(1)), draw(generator(2)))
