"""Where a command runs and how attention is computed: options of most commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffdistill.options import option


@dataclass(frozen=True)
class MachineConfig:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute; auto: a GPU if there is one")
    threads: int = option(0, "CPU threads of torch; 0: its own choice", at_least=0)


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed."""

    attention: Literal["auto", "sdpa", "xformers", "jvp", "math"] = option(
        "auto",
        "the kernels of attention; auto and sdpa: torch's, fused where they can be; xformers; jvp: ours, which alone "
        "has a derivative along a direction, and which all but math take for one; math: plain products",
    )
