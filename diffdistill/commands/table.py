"""The commands: what each does, its options, and the function that runs it. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.commands.check_config import FamilyCheckConfig, JvpCheckConfig, PlanConfig, VerifyConfig
from diffdistill.config import (
    BenchConfig,
    CompareConfig,
    DecoderConfig,
    DiversityConfig,
    EncodeConfig,
    EvalConfig,
    ExportConfig,
    ListConfig,
    MethodsConfig,
    PairsConfig,
    PruneConfig,
    RecipesConfig,
    ReportConfig,
    SampleConfig,
    SpeedConfig,
    TeacherConfig,
    TrainConfig,
    WatchConfig,
)


@dataclass(frozen=True)
class Command:
    """What a command does, its options, and the function below `diffdistill.commands` that runs it.

    The function takes the options as their dataclass and returns the exit code, None for 0. That of a command that
    `resumes`, or has the options of a training, takes the values that were given, as a dict: those that were not come
    from the run or from a preset.
    """

    help: str
    options: type
    function: str  #: "module:function"
    positional: tuple[str, ...] = ()  #: options that are given by their place; one whose type is a tuple takes several
    resumes: bool = False

    @property
    def distills(self) -> bool:
        """Whether it has the options of a training, and those of a method."""
        return issubclass(self.options, TrainConfig)


COMMANDS: dict[str, Command] = {
    "train": Command(
        "distill a teacher into a few-step student, and export it", TrainConfig, "distill:run", resumes=True
    ),
    "plan": Command(
        "say what a training would take in memory, operations and hours, from configs alone", PlanConfig, "plan:run"
    ),
    "watch": Command("show the curves and warnings of a run in the terminal", WatchConfig, "watch:run", ("run",)),
    "report": Command(
        "write a run as one HTML page: curves, samples over time, evaluation", ReportConfig, "report:run", ("run",)
    ),
    "sample": Command("draw images from a teacher or a student as one PNG", SampleConfig, "sample:run", ("model",)),
    "eval": Command(
        "judge a student beside its teacher at several numbers of steps, or any model by a protocol",
        EvalConfig,
        "evaluate:run",
        ("model",),
    ),
    "compare": Command(
        "judge several models by one protocol: table, differences, picture, same-noise grid",
        CompareConfig,
        "compare:run",
        ("models",),
    ),
    "protocols": Command("list the protocols of eval and compare", ListConfig, "lists:protocols"),
    "speed": Command(
        "time models against their teacher: latency, throughput, network passes, memory",
        SpeedConfig,
        "speed:run",
        ("models",),
    ),
    "export": Command(
        "save a run's student from a checkpoint as a diffusers folder", ExportConfig, "export:run", ("run",)
    ),
    "diversity": Command(
        "save a student of several steps with its teacher, which takes the first of them",
        DiversityConfig,
        "diversity:run",
        ("student",),
    ),
    "teacher": Command(
        "train a teacher from data and save it as a diffusers folder", TeacherConfig, "teacher:run", resumes=True
    ),
    "pairs": Command(
        "make noise-image pairs of a teacher, for the methods that want them", PairsConfig, "shards:pairs"
    ),
    "prune": Command(
        "make a smaller network of a teacher's own blocks, for train --student", PruneConfig, "prune:run", ("teacher",)
    ),
    "decoder": Command(
        "train a small autoencoder for a latent model, and save the model with it",
        DecoderConfig,
        "decoder:run",
        resumes=True,
    ),
    "encode": Command(
        "encode prompts, or images with captions, once for the training of a latent teacher",
        EncodeConfig,
        "shards:prompts",
    ),
    "families": Command("list the families of diffusers pipelines that can be distilled", ListConfig, "lists:families"),
    "methods": Command(
        "list the methods, or describe one: its options, presets and equations",
        MethodsConfig,
        "lists:methods",
        ("method",),
    ),
    "recipes": Command(
        "list the published settings of models, or print one with its sources",
        RecipesConfig,
        "lists:recipes",
        ("recipe",),
    ),
    "bench": Command(
        "train and judge every method on the same teacher, budget, seeds and evaluation", BenchConfig, "bench:run"
    ),
    "verify": Command(
        "check a method against closed forms, and train it on a teacher known exactly",
        VerifyConfig,
        "verify:run",
        ("method",),
    ),
    "jvp-check": Command(
        "check that a teacher has a forward derivative, module by module, against two others",
        JvpCheckConfig,
        "jvp_check:run",
        ("teacher",),
    ),
    "family-check": Command(
        "check a family against the stock pipeline of a folder, or say what a family file for it must have",
        FamilyCheckConfig,
        "family_check:run",
        ("model",),
    ),
}


GROUPS = {
    "distill": ("train", "plan", "watch", "report", "export", "diversity"),
    "data and teachers": ("encode", "pairs", "teacher", "prune", "decoder"),
    "judge": ("eval", "compare", "speed", "sample", "bench", "verify", "jvp-check", "family-check"),
    "explore": ("methods", "recipes", "families", "protocols"),
}
"""The commands by what they are for, each once."""

EXIT_CODES = {
    0: "it is done",
    1: "verify, jvp-check or family-check has failed, or a fault of diffdistill with its traceback",
    2: "bad input, a full disk or too little memory; one line says what",
    75: "train, teacher, decoder: --max-hours are over; a checkpoint is written, and --resume goes on",
    130: "SIGINT or Ctrl-C; train, teacher and decoder have written a checkpoint, and --resume goes on",
    143: "SIGTERM, the same",
}
"""What each exit code means."""
