"""`diffdistill eval`: a student beside its teacher at several numbers of steps, or any model by a protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffdistill.commands.judging import judge_options
from diffdistill.config import EvalConfig
from diffdistill.errors import UserError
from diffdistill.eval.ladder import TEACHER_STEPS, evaluate_model
from diffdistill.eval.models import ModelLike, model_folder, models_in
from diffdistill.eval.results import Evaluation
from diffdistill.families import is_student
from diffdistill.options import build
from diffdistill.players.teacher import Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import EvalOptions

LEAST = 100  # images for the protocol digits, whose covariances are of 64 features


def evaluate(
    model: ModelLike, *, teacher: str | os.PathLike[str] | Teacher | None = None, **options: Unpack[EvalOptions]
) -> Evaluation:
    """Judge a model by a protocol, beside its teacher at several numbers of steps.

    `model` is a run, a folder of runs, a model's folder or hub id, a folder of images, or a loaded teacher or student
    (what `load_teacher` and `load_student` return). The options are those of `diffdistill eval`, with underscores.
    Tables and pictures are written into `out`. Raises UserError for whatever cannot be judged.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else "loaded"
    source = {} if teacher is None or isinstance(teacher, Teacher) else {"teacher": teacher}
    config = build(EvalConfig, {**options, **source, "model": name})
    return _evaluate(config, model, teacher)


def _evaluate(config: EvalConfig, model: ModelLike, teacher: str | os.PathLike[str] | Teacher | None) -> Evaluation:
    if config.protocol is not None and config.data is not None:
        raise UserError(f"data: {config.data!r} cannot be used with --protocol; name the real images by --reference")
    options = judge_options(config, model, config.data, teacher)
    chosen = options.protocol.name
    if config.protocol is None and chosen == "digits" and config.count is not None and config.count < LEAST:
        raise UserError(f"count: {config.count} must be at least {LEAST}, for the distances of the protocol digits")
    steps = config.teacher_steps
    if steps is None:
        alone = config.protocol is not None or config.steps is not None or not _may_climb(model)
        steps = () if alone else TEACHER_STEPS
    out = Path(config.out) if config.out else default_out(config, model, chosen, laddered=bool(steps))
    return evaluate_model(
        model, options, out, teacher=teacher, teacher_steps=steps, save_reference_to=config.save_reference
    )


def _may_climb(model: ModelLike) -> bool:
    """Whether it is a teacher, or a student that says which it was distilled from."""
    if not isinstance(model, str | os.PathLike):
        return isinstance(model, Teacher)
    return bool(models_in(model)) or not model_folder(model).exists()


def default_out(config: EvalConfig, model: ModelLike, protocol: str, *, laddered: bool) -> Path:
    """In the run of a student or the folder of runs; of all else below runs/eval, so that no model is written into."""
    name = Path(os.fspath(model)).resolve().name if isinstance(model, str | os.PathLike) else "loaded"
    root = Path("runs/eval") / name
    if isinstance(model, str | os.PathLike):
        folder, students = Path(model), models_in(model)
        if len(students) > 1 or (len(students) == 1 and students[0].parent.parent == folder != students[0].parent):
            root = folder / "eval"
        elif students and is_student(students[0]):
            run = students[0].parent
            root = run / "eval" if (run / "config.yaml").is_file() else root
    if laddered and config.protocol is None:
        return root
    parts = [Path(config.protocol or config.data or protocol).stem]
    if config.steps is not None:
        parts.append(f"{config.steps}steps")
    if config.guidance_scale is not None:
        parts.append(f"guidance{config.guidance_scale:g}")
    if config.guidance_scale_2 is not None:
        parts.append(f"second{config.guidance_scale_2:g}")
    return root / "-".join(parts)


def run(config: EvalConfig) -> None:
    """The command: prints the table, and where it and the pictures are."""
    evaluation = _evaluate(config, config.model, config.teacher)
    if not evaluation.scores:  # of another process than the first
        return
    print(evaluation)
    samples = Path(config.model) / "samples"
    print(f"pictures: {', '.join(map(str, evaluation.pictures))}" + (f", {samples}/" if samples.is_dir() else ""))
    print(f"table:    {evaluation.out / 'table.md'}, {evaluation.out / 'results.json'}")
