"""The result of a distillation."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill.errors import UserError
from diffdistill.families import METADATA, load_student
from diffdistill.families._own import WEIGHTS
from diffdistill.files import atomic_folder
from diffdistill.training.metrics import metrics_lines

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import EvalOptions
    from diffdistill.eval.results import Evaluation
    from diffdistill.players.sampler import Sampler
    from diffdistill.players.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """A run folder with the student that was trained in it. As a path or text it is the student's folder.

    `Run("runs/first")` opens a run that was made before; `teacher` is the object that it began with, if it was one.
    """

    folder: Path
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def student(self) -> Path:
        """The student's folder: `DiffusionPipeline.from_pretrained(run.student)` loads it in stock diffusers."""
        return self.folder / "student"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `step`, seconds a step, peak memory, and the losses by 'player/name'."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(
                f"run: {str(self.folder)!r} has no metrics.jsonl; give a folder that `diffdistill train` made"
            )
        return [values for _, values in metrics_lines(path)]

    def sampler(self) -> Sampler:
        """The student as it was saved: `sampler(shape, cond, generators)` gives samples (B, *shape)."""
        teacher = self.teacher if self.teacher is not None and not self.teacher.family else None
        return load_student(self.student, network=teacher)[0]

    def evaluate(self, **options: Unpack[EvalOptions]) -> Evaluation:
        """The student judged as `diffdistill.evaluate` does, with its options; `rows` are those of the table.

        Without any it is beside its teacher, by the protocol that fits it, against the images of its training.
        Raises UserError for a network that diffusers does not know, whose samples `sampler` draws.
        """
        from diffdistill.commands.evaluate import evaluate

        if (self.student / WEIGHTS).is_file():
            raise UserError("evaluate: the student's network is not in diffusers; judge what its sampler() draws")
        return evaluate(self.folder, **options)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Copy the student's folder, whole or not at all; returns the copy."""
        if not (self.student / METADATA).is_file():
            raise UserError(
                f"run: {str(self.folder)!r} has no student yet; resume its training, or export a checkpoint"
            )
        with atomic_folder(Path(folder), METADATA) as partial:
            shutil.copytree(self.student, partial, dirs_exist_ok=True)
        return Path(folder)

    def __fspath__(self) -> str:
        return str(self.student)

    def __str__(self) -> str:
        return str(self.student)
