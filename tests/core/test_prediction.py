"""The Denoiser and its conversions: what the network receives, and x0, eps and v from what it returns.

Everything native here is written out again from the definitions, apart from the product code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS, Output, Prediction, edm_boundary
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow

SIGMA_MIN = 0.002


class Seen(NamedTuple):
    """At an angle, by the definition of the schedule; x_native = alpha x0 + sigma eps."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    c_in: Tensor  #: network input = c_in * x_native


def see_vp(schedule: Any, t: Tensor) -> Seen:
    abar = schedule.alphas_cumprod
    table = torch.atan2((1 - abar).sqrt(), abar.sqrt() * schedule.data_std)
    k = torch.searchsorted(table, t, right=True).clamp(1, len(table) - 1) - 1
    time = k + (t - table[k]) / (table[k + 1] - table[k])
    ratio = schedule.data_std * torch.tan(t)  # sigma / alpha
    alpha = 1 / torch.sqrt(1 + ratio**2)
    return Seen(time, alpha, ratio * alpha, torch.ones_like(t))


def see_flow(schedule: Any, t: Tensor) -> Seen:
    ratio = schedule.data_std * torch.tan(t)
    sigma = ratio / (1 + ratio)
    return Seen(1000 * sigma, 1 / (1 + ratio), sigma, torch.ones_like(t))


def see_edm(schedule: Any, t: Tensor) -> Seen:
    sigma = schedule.data_std * torch.tan(t)
    return Seen(sigma.log() / 4, torch.ones_like(t), sigma, 1 / torch.sqrt(sigma**2 + schedule.data_std**2))


def see_trigflow(schedule: Any, t: Tensor) -> Seen:
    return Seen(t, torch.cos(t) / schedule.data_std, torch.sin(t), torch.ones_like(t))


def vp(data_std: float = 1.0, **config: Any) -> DiscreteVP:
    return DiscreteVP.from_config(config, data_std)


@dataclass(frozen=True)
class Case:
    schedule: Schedule
    see: Callable[[Any, Tensor], Seen]


CASES = {
    "linear": Case(vp(), see_vp),
    "linear, data_std 0.5": Case(vp(0.5), see_vp),
    "scaled": Case(vp(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), see_vp),
    "cosine": Case(vp(beta_schedule="squaredcos_cap_v2"), see_vp),
    "zero SNR": Case(vp(rescale_betas_zero_snr=True), see_vp),
    "zero SNR, data_std 0.5": Case(vp(0.5, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True), see_vp),
    "trained": Case(vp(trained_betas=[0.001 + 0.0003 * i for i in range(50)]), see_vp),
    "flow": Case(LinearFlow(), see_flow),
    "flow, shift 3": Case(LinearFlow(3.0), see_flow),
    "flow, data_std 0.5": Case(LinearFlow(3.0, data_std=0.5), see_flow),
    "edm": Case(EDM(), see_edm),
    "edm, data_std 1": Case(EDM(data_std=1.0), see_edm),
    "trigflow": Case(TrigFlow(), see_trigflow),
    "trigflow, data_std 0.5": Case(TrigFlow(0.5), see_trigflow),
}


def output(row: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    """A network's output by the definition of its kind; x0 in the data's units, coefficients (B, 1)."""
    if row == "sample":
        return x0
    if row == "epsilon":
        return eps
    if row == "v_prediction":
        return alpha * eps - sigma * x0
    if row == "flow_prediction":
        return eps - x0
    r = torch.sqrt(sigma**2 + data_std**2)
    if row == "edm":
        return sigma / (data_std * r) * x0 - data_std / r * eps
    # Solve x0 = c_skip x + c_out F for F.
    c_skip = data_std**2 / ((sigma - SIGMA_MIN) ** 2 + data_std**2)
    c_out = (sigma - SIGMA_MIN) * data_std / r
    return (x0 - c_skip * (alpha * x0 + sigma * eps)) / c_out


ALL_ROWS: dict[str, Output] = {**OUTPUTS, "edm_boundary": edm_boundary(SIGMA_MIN)}
COMBINATIONS = [(c, r) for c in CASES for r in ALL_ROWS if r != "edm_boundary" or c.startswith("edm")]


class Fake(nn.Module):
    """Checks what it is given, and answers with a known output."""

    def __init__(self, want: Tensor, time: Tensor, y: Tensor, atol: float = 1e-12):
        super().__init__()
        self.want, self.time, self.y, self.atol = want, time, y, atol

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        torch.testing.assert_close(x, self.want, atol=self.atol, rtol=self.atol)
        torch.testing.assert_close(time, self.time, atol=1e-9, rtol=1e-12)
        return self.y


class Known(NamedTuple):
    prediction: Prediction
    x_t: Tensor
    x0: Tensor  #: of unit variance
    eps: Tensor
    t: Tensor


def predict(case: str, row: str, t: Tensor) -> Known:
    """Known x0 and eps -> x_native and y -> through the Denoiser. float64."""
    schedule, see = CASES[case].schedule, CASES[case].see
    g = torch.Generator().manual_seed(len(case) + len(row))
    x0, eps = torch.randn(2, len(t), 6, generator=g, dtype=torch.float64)
    seen = see(schedule, t)
    alpha, sigma, c_in = seen.alpha[:, None], seen.sigma[:, None], seen.c_in[:, None]
    x0_data = x0 * schedule.data_std
    y = output(row, x0_data, eps, alpha, sigma, schedule.data_std)
    network = Fake(c_in * (alpha * x0_data + sigma * eps), seen.time, y)
    x_t = torch.cos(t)[:, None] * x0 + torch.sin(t)[:, None] * eps
    return Known(Denoiser(network, schedule, ALL_ROWS[row])(x_t, t, {}), x_t, x0, eps, t)


def velocity(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return torch.cos(t)[:, None] * eps - torch.sin(t)[:, None] * x0


def close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize(("case", "row"), COMBINATIONS)
def test_round_trip_at_random_angles(case: str, row: str) -> None:
    schedule = CASES[case].schedule
    low, high = max(schedule.t_min, 0.01), min(schedule.t_max, math.pi / 2 - 0.01)
    t = low + (high - low) * torch.rand(64, dtype=torch.float64)
    pred, x_t, x0, eps, _ = predict(case, row, t)
    assert pred.x0.dtype == torch.float64
    close(pred.x0, x0)
    close(pred.eps, eps)
    close(pred.v, velocity(x0, eps, t))
    s = torch.rand(64, dtype=torch.float64) * math.pi / 2
    close(pred.at(s), torch.cos(s)[:, None] * x0 + torch.sin(s)[:, None] * eps)
    close(pred.at(t), x_t)
    close(pred.at(torch.zeros_like(s)), x0)


def test_edm_row_is_karras_preconditioning() -> None:
    """D(x; sigma) = c_skip x + c_out F (table 1), with c_skip, c_out of a signal of std data_std."""
    sigma, sd = torch.logspace(-2, 1.9, 30, dtype=torch.float64)[:, None], 0.5
    x0, eps = torch.randn(2, 30, 4, dtype=torch.float64)
    F = output("edm", x0, eps, torch.ones_like(sigma), sigma, sd)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / torch.sqrt(sigma**2 + sd**2)
    close(c_skip * (x0 + sigma * eps) + c_out * F, x0)


@pytest.mark.parametrize("case", CASES)
def test_eps_to_x0_to_v_to_eps(case: str) -> None:
    schedule = CASES[case].schedule
    t = torch.linspace(max(schedule.t_min, 0.01), min(schedule.t_max, 1.5), 64, dtype=torch.float64)
    x_t, eps = torch.randn(2, 64, 6, dtype=torch.float64)

    def through(row: str, y: Tensor) -> Prediction:
        return Denoiser(nn.Identity(), schedule, OUTPUTS[row], call=lambda *_: y)(x_t, t, {})

    x0 = through("epsilon", eps).x0
    # The normal form's v is the network's own v where x0 has unit variance and the schedule preserves it.
    native = schedule.native(t)
    v = through("sample", x0 * schedule.data_std).v
    v_native = native.alpha[:, None] * eps - native.sigma[:, None] * x0 * schedule.data_std
    close(through("v_prediction", v_native).v, v)
    if schedule.data_std == 1 and isinstance(schedule, (DiscreteVP, TrigFlow)):
        close(v_native, v)
    a, b = -torch.sin(t), torch.cos(t)
    close(Prediction(x_t, t, v, a, b).eps, eps)


ENDS_OF = [(c, r) for c, r in COMBINATIONS if r not in ("epsilon", "sample")]


@pytest.mark.parametrize(("case", "row"), [(c, r) for c, r in ENDS_OF if r != "edm_boundary"])
def test_both_ends_are_finite_and_right(case: str, row: str) -> None:
    """v, flow and EDM's F: x0, eps, v and every step, at t_min and t_max (pi/2 for zero SNR and for flows)."""
    schedule = CASES[case].schedule
    t = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    if case.startswith(("zero SNR", "flow", "trigflow")):
        assert schedule.t_max == math.pi / 2
    pred, x_t, x0, eps, _ = predict(case, row, t)
    close(pred.x0, x0)
    close(pred.eps, eps)
    close(pred.v, velocity(x0, eps, t))
    close(pred.at(t), x_t)
    for s in (0.0, schedule.t_min, 0.7, schedule.t_max, math.pi / 2):
        close(pred.at(torch.full_like(t, s)), math.cos(s) * x0 + math.sin(s) * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "row"), ENDS_OF)
def test_angles_beyond_the_schedule_are_clamped_and_finite(case: str, row: str, dtype: torch.dtype) -> None:
    schedule = CASES[case].schedule
    t = torch.tensor([0.0, schedule.t_min, schedule.t_max, math.pi / 2], dtype=torch.float64)
    x, y = torch.randn(2, 4, 3, dtype=dtype)
    pred = Denoiser(nn.Identity(), schedule, ALL_ROWS[row], call=lambda *_: y)(x, t, {})
    assert pred.t.tolist() == [schedule.t_min, schedule.t_min, schedule.t_max, schedule.t_max]
    for value in (pred.x0, pred.eps, pred.v, pred.at(torch.zeros_like(t)), pred.at(torch.full_like(t, 0.7))):
        assert value.dtype == dtype and bool(value.isfinite().all())


@pytest.mark.parametrize("case", ["flow", "flow, data_std 0.5", "trigflow", "zero SNR", "edm"])
def test_epsilon_is_finite_without_noise_and_sample_without_signal(case: str) -> None:
    schedule = CASES[case].schedule
    for row, end in (("epsilon", schedule.t_min), ("sample", schedule.t_max)):
        t = torch.full((3,), end, dtype=torch.float64)
        pred, _, x0, eps, _ = predict(case, row, t)
        close(pred.x0, x0)
        close(pred.eps, eps)
        close(pred.v, velocity(x0, eps, t))
        close(pred.at(t / 2), torch.cos(t / 2)[:, None] * x0 + torch.sin(t / 2)[:, None] * eps)


def test_the_consistency_function_is_the_identity_at_sigma_min() -> None:
    schedule = EDM()
    t = torch.full((3,), schedule.t_min, dtype=torch.float64)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    pred = Denoiser(nn.Identity(), schedule, edm_boundary(SIGMA_MIN), call=lambda *_: y)(x, t, {})
    x_native = x * math.sqrt(SIGMA_MIN**2 + 0.25)
    close(pred.x0 * 0.5, x_native, atol=1e-11)
    close(pred.eps, torch.zeros_like(x), atol=1e-10)


def test_another_output_at_the_same_point() -> None:
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    pred, x_t, x0, eps, _ = predict("flow", "flow_prediction", t)
    other = pred.with_output(pred.y + 1)
    close(other.eps - other.x0, eps - x0 + 1)
    close(other.at(t), x_t)
    close(pred.eps - pred.x0, eps - x0)


class Smooth(nn.Module):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.sin(x) * torch.cos(time / 500)[:, None] + 0.1 * x


@pytest.mark.parametrize("case", ["linear", "zero SNR", "flow, data_std 0.5", "edm", "trigflow"])
def test_forward_is_differentiable_in_x_and_t_in_forward_mode(case: str) -> None:
    schedule = CASES[case].schedule
    row = {"flow, data_std 0.5": "flow_prediction", "edm": "edm"}.get(case, "v_prediction")
    denoiser = Denoiser(Smooth(), schedule, OUTPUTS[row])
    x, dx = torch.randn(2, 4, 3, dtype=torch.float64)
    # Inside the interval between two timesteps: the time is linear in the angle only there.
    t = schedule.angle(torch.tensor([120.3, 300.4, 560.6, 800.5])) if case in ("linear", "zero SNR") else None
    t = torch.tensor([0.2, 0.6, 1.0, 1.4], dtype=torch.float64) if t is None else t
    dt = torch.tensor([1.0, -0.5, 0.7, 2.0], dtype=torch.float64)

    def v(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, {}).v

    _, tangent = torch.func.jvp(v, (x, t), (dx, dt))
    h = 1e-6
    close(tangent, (v(x + h * dx, t + h * dt) - v(x - h * dx, t - h * dt)) / (2 * h), atol=1e-7)


def test_forward_passes_through_vmap() -> None:
    """No host read, no branch on data."""
    denoiser = Denoiser(Smooth(), LinearFlow(), OUTPUTS["flow_prediction"])
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    one = torch.func.vmap(lambda x, t: denoiser(x[None], t[None], {}).x0[0])
    close(one(x, t), denoiser(x, t, {}).x0)


def test_a_half_precision_network_still_gets_the_exact_time() -> None:
    """bfloat16 holds no 999."""
    schedule = vp()
    seen = []

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        seen.append((x.dtype, time))
        return x

    t = schedule.angle(torch.tensor([999.0, 501.0]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pred = Denoiser(nn.Identity(), schedule, OUTPUTS["v_prediction"], call=call)(
            torch.ones(2, 3, dtype=dtype), t, {}
        )
        assert pred.x0.dtype == dtype and pred.a.dtype == torch.float64
    assert [(x, time.tolist()) for x, time in seen] == [
        (dtype, [999.0, 501.0]) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]


def test_conditions_reach_the_network_by_name() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, time: Tensor, *, label: Tensor) -> Tensor:
            return x * label[:, None]

    x, t = torch.ones(2, 3, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    pred = Denoiser(Named(), TrigFlow(), OUTPUTS["sample"])(x, t, {"label": torch.tensor([2.0, 3.0])})
    close(pred.x0[:, 0], torch.tensor([2.0, 3.0], dtype=torch.float64))
