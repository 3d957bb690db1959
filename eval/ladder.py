"""Models judged by one protocol, beside their teacher at several numbers of steps: the ladder.

Teacher and students are drawn in the normal form, from the same noise and conditions. Sample i is a function of
(seed, i), whatever the batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.core.guidance import with_second_scale
from diffdistill.data.shapes import HELD_OUT, draw_edits
from diffdistill.errors import UserError, shown
from diffdistill.eval.image_folder import Model
from diffdistill.eval.judge import CHANGED, DRAWN, Judge, JudgeOptions, Score, drawn_samples, score
from diffdistill.eval.latency import latency
from diffdistill.eval.measurements import rounded
from diffdistill.eval.models import (
    Draw,
    ModelLike,
    SamplingOptions,
    Student,
    folder_fingerprint,
    loaded_fingerprint,
    model_folder,
    models_in,
    open_model,
    pixel_model,
    refuse_for_student,
    refuse_non_finite,
    teacher_images,
)
from diffdistill.eval.protocol import Protocol, digest
from diffdistill.eval.report import check_writable, markdown_table, write_text
from diffdistill.eval.results import Evaluation, evaluation_of
from diffdistill.families import (
    FAMILIES,
    METADATA,
    Family,
    Prompt,
    Text,
    attention_of,
    is_student,
    load_pipeline,
    load_student,
    load_teacher,
    local_folder,
    student_record,
    teacher_of,
    with_null,
)
from diffdistill.options import Size
from diffdistill.pictures import image_grid, save_png, side_by_side
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators

TEACHER_STEPS = (1, 2, 4, 8, 16, 32)


def evaluate_model(
    model: ModelLike, options: JudgeOptions, out: Path, *, teacher: str | os.PathLike[str] | Teacher | None = None,
    teacher_steps: Sequence[int] = (), save_reference_to: str | None = None,
) -> Evaluation:  # fmt: skip
    """Judges a model, or the students of a folder of runs; with `teacher_steps` also their teacher at these steps.

    Writes table.md, results.json and pictures into `out`, and the table of a ladder into the students' model cards.
    `teacher` is by default the one that a student was distilled from. Raises UserError for whatever cannot be judged.
    """
    if isinstance(model, str | os.PathLike) and not models_in(model):
        check_there(model)
    judge = Judge(options)
    if save_reference_to and any(getattr(m, "fitted", False) for m in judge.measures):
        problem = f"features of {options.protocol.name} are made of the real images, so that statistics are of no use"
        raise UserError(f"save_reference: {problem}; leave it out, and name the images by --reference")
    if judge.processes.rank == 0:
        check_writable(out)
    if teacher_steps:
        evaluation = _ladder(model, judge, out, teacher, teacher_steps)
    elif teacher is not None:
        raise UserError("teacher: it is judged at several numbers of steps; give teacher_steps too")
    else:
        evaluation = _alone(model, judge, out)
    if save_reference_to and judge.reference is not None and judge.processes.rank == 0:
        from diffdistill.eval.reference import save_reference

        file = save_reference(Path(save_reference_to), judge.reference, judge.protocol, judge.measures)
        evaluation = replace(evaluation, pictures=[*evaluation.pictures, file])
    return evaluation


def check_there(source: str | os.PathLike[str]) -> None:
    """UserError unless the source is a folder, a file, 'digits' or a hub id that can be had."""
    if model_folder(source).is_file():  # of images, or `open_model` says what it is
        return
    try:
        local_folder(str(model_folder(source)))
    except UserError as error:
        raise UserError(f"eval: {os.fspath(source)!r} holds no student or teacher yet ({error})") from None


def _alone(source: ModelLike, judge: Judge, out: Path) -> Evaluation:
    """One model, or the students of a folder of runs, as their pipelines are drawn."""
    sources: list[ModelLike] = [source]
    if isinstance(source, str | os.PathLike) and len(students := models_in(source)) > 1:
        sources = list(students)
    scores = []
    for each in sources:
        model = open_model(each, judge.sampling)
        folder = out if len(sources) == 1 else out / "models" / _key(model, judge)
        result = replace(score(model, judge, folder), ms_per_image=None)
        scores.append(result if len(sources) == 1 else replace(result, model=_run_name(each)))
    evaluation = evaluation_of(scores, judge, out)
    if judge.processes.rank > 0:
        return evaluation
    evaluation.write()
    scale = max(1, 64 // max(judge.protocol.pixels))
    shown = torch.cat([each.shown for each in scores if each.shown is not None])
    columns = judge.protocol.frames or 10
    return replace(evaluation, pictures=[save_png(image_grid(shown, columns, scale), out / "samples.png")])


def _run_name(source: ModelLike) -> str:
    assert isinstance(source, Path)
    return source.parent.name


def _ladder(
    source: ModelLike, judge: Judge, out: Path, teacher: str | os.PathLike[str] | Teacher | None, steps: Sequence[int]
) -> Evaluation:
    scores: list[Score] = []
    for model in ladder_models(source, judge.sampling, teacher, steps, judge.protocol):
        result = score(model, judge, out / "models" / _key(model, judge), quiet=True)
        if result.ms_per_image is None and judge.processes.rank == 0:  # the images were there already
            result = replace(result, ms_per_image=latency(model, judge))
        scores.append(result)
    evaluation = evaluation_of(scores, judge, out, more_notes=[_latency_note(judge)], model=_described(source))
    if judge.processes.rank > 0:
        return evaluation
    evaluation.write()
    resolution = max(judge.protocol.pixels)
    most = 2 * judge.protocol.frames or (20 if resolution <= 16 else 12)
    shown = [(_label(each), each.shown[:most]) for each in scores if each.shown is not None]
    picture = save_png(side_by_side(shown, scale=max(1, 64 // resolution)), out / "comparison.png")
    if isinstance(source, str | os.PathLike):
        for folder in models_in(source):
            in_run = (folder.parent / "config.yaml").is_file()  # what lies elsewhere is somebody's own
            if in_run and (folder / METADATA).is_file() and is_student(folder):
                _add_to_card(folder / "README.md", evaluation)
    return replace(evaluation, pictures=[picture])


def _latency_note(judge: Judge) -> str:
    batch = min(judge.protocol.batch, judge.protocol.count)
    return f"ms per image: median over batches of {batch} on {judge.device.type}, text and decoding included"


def _key(model: Model, judge: Judge) -> str:
    """A folder's name for whatever the images depend on, so that other options are other folders."""
    name = "".join(c if c.isalnum() else "-" for c in model.name)
    captions = None if judge.options.captions is None else digest(judge.captions)
    settings = [model.fingerprint, model.call, judge.protocol.count, judge.protocol.seed, judge.options.prompts]
    if judge.options.conditions is not None:
        settings.append(judge.options.conditions.fingerprint)
    settings += [judge.protocol.name, captions, judge.protocol.eight_bit, [m.fingerprint for m in judge.measures]]
    return f"{name}-{digest(settings)}"


def _label(result: Score) -> str:
    return result.model if result.steps is None else f"{result.model}, {result.steps} step{'s'[: result.steps != 1]}"


def _described(source: ModelLike) -> str:
    if not isinstance(source, str | os.PathLike):
        return "loaded"
    return ", ".join(map(str, models_in(source))) or os.fspath(source)


def _add_to_card(card: Path, evaluation: Evaluation) -> None:
    heading = "\n## Evaluation\n\n"
    before = card.read_text(encoding="utf-8").split(heading)[0]
    (rows, columns), *_ = evaluation.tables()
    table = markdown_table([row for row in rows if row["steps"] is not None or row["model"] != "  95%"], columns)
    write_text(before + heading + table + "\n" + "; ".join(evaluation.notes[:3]) + ".\n", card)


# -- the models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rung:
    """A sampler in the normal form, of the teacher at a number of steps or of a student."""

    name: str
    fingerprint: str
    steps: int
    call: dict[str, Any]
    draw: Draw
    negative: str | None = None  #: that a guided teacher of text is led away from; None: what the family has


def ladder_models(
    source: ModelLike, sampling: SamplingOptions, teacher: str | os.PathLike[str] | Teacher | None,
    teacher_steps: Sequence[int], protocol: Protocol,
) -> list[Model]:  # fmt: skip
    """The teacher at its own steps, once for each guidance scale that a student was trained with, and the students.

    The source is one teacher, a student, or a folder of runs whose students have one teacher. The first model of a
    latent teacher of drawn shapes is the drawn pictures after the autoencoder: no model of its latents does better.
    """
    if sampling.dtype != "float32":
        raise UserError(f"dtype: {sampling.dtype} is not for a teacher at several steps, which is drawn in float32")
    if sampling.steps is not None:
        raise UserError(f"steps: {sampling.steps} was given beside teacher_steps; give one of them")
    judged, identity, rungs = _rungs(source, sampling, teacher, teacher_steps)
    judged.denoiser.to(sampling.device)
    family = FAMILIES.get(judged.family)
    if family is None or family.autoencoder is None:
        return [pixel_model(r.name, r.fingerprint, r.draw, judged, r.steps, r.call, sampling) for r in rungs]
    if family.conditions == "text" and not protocol.prompts:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the model"
        raise UserError(
            f"eval: {name!r} is text-to-image, and the protocol {protocol.name} has no captions; give one that "
            "has (--protocol shapes, say), or images with captions by --data"
        )
    latents = _Latents(judged, family, sampling, changes=protocol.prompts in CHANGED)
    models = [latents.model(rung) for rung in rungs]
    if protocol.prompts in DRAWN:
        models.insert(0, latents.drawn(identity, drawn_samples(protocol)))
    if protocol.prompts == "edits":
        unchanged = draw_edits(HELD_OUT, protocol.count).conditions
        models.insert(0, latents.drawn(identity, unchanged, "unchanged"))
    return models


def _rungs(
    source: ModelLike, sampling: SamplingOptions, teacher: str | os.PathLike[str] | Teacher | None, steps: Sequence[int]
) -> tuple[Teacher, str, list[_Rung]]:
    """The teacher, its fingerprint, and what is drawn of it and of its students."""
    students = _students(source, needs_teacher=teacher is None)
    if students is None:
        assert not isinstance(source, tuple)
        judged = source if isinstance(source, Teacher) else load_teacher(_pipeline(source))
        identity = _teacher_fingerprint(judged)
        scale = 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
        negative, second = sampling.negative_prompt, sampling.guidance_scale_2
        if negative is not None:
            _check_negative(judged, scale)
        with_second_scale(judged.denoiser, scale, second)  # which refuses what does not go
        return judged, identity, _teacher_rungs(judged, identity, steps, scale, negative, second)
    refuse_for_student(sampling)
    origin = teacher or students[0].teacher
    if origin is None:
        raise UserError("teacher: a loaded student does not say which it was distilled from; give teacher too")
    first = students[0]
    if isinstance(origin, Teacher):
        judged = origin
    else:  # drawn at its students' size
        size: dict[str, Any] = {"resolution": first.resolution, "frames": first.frames}
        judged = load_teacher(model_folder(origin), null_class=first.null_class, **size)
    identity = _teacher_fingerprint(judged)
    teachers: dict[tuple[float, str | None, float | None], list[_Rung]] = {}
    drawn: list[_Rung] = []
    for student in students:
        if teacher is None and student.teacher != origin:
            raise UserError(
                f"eval: {student.name} has another teacher ({student.teacher!r}) than {students[0].name} ({origin!r}); "
                "judge them one at a time, or give teacher"
            )
        if student.loaded[1].shape != first.loaded[1].shape:
            raise UserError(
                f"eval: {student.name} and {first.name} make samples of two shapes, {student.loaded[1].shape} and "
                f"{first.loaded[1].shape}; judge them one at a time"
            )
        # The student imitates the teacher as it was guided.
        scale = student.scale
        guidance = (scale, None if scale == 1 else student.negative, student.second)
        teachers.setdefault(guidance, _teacher_rungs(judged, identity, steps, *guidance))
        sampler, described = student.loaded
        sampler.denoiser.to(sampling.device)
        name = "student" if len(students) == 1 else student.name
        call = {"num_inference_steps": len(sampler.levels), "ladder": True}
        draw = partial(sampler, described.shape)
        drawn.append(_Rung(name, student.fingerprint, len(sampler.levels), call, draw))
    return judged, identity, [*(rung for rungs in teachers.values() for rung in rungs), *drawn]


def _check_negative(teacher: Teacher, scale: float) -> None:
    """UserError for a negative prompt of a teacher that takes none, or is not guided."""
    family = FAMILIES.get(teacher.family)
    if family is None or family.text is None:
        raise UserError(f"negative_prompt: {teacher.source!r} takes no prompts; leave it out")
    if scale == 1:
        raise UserError("negative_prompt: without guidance it changes nothing; give --guidance-scale too")


def _teacher_fingerprint(teacher: Teacher) -> str:
    return folder_fingerprint(local_folder(teacher.source)) if teacher.source else loaded_fingerprint(teacher)


def _teacher_rungs(
    teacher: Teacher,
    identity: str,
    steps: Sequence[int],
    scale: float,
    negative: str | None = None,
    second: float | None = None,
) -> list[_Rung]:
    name = "teacher" if scale == 1 else f"teacher, guidance {scale:g}"
    name += "" if second is None else f" and {second:g}"
    if negative is not None and negative != _own_negative(teacher):
        name += f" away from {shown(negative)}"
    call = {"sampler": "DDIM", "guidance_scale": scale} | ({} if negative is None else {"negative_prompt": negative})
    call |= {} if second is None else {"guidance_scale_2": second}
    draw = partial(teacher_images, teacher, second=second)
    return [
        _Rung(name, identity, n, {**call, "num_inference_steps": n}, partial(draw, n, scale), negative) for n in steps
    ]


def _own_negative(teacher: Teacher) -> str | None:
    """What the teacher's makers have for "no prompt", if it is a text of their own."""
    family = FAMILIES.get(teacher.family)
    return None if family is None or family.text is None else family.text.negative


@dataclass(frozen=True)
class _LoadedStudent:
    name: str
    fingerprint: str
    teacher: str | None  #: where it was distilled from
    scale: float  #: of the guidance that it imitates
    negative: str | None  #: the negative prompt of that
    second: float | None  #: the scale of the second of its teacher's two networks
    null_class: int | None  #: of its teacher
    loaded: Student
    resolution: Size | None = None  #: of a latent student; None: its teacher's own
    frames: int | None = None


def _students(source: ModelLike, needs_teacher: bool) -> list[_LoadedStudent] | None:
    """The students of a source, whose teachers must be here if they are needed; None if it is a teacher."""
    if isinstance(source, Teacher):
        return None
    if isinstance(source, tuple):
        return [_LoadedStudent("student", loaded_fingerprint(source), None, 1.0, None, None, None, source)]
    folders = models_in(source)
    folders = folders or [_pipeline(source)]
    if not is_student(folders[0]):
        return None
    students = []
    for folder in folders:
        record = student_record(folder)
        loaded = load_student(folder)
        identity, name = folder_fingerprint(local_folder(str(folder))), folder.parent.name
        origin = teacher_of(folder, record) if needs_teacher else record.teacher
        guidance, null_class = record.guidance, record.teacher_null_class
        imitated = (guidance.scale, guidance.negative_prompt, guidance.second)
        size = (record.resolution, record.frames)
        students.append(_LoadedStudent(name, identity, origin, *imitated, null_class, loaded, *size))
    return students


def _pipeline(source: str | os.PathLike[str]) -> Path:
    """The folder of a model; UserError if it holds none."""
    path = local_folder(str(model_folder(source)))
    if not (path / "model_index.json").is_file():
        raise UserError(f"eval: {os.fspath(source)!r} holds no student or teacher yet; train one, or export it")
    return path


class _Latents:
    """Models of latents, drawn in the normal form and decoded by the teacher's own autoencoder."""

    def __init__(self, teacher: Teacher, family: Family, sampling: SamplingOptions, changes: bool) -> None:
        assert family.autoencoder is not None
        self.changes = changes
        self.teacher, self.family, self.sampling, self.autoencoder = teacher, family, sampling, family.autoencoder
        folder = local_folder(teacher.source)
        self.pipeline = load_pipeline(folder, leave_out=family.networks, device=sampling.device)
        self.prompt = Prompt((teacher.size.get("height", 0), teacher.size.get("width", 0)))
        self.nulls: dict[str | None, Cond] = {}  #: conditions of each negative prompt

    def decoded(self, latents: Tensor, name: str) -> Tensor:
        """Images as the judge takes them."""
        images = self.autoencoder.decode(self.pipeline.vae, latents).float().clamp(-1, 1).cpu()
        refuse_non_finite(images, name)
        return rounded((images + 1) / 2) if self.sampling.eight_bit else images

    def lead_away_from(self, text: Text, negative: str | None) -> None:
        """Let the teacher's guidance be that from a negative prompt; None: from what the family has."""
        if negative not in self.nulls:
            self.nulls[negative] = text.null(self.pipeline, self.prompt._replace(negative=negative))
        with_null(self.teacher.denoiser, self.nulls[negative])

    def model(self, rung: _Rung) -> Model:
        """One that is drawn from captions, classes or nothing."""
        text = self.family.text

        def images(
            indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None,
            pictures: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            cond: Cond = {} if labels is None else {"class_labels": labels.to(self.sampling.device)}
            if text is not None:
                prompt = self.prompt._replace(images=pictures, negative=rung.negative, frames=self.teacher.frames)
                cond = text.encode(self.pipeline, list(captions or []), prompt)
                self.lead_away_from(text, rung.negative)
            with attention_of(self.teacher.denoiser, self.sampling.attention):
                latents = rung.draw(cond, image_generators(seed, indices))
            return self.decoded(latents, rung.name)

        classes = self.teacher.num_classes
        conditions = "prompts" if text is not None else "none" if classes is None else "classes"
        draw, reads_image = torch.no_grad()(images), self.family.reads_image
        return Model(
            rung.name, rung.fingerprint, conditions, classes, rung.steps, rung.call, draw, reads_image=reads_image,
            several=self.family.several,
        )  # fmt: skip

    def drawn(self, fingerprint: str, samples: Tensor, what: str = "drawn") -> Model:
        """Those of the held-out captions, or what is to be changed, encoded and decoded."""
        name = f"{what}, through the autoencoder"

        def images(
            indices: Sequence[int], seed: int, labels: Tensor | None, captions: Sequence[str] | None,
            pictures: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            encoded = self.autoencoder.encode(self.pipeline.vae, samples[list(indices)].to(self.sampling.device))
            return self.decoded(encoded, name)

        call, draw = {"drawn": what == "drawn"}, torch.no_grad()(images)
        return Model(name, fingerprint, "prompts", None, None, call, draw, count=len(samples), reads_image=self.changes)
