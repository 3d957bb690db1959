"""The schedule and output row of a diffusers scheduler's config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from diffdistill.core.prediction import OUTPUTS, Output, edm_boundary
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule
from diffdistill.errors import UserError, shown

_VP = {
    *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LMSDiscreteScheduler", "TCDScheduler", "LCMScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"}


_NUMBERS = {
    "num_train_timesteps": _VP | _FLOW,
    "beta_start": _VP,
    "beta_end": _VP,
    "snr_shift_scale": _VP,
    "shift": _FLOW,
    "flow_shift": _VP,
    "sigma_min": _EDM,
    "sigma_max": _EDM,
    "sigma_data": _EDM,
    "rho": _EDM,
    "clip_sample_range": _VP,
    "dynamic_thresholding_ratio": _VP,
    "sample_max_value": _VP,
}
_ONLY_WITH = {
    "clip_sample_range": "clip_sample",
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
}


def _check_numbers(config: dict[str, Any], name: str) -> None:
    """UserError for a number of a scheduler's config that is none, or not above 0."""
    for field, kinds in _NUMBERS.items():
        value, whole = config.get(field, 2), field == "num_train_timesteps"
        unread = field[:4] == "beta" and config.get("trained_betas") is not None
        if name not in kinds or unread or (field in _ONLY_WITH and not config.get(_ONLY_WITH[field])):
            continue
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not (value > 1 if whole else 0 < value < float("inf")):
            right = "a whole number above 1" if whole else "a number above 0"
            raise UserError(f"scheduler: {field} is {shown(value)}; it must be {right}")
    betas = config.get("trained_betas")
    if betas is not None and name in _VP:
        flat = isinstance(betas, list | tuple) and all(isinstance(beta, int | float) for beta in betas)
        if not flat or len(betas) < 2:
            raise UserError(f"scheduler: trained_betas is {shown(betas)}; it must be a list of two numbers or more")


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, Output]:
    """The schedule and output row of a diffusers scheduler config (with its `_class_name`).

    Raises UserError for a scheduler or prediction type that is not supported.
    """
    name = config.get("_class_name") or ""
    if not isinstance(name, str):
        raise UserError(f"scheduler: its class is {shown(name)}; it must be the name of a class of diffusers")
    _check_numbers(config, name)
    kind = config.get("prediction_type", "epsilon")
    for option in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(option):
            raise UserError(f"scheduler: {option} is not supported; set it to false")
    if config.get("timestep_type") == "continuous":
        raise UserError("scheduler: timestep_type 'continuous' is not supported; use 'discrete'")
    if name in _FLOW or (name in _VP and config.get("use_flow_sigmas")):
        if name in _VP and kind != "flow_prediction":
            raise UserError(f"scheduler: use_flow_sigmas with prediction_type {kind!r}; flow_prediction is supported")
        count = config.get("num_train_timesteps", 1000)
        shift = config.get("shift", 1.0) if name in _FLOW else config.get("flow_shift", 1.0)
        return LinearFlow(shift, time_scale=count, train_timesteps=count), OUTPUTS["flow_prediction"]
    if name == "CMStochasticIterativeScheduler":
        low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
        edm = EDM(low, high, config.get("sigma_data", 0.5), config.get("rho", 7.0), 250.0, unit_init=False)
        return edm, edm_boundary(low)
    if name in _EDM:
        low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"scheduler: prediction_type {kind!r} is not EDM's; use epsilon or v_prediction")
        row = OUTPUTS["edm"] if kind == "epsilon" else -OUTPUTS["edm"]
        return EDM(low, high, config.get("sigma_data", 0.5), config.get("rho", 7.0)), row
    if name in _VP:
        if kind not in ("epsilon", "sample", "v_prediction"):
            known = "epsilon, sample or v_prediction"
            raise UserError(f"scheduler: prediction_type {kind!r} is not supported; use {known}")
        schedule = DiscreteVP.from_config(config)
        chain = schedule.alphas_cumprod  # which may begin at clean data, as that of a student of TCDScheduler does
        if not bool((chain.diff() < 0).all()) or float(chain[-1]) < 0 or float(chain[0]) > 1:
            raise UserError("scheduler: its betas do not make noise of an image; each must be above 0 and at most 1")
        if kind == "epsilon" and float(schedule.alphas_cumprod[-1]) <= 0:
            raise UserError("scheduler: epsilon says nothing of x0 at zero terminal SNR; use v_prediction")
        return schedule, OUTPUTS[kind]
    known = ", ".join(sorted(_VP | _FLOW | _EDM))
    raise UserError(f"scheduler: {shown(name) if name else 'no _class_name'} is not supported; supported are {known}")


@contextmanager
def around_steps(scheduler: Any, around: Callable[[Any, Callable[[], Any], dict[str, Any]], Any]) -> Iterator[None]:
    """While it lasts, each step of a scheduler, and of the copies that a pipeline makes of it, is `around`'s.

    `around(scheduler or copy, step, arguments by name)` gives the step's result, which `step()` makes.
    """
    kind = type(scheduler)

    @wraps(kind.step)  # pipelines look at its arguments
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(kind.step).bind(self, *args, **kwargs).arguments
        return around(self, lambda: kind.step(self, *args, **kwargs), told)

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = kind
