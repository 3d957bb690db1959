"""Deterministic samplers, step by step against diffusers' own schedulers, and their measured order.

A stock loop and ours drive the same small random network, which notes every input and time it is given:
both must match at all steps, and so must the sample at the end.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.ode import Step, ddim_step, heun_step, heun_x0_step, solve
from diffdistill.core.prediction import OUTPUTS, Prediction
from diffdistill.core.schedule import LinearFlow, TrigFlow, sampling_grid
from diffdistill.exact.analytic import gaussian_teacher
from diffdistill.families import schedule_of

STEPS = 20
TRAILING = {"timestep_spacing": "trailing"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **TRAILING}
ZERO_SNR = {**SCALED, "rescale_betas_zero_snr": True}


class Network(nn.Module):
    """skip * x + size * a random function of x and time, float32; keeps what it has seen."""

    def __init__(self, skip: float, size: float, unit: float):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.mix = torch.randn(16, 16, generator=g) / 4
        self.phase = torch.randn(16, generator=g)
        self.skip, self.size, self.unit = skip, size, unit
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        self.seen.append((x, time.float()))
        time = time.float()[:, None] / self.unit
        return self.skip * x + self.size * torch.tanh(x @ self.mix + torch.sin(time + self.phase))


def network(scheduler: Any) -> Network:
    """Such that samples are of order one: a network that predicts eps must be close to x at the noisy end."""
    config = scheduler.config
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        return Network(0.0, 1.0, 0.5)
    if config.get("prediction_type") == "epsilon":
        return Network(1.0, 0.1, 200.0)
    return Network(0.3, 1.0, 200.0)


def noise() -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def stock(scheduler: Any, net: nn.Module, times: Sequence[Tensor]) -> Tensor:
    x = noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t, time in zip(scheduler.timesteps, times, strict=True):
        y = net(scale(x, t), time.expand(len(x)))
        x = scheduler.step(y, t, x).prev_sample
    return x


def ours(scheduler: Any, net: Network, first: Tensor, grid: Tensor | None, step: Step) -> Tensor:
    schedule, row = schedule_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    grid = sampling_grid(schedule, STEPS) if grid is None else grid(schedule) if callable(grid) else grid
    start = first / float(schedule.native(grid[0]).scale)
    return solve(step, Denoiser(net, schedule, row), start, grid, {}) * schedule.data_std


def compare(scheduler: Any, step: Step, grid: Any = None, times: Sequence[Tensor] | None = None) -> None:
    theirs, net = network(scheduler), network(scheduler)
    want = stock(scheduler, theirs, scheduler.timesteps if times is None else times)
    got = ours(scheduler, net, theirs.seen[0][0], grid, step)
    for (x, time), (x_stock, time_stock) in zip(net.seen, theirs.seen, strict=False):
        torch.testing.assert_close(time, time_stock, atol=1e-3, rtol=1e-6)
        assert float((x - x_stock).abs().max()) < 1e-5
    assert 0.2 < float(want.std()) < 2
    assert len(theirs.seen) <= len(net.seen) <= len(theirs.seen) + 1
    print(type(scheduler).__name__, float((got - want).abs().max()), want.std())
    assert float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("kind", "config"),
    [(k, c) for k in ("epsilon", "v_prediction", "sample") for c in ("scaled", "linear")]
    + [("v_prediction", "zero SNR"), ("sample", "zero SNR")],
)
def test_ddim(kind: str, config: str) -> None:
    configs: dict[str, Any] = {"scaled": SCALED, "linear": TRAILING, "zero SNR": ZERO_SNR}
    scheduler = diffusers.DDIMScheduler(**configs[config], prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    compare(scheduler, ddim_step)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_discrete(kind: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    compare(scheduler, ddim_step)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_euler(kind: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    compare(scheduler, ddim_step)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    compare(scheduler, ddim_step)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_of_order_one_on_flow_sigmas(shift: float) -> None:
    """That scheduler has a grid of its own, and hands out its times truncated to integers."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas
    compare(scheduler, ddim_step, lambda schedule: schedule.angle(sigmas), 1000 * sigmas[:-1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heun_discrete(kind: str) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**SCALED, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    compare(scheduler, heun_step)


def test_edm_heun() -> None:
    """KarrasVeScheduler without churn is Algorithm 1 of Karras et al. 2022."""
    scheduler = diffusers.KarrasVeScheduler(sigma_min=0.02, sigma_max=10.0, s_churn=0.0)
    scheduler.set_timesteps(STEPS)
    schedule, row = schedule_of({"_class_name": "EDMEulerScheduler"})
    net, sd = Network(0.0, 1.0, 0.5), 0.5
    x = noise() * 10

    def minus_eps(x: Tensor, sigma: Tensor) -> Tensor:
        """What this scheduler calls the model's output, from F."""
        r = torch.sqrt(sigma**2 + sd**2)
        x0 = sd**2 / r**2 * x + sigma * sd / r * net(x / r, (sigma.log() / 4).expand(len(x)))
        return (x0 - x) / sigma

    sigmas = [scheduler.schedule[t].sqrt() for t in scheduler.timesteps] + [torch.tensor(0.0)]
    start = x / math.sqrt(100 + sd**2)
    for sigma, after in pairwise(sigmas):
        y = minus_eps(x, sigma)
        out = scheduler.step(y, sigma, after, x)
        if after > 0:
            again = minus_eps(out.prev_sample, after)
            out = scheduler.step_correct(again, sigma, after, x, out.prev_sample, out.derivative)
        x = out.prev_sample
    grid = schedule.angle(torch.stack(sigmas).double())
    got = solve(heun_step, Denoiser(Network(0.0, 1.0, 0.5), schedule, row), start, grid, {}) * sd
    assert 0.2 < float(x.std()) < 2
    assert float((got - x).abs().max()) < 1e-5


def test_consistency_model_in_one_step() -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(1)
    schedule, _ = schedule_of({**scheduler.config, "_class_name": "CMStochasticIterativeScheduler"})
    grid = schedule.angle(torch.tensor([80.0, 0.0]))
    compare(scheduler, ddim_step, grid)
    assert schedule.init_scale(float(grid[0])) == pytest.approx(80 / math.sqrt(80**2 + 0.25), abs=1e-12)


# -- order of convergence --------------------------------------------------------------------------------------


def gaussian_error(step: Step, steps: int, top: float, bottom: float) -> float:
    teacher = gaussian_teacher([0.5, -1.0], torch.tensor([0.3, 1.7]))
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.linspace(top, bottom, steps + 1, dtype=torch.float64)
    exact: Callable[..., Tensor] = teacher.denoiser.network.flow_map  # type: ignore[assignment]
    got = solve(step, teacher.denoiser, x, grid, {})
    return float((got - exact(x, grid[:1].expand(8), grid[-1:].expand(8))).abs().max())


@pytest.mark.parametrize(("step", "order"), [(ddim_step, 1), (heun_step, 2), (heun_x0_step, 2)])
def test_order_of_convergence(step: Step, order: int) -> None:
    """Halving the step divides the error by 2^order."""
    errors = [gaussian_error(step, n, 1.4, 0.2) for n in (50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("step", "order"), [(ddim_step, 1), (heun_step, 2)])
def test_order_of_convergence_from_pure_noise_to_data(step: Step, order: int) -> None:
    """Less regular for Heun, for the place where it changes from x0 to eps lies between two steps."""
    coarse, fine = (gaussian_error(step, n, math.pi / 2, 0.0) for n in (100, 800))
    assert math.log2(coarse / fine) / 3 == pytest.approx(order, abs=0.1)


def test_ddim_step_is_the_rotation() -> None:
    teacher = gaussian_teacher([0.5], 0.3)
    x = torch.randn(4, 1, dtype=torch.float64)
    t, s = torch.tensor([1.2, 0.7, 0.3, 1.5]).double(), torch.tensor([0.9, 0.0, 0.2, 1.1]).double()
    v = teacher.denoiser.network(x, t)
    want = torch.cos(t - s)[:, None] * x - torch.sin(t - s)[:, None] * v
    torch.testing.assert_close(ddim_step(teacher.denoiser, x, t, s, {}), want, atol=1e-14, rtol=0)


@pytest.mark.parametrize("schedule", [TrigFlow(t_min=0.02), LinearFlow(t_min=0.02)])
def test_heun_step_to_zero_is_eulers(schedule: Any) -> None:
    """Also from pure noise, and where the network knows no time as clean as zero."""
    denoiser = Denoiser(Network(0.3, 1.0, 1.0), schedule, OUTPUTS["flow_prediction"])
    x, zero = noise(), torch.zeros(3, dtype=torch.float64)
    for t in (torch.tensor([0.3, 1.0, 1.5]).double(), torch.full((3,), math.pi / 2, dtype=torch.float64)):
        torch.testing.assert_close(heun_step(denoiser, x, t, zero, {}), ddim_step(denoiser, x, t, zero, {}))


def test_a_long_step_of_averaged_x0_stays_between_the_two() -> None:
    """From tan(t) = 160 to 16, with x0 = 0 at first and 1 then; averaged eps goes ten times as far."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return Prediction(x, t, (t < 1.55).to(x)[:, None], torch.ones_like(t), torch.zeros_like(t))

    t, s = (torch.atan(torch.tensor([q], dtype=torch.float64)) for q in (160.0, 16.0))
    for step, way in ((heun_x0_step, 0.45), (heun_step, 4.5)):
        moved = step(denoise, torch.zeros(1, 1, dtype=torch.float64), t, s, {}) / torch.cos(s)
        torch.testing.assert_close(moved.item(), way)


def test_each_sample_may_have_its_own_angles() -> None:
    teacher = gaussian_teacher([0.5, -1.0], torch.tensor([0.3, 1.7]))
    x = torch.randn(3, 2, dtype=torch.float64)
    t = torch.tensor([math.pi / 2, 1.0, 0.5], dtype=torch.float64)
    s = torch.tensor([1.2, 0.0, 0.4], dtype=torch.float64)
    for step in (ddim_step, heun_step, heun_x0_step):
        together = step(teacher.denoiser, x, t, s, {})
        for i in range(3):
            alone = step(teacher.denoiser, x[i : i + 1], t[i : i + 1], s[i : i + 1], {})
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-14, rtol=0)


def test_solve_visits_the_grid_and_passes_conditions_on() -> None:
    seen = []

    def step(denoise: Any, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        seen.append((float(t[0]), float(s[0]), tuple(t.shape), cond))
        return x + 1

    cond = {"label": torch.zeros(2)}
    x = solve(step, lambda *_: None, torch.zeros(2, 3), torch.tensor([3.0, 2.0, 0.0]), cond)  # type: ignore[arg-type]
    assert seen == [(3.0, 2.0, (2,), cond), (2.0, 0.0, (2,), cond)]
    assert torch.equal(x, torch.full((2, 3), 2.0))
