"""What `accelerate launch` and a file of `accelerate config` ask for, in the environment of the processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from diffdistill.config import FitConfig
from diffdistill.environment import process_count
from diffdistill.errors import UserError

_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "which diffdistill does not do"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "which diffdistill does not do"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a mesh of parallel dimensions", "which diffdistill does not do"),
}

_NO = ("", "false", "0", "no", "none")
_FSDP = {  # what is done, and what to ask for instead of anything else
    "FSDP_VERSION": (("2",), "give --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (_NO, "weights are not offloaded; leave it out"),
    "FSDP_RESHARD_AFTER_FORWARD": (("", "true", "full_shard"), "blocks are given back after each pass; leave it out"),
    "FSDP_AUTO_WRAP_POLICY": (("", "transformer_based_wrap"), "networks are cut into their blocks; leave it out"),
    "FSDP_IGNORED_MODULES": (_NO, "whole networks are divided; leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": (_NO, "leave it out there, and give --gradient-checkpointing true"),
}


def divides() -> bool:
    """Whether the launcher asks for FSDP, version 2 of which divides the networks over the processes."""
    return _asked("ACCELERATE_USE_FSDP") not in _NO


def block_names() -> frozenset[str]:
    """The classes of blocks that the launcher names; none: the networks' own."""
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return frozenset(name.strip() for name in names) - {"", "None"}


@contextmanager
def without_plugin() -> Iterator[None]:
    """Inside the block accelerate does not read that it is to use FSDP, whose plugin knows one network at a time."""
    kept = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["ACCELERATE_USE_FSDP"] = kept


def check_launcher(config: FitConfig, may_divide: bool = False) -> None:
    """UserError for whatever the launcher asks for that a training would not do, or would do otherwise than it says.

    `may_divide`: this training does FSDP.
    """
    if divides():
        _check_fsdp(config, may_divide)
    for name, (engine, why) in _OTHERS.items():
        if _asked(name) not in _NO:
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


def _check_fsdp(config: FitConfig, may_divide: bool) -> None:
    if not may_divide:
        raise UserError("launcher: accelerate is told to use FSDP, which is for distillations; launch without it")
    for name, (done, instead) in _FSDP.items():
        if _asked(name) not in done:
            value = _asked(name) or "1"
            raise UserError(f"launcher: accelerate is told to use FSDP with {name.lower()} {value}; {instead}")
    if process_count() < 2:
        raise UserError("launcher: FSDP divides networks over processes, and there is one; launch without it")
    if config.optimizer != "adamw":
        raise UserError(f"optimizer: {config.optimizer} does not know the parameters that FSDP divides; use adamw")
    if config.offload != "none":
        raise UserError(f"offload: {config.offload} does not move what FSDP divides over processes; use none")


def _asked(name: str) -> str:
    return os.environ.get(name, "").strip().lower()
