"""The options of the commands that judge, compare and time models."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from diffdistill.config.machine import AttentionConfig, MachineConfig
from diffdistill.options import option


@dataclass(frozen=True)
class DrawConfig(MachineConfig, AttentionConfig):
    """How models are drawn."""

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the models' weights")
    trust_remote_code: bool = option(False, "allow the Python code of a pipeline that a folder carries to run")


@dataclass(frozen=True)
class JudgeConfig(DrawConfig):
    """What is drawn, compared with what and measured how."""

    protocol: str | None = option(
        None, "a protocol (see `diffdistill protocols`) or a .yaml file; default: the one that fits the model"
    )
    count: int | None = option(None, "images of each model; default: the protocol's", at_least=2)
    seed: int | None = option(
        None, "image i is drawn from seed 1000000 * SEED + i; default: the protocol's, which is 0", at_least=0
    )
    steps: int | None = option(None, "sampling steps of a teacher; a student has its own", at_least=1)
    guidance_scale: float | None = option(
        None, "classifier-free guidance of a teacher, in its pipeline's units; default: off", at_least=0
    )
    guidance_scale_2: float | None = option(
        None, "that of a teacher's second network, as of Wan 2.2 A14B; default: guidance_scale", at_least=0
    )
    batch_size: int | None = option(
        None, "images drawn together, on which the last bits depend; default: the protocol's", at_least=1
    )
    reference: str | None = option(
        None,
        "real images, or a file of their statistics; default: the protocol's, else those of the model's training, else "
        "its teacher's own samples",
    )
    prompts: str | None = option(
        None, "a file with a prompt on each line; default: the protocol's, else those of the model's training"
    )
    negative_prompt: str | None = option(
        None,
        "the prompt that a guided teacher is led away from; default: what its student was trained with, "
        "or what the family has",
    )
    weights: tuple[str, ...] = option(
        (), "KEY=PATH, a file, folder or hub id with a feature network's weights; may be repeated", repeated=True
    )
    bootstrap: int | None = option(
        None,
        "bootstrap replicates of each interval; 0: no intervals; default: 200, and 20 for wide features",
        at_least=0,
    )
    threads: int = option(1, "CPU threads of torch, on which the last bits depend; 0: its own choice", at_least=0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(JudgeConfig):
    """Which models."""

    model: str = option(MISSING, "a run, a folder of runs, a model's folder or hub id, or a folder of images")
    teacher: str | None = option(None, "a student's teacher; default: the one that it was distilled from")
    teacher_steps: tuple[int, ...] | None = option(
        None,
        "numbers of steps at which the teacher is judged too; default: 1,2,4,8,16,32 for a run or model without "
        "--protocol and --steps, else none",
        at_least=1,
    )
    data: str | None = option(
        None,
        "real images of an evaluation without --protocol, of any kind that train takes; default: those of the model's "
        "training, else its teacher's own samples",
    )
    save_reference: str | None = option(None, "a file that statistics of the real images are written into")
    out: str | None = option(
        None, "folder of table and pictures; default: RUN/eval of a student's run, else runs/eval/NAME"
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JudgeConfig):
    """Which models."""

    models: tuple[str, ...] = option(
        MISSING, "two or more: runs, models' folders or hub ids, folders of images", repeated=True
    )
    out: str = option("runs/compare", "folder of table, picture and grid")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(DrawConfig):
    """Which models, and how they are timed."""

    models: tuple[str, ...] = option(
        MISSING, "one or more: runs, a folder of runs, models' folders or hub ids, or 'digits'", repeated=True
    )
    teacher: str | None = option(None, "the teacher that models are timed against; default: each student's own teacher")
    teacher_steps: int | None = option(
        None, "steps of models without their own; default: their pipeline's, and 16 for pixel models", at_least=1
    )
    guidance_scale: float | None = option(
        None, "classifier-free guidance of teachers (1: none); default: what their student was trained with", at_least=0
    )
    batch_sizes: tuple[int, ...] = option(
        (1, 4), "numbers of images drawn together, each of which is timed", at_least=1
    )
    resolutions: tuple[int | str, ...] | None = option(
        None, "sizes, each pixels a side or HEIGHTxWIDTH; default: the models' own", at_least=1
    )
    compile: bool = option(False, "time the models also with their denoising network under torch.compile")
    repeats: int = option(20, "draws that are timed", at_least=1)
    seed: int = option(0, "image i is drawn from seed 1000000 * SEED + i", at_least=0)
    out: str = option("runs/speed", "folder of the table")


@dataclass(frozen=True)
class BenchConfig(MachineConfig, AttentionConfig):
    """What is trained and judged."""

    suite: str = option(
        "digits", "digits; mnist, for a teacher and images of your own; or a .yaml file with the same fields"
    )
    methods: tuple[str, ...] | None = option(
        None,
        "methods to train, each METHOD, METHOD:PRESET, or METHOD:derived with settings from the teacher; default: all "
        "of the suite",
    )
    seed: int | None = option(
        None, "a single seed of the trainings and of the noise that is judged, instead of --seeds", at_least=0
    )
    seeds: tuple[int, ...] | None = option(
        None, "seeds of the trainings and of the noise that is judged; default: 100,101,102", at_least=0
    )
    budget: int | None = option(
        None, "network passes over a batch that a training may take; default: the suite's", at_least=1
    )
    teacher: str | None = option(None, "a diffusers folder or hub id; default: the suite's")
    data: str | None = option(None, "the real images that students learn from; default: the suite's")
    reference: str | None = option(
        None, "held-out images, which samples are compared with; default: the suite's, or else those of data"
    )
    jobs: int | None = option(None, "trainings at a time; default: one a CPU core, or one on a GPU", at_least=1)
    threads: int = option(1, "CPU threads of each training and of the evaluation; 0: torch's own choice", at_least=0)
    out: str = option("runs/bench", "folder of the board; one that is not finished is continued")
