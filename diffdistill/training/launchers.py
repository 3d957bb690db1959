"""What `accelerate launch` and a file of `accelerate config` ask for, in the environment of the processes."""

from __future__ import annotations

import os

from diffdistill.config import FitConfig
from diffdistill.errors import UserError

_OTHERS = {
    "ACCELERATE_USE_FSDP": ("FSDP", "which this version does not do"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "which diffdistill does not do"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "which diffdistill does not do"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a mesh of parallel dimensions", "which diffdistill does not do"),
}


def check_launcher(config: FitConfig) -> None:
    """UserError for whatever the launcher asks for that a training would not do, or would do otherwise than it says."""
    for name, (engine, why) in _OTHERS.items():
        if _asked(name) not in ("", "false", "0", "no"):
            raise UserError(f"launcher: accelerate is told to use {engine}, {why}; launch without it")
    dynamo = _asked("ACCELERATE_DYNAMO_BACKEND")
    if dynamo not in ("", "no"):
        raise UserError(
            f"launcher: accelerate is told to compile with {dynamo!r}, which a training does not; leave it out"
        )
    precision = _asked("ACCELERATE_MIXED_PRECISION")
    if precision not in ("", "no", config.mixed_precision):
        fix = "give --mixed-precision bf16 too" if precision == "bf16" else "use bf16 or no"
        raise UserError(
            f"mixed_precision: accelerate is told to use {precision} and the run {config.mixed_precision}; {fix}"
        )
    parts = _asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if parts not in ("", "1", str(config.accumulate)):
        raise UserError(
            f"accumulate: accelerate is told to accumulate over {parts} steps and the run computes a batch in "
            f"{config.accumulate}; leave it out there, and give --accumulate"
        )
    clip = _asked("ACCELERATE_GRADIENT_CLIPPING")
    if clip not in ("", "none"):
        raise UserError(
            f"max_grad_norm: accelerate is told to clip to {clip}; leave it out there, and give --max-grad-norm"
        )


def _asked(name: str) -> str:
    return os.environ.get(name, "").strip().lower()
