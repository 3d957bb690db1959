"""The options of the commands that check and plan; no torch is imported here."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from diffdistill.config import AttentionConfig, MachineConfig, TrainConfig
from diffdistill.options import option


@dataclass(frozen=True)
class VerifyConfig(MachineConfig):
    """What is checked."""

    method: str | None = option(None, "a method's name or file")
    all: bool = option(False, "verify every method of the package")
    exact: bool = option(False, "compare with closed forms only, which takes seconds; train nothing")
    json: str | None = option(None, "a file that the rows are written into, as JSON")
    device: Literal["auto", "cpu", "cuda"] = option(
        "cpu",
        "where the training in the plane is computed; auto: a GPU if there is one; closed forms are always compared in "
        "float64 on the CPU",
    )


@dataclass(frozen=True, kw_only=True)
class JvpCheckConfig(MachineConfig, AttentionConfig):
    """Which teacher."""

    teacher: str = option(MISSING, "a diffusers folder or hub id, or 'digits', the embedded one")
    resolution: int | str | None = option(
        None, "pixels a side, or HEIGHTxWIDTH such as 720x1280, of a latent teacher; default: its own", at_least=1
    )
    frames: int | None = option(None, "frames of a video; default: the teacher's own", at_least=1)
    prompt: str = option("a red fox in the snow", "the prompt that a text-to-image teacher is given")
    seed: int = option(0, "of the samples and the directions", at_least=0)
    all: bool = option(False, "list every module, not only those that disagree and the whole network")


@dataclass(frozen=True, kw_only=True)
class FamilyCheckConfig(MachineConfig):
    """Which pipeline."""

    model: str = option(MISSING, "a diffusers folder or hub id, of a family here or of the file that --family names")
    resolution: int | str | None = option(
        None, "pixels a side, or HEIGHTxWIDTH such as 720x1280, for a latent model; default: its own", at_least=1
    )
    frames: int | None = option(None, "frames of a video; default: the model's own", at_least=1)
    prompt: str = option("a red fox in the snow", "the prompt that a text-to-image model is given")
    whole: bool | None = option(
        None,
        "also what takes further copies of the weights: bfloat16, export and reload; default: for folders below 2 GB",
    )
    write: str | None = option(
        None, "a .py file, not there yet, that the beginning of a family is written into where none reads the pipeline"
    )


@dataclass(frozen=True)
class RateConfig:
    """How fast the machine is."""

    tflops: float | None = option(None, "10^12 operations a second that the machine sustains in training", above=0)
    seconds_per_step: float | None = option(None, "of a short run, as its metrics.jsonl has it", above=0)
    json: str | None = option(None, "a file that the plan is written into, as JSON")


@dataclass(frozen=True)
class PlanConfig(TrainConfig, RateConfig):
    """What is to be trained, as for `train`."""
