"""The schedule and output row of a diffusers scheduler's config."""

from __future__ import annotations

from typing import Any

from diffdistill.core.prediction import OUTPUTS, Output, edm_boundary
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule
from diffdistill.errors import UserError

_VP = {
    *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LMSDiscreteScheduler", "TCDScheduler", "LCMScheduler"),
}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"}


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, Output]:
    """The schedule and output row of a diffusers scheduler config (with its `_class_name`).

    Raises UserError for a scheduler or prediction type that is not supported.
    """
    name = config.get("_class_name", "")
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
        if kind == "epsilon" and float(schedule.alphas_cumprod[-1]) <= 0:
            raise UserError("scheduler: epsilon says nothing of x0 at zero terminal SNR; use v_prediction")
        return schedule, OUTPUTS[kind]
    known = ", ".join(sorted(_VP | _FLOW | _EDM))
    raise UserError(f"scheduler: {name or 'no _class_name'!r} is not supported; supported are {known}")
