"""The options of the commands that export a run, draw with a model, or list what there is."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from diffdistill.config.machine import AttentionConfig, MachineConfig
from diffdistill.config.training import SavingConfig
from diffdistill.options import option

EVERYTHING = "everything"
"""What --allow-change allows without a name."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(MachineConfig, SavingConfig):
    """Which student."""

    run: str = option(MISSING, "a run folder made by train")
    step: int | None = option(None, "the checkpoint's step; default: the last", at_least=0)
    best: bool = option(False, "the best checkpoint by the judgings of the training")
    student_steps: int | None = option(
        None,
        "in how many steps it is sampled, if it is trained for any number; default: as many as in training",
        at_least=1,
    )
    out: str | None = option(None, "the folder to make; default: RUN/student")
    dtype: Literal["teacher", "float32", "bfloat16", "float16"] = option(
        "teacher", "the type of the network's weights in the folder; teacher: as in the teacher's own"
    )
    allow_change: tuple[str, ...] = option(
        (),
        "go on although what has this name in the line that refuses it (an option, teacher-weights, method, ..) is "
        "another than when the run began; may be repeated; everything: whatever it is",
        repeated=True,
        bare=EVERYTHING,
    )


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(MachineConfig):
    """Which student, and how its teacher begins."""

    student: str = option(MISSING, "a run, or the folder of a Stable Diffusion student of two steps or more")
    teacher: str | None = option(None, "a diffusers folder or hub id; default: the one the student was distilled from")
    base_steps: int = option(20, "the teacher's steps from noise to image; 0: none", at_least=0)
    base_guidance: float = option(7.0, "the teacher's guidance scale", at_least=0)
    out: str = option("runs/diversity", "the folder to make")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Which run, and how it is drawn."""

    run: str = option(MISSING, "a run folder of train or teacher")
    once: bool = option(False, "draw it once and end; else until its training is done, or Ctrl-C")
    refresh: float = option(2.0, "seconds between two drawings", at_least=0.1)
    only: tuple[str, ...] = option(
        (),
        "the beginning of the names of curves that are drawn, as in look/; may be repeated; default: all",
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which run, and where its page goes."""

    run: str = option(MISSING, "a run folder of train or teacher")
    out: str | None = option(None, "the page's file; default: RUN/report.html")


@dataclass(frozen=True)
class MethodsConfig:
    """Which method."""

    method: str | None = option(None, "a method's name or file; default: list all of them")


@dataclass(frozen=True)
class RecipesConfig:
    """Which recipe."""

    recipe: str | None = option(None, "a recipe's name; default: list all of them")


@dataclass(frozen=True)
class ListConfig:
    """A list has no options."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(MachineConfig, AttentionConfig):
    """What is drawn."""

    model: str = option(MISSING, "a run, a student's or teacher's folder or hub id, or 'digits'")
    prompt: tuple[str, ...] = option((), "a prompt for a text-to-image model; may be repeated", repeated=True)
    image: tuple[str, ...] = option(
        (),
        "an image that is to be changed, or that a video begins with, of the ratio that is made; may be repeated",
        repeated=True,
    )
    images_per_prompt: int = option(
        1, "how many of the images go with one prompt, of a model that takes several, as FLUX.2", at_least=1
    )
    count: int | None = option(None, "number of images; default: 64, of latent models 4", at_least=1)
    classes: tuple[int, ...] = option(
        (), "class labels of the images, repeated as needed; default: all in turn", at_least=0
    )
    steps: int | None = option(
        None, "sampling steps of a teacher; a student has its own; default: 16, latent models 20", at_least=1
    )
    guidance_scale: float | None = option(None, "classifier-free guidance of a teacher; default: off", at_least=0)
    guidance_scale_2: float | None = option(
        None, "that of a teacher's second network, as of Wan 2.2 A14B; default: guidance_scale", at_least=0
    )
    negative_prompt: str | None = option(
        None, "the prompt that a guided teacher is led away from; default: what the family has"
    )
    resolution: int | str | None = option(
        None, "pixels a side, or HEIGHTxWIDTH such as 720x1280, of a latent teacher; default: its own", at_least=1
    )
    frames: int | None = option(None, "frames of a teacher's video; default: its own", at_least=1)
    seed: int = option(0, "image i is drawn from seed 1000000 * SEED + i", at_least=0)
    trace: bool = option(False, "draw the image that a latent model expects after each step, a row for each image")
    fps: int = option(16, "frames a second of a video's file", at_least=1, at_most=100)
    out: str = option("samples.png", "the picture's file, of a model of videos also an .mp4 or .gif")
