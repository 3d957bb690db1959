"""`diffdistill.json`, which stands beside model_index.json: what diffusers' own configs cannot say.

Of a student, how it is sampled and called, and how it was made; of a teacher of ours, its null class and recipe.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffdistill.errors import UserError, shown
from diffdistill.files import json_of
from diffdistill.options import Size, coerce, optional
from diffdistill.players.sampler import STEPS, step_named
from diffdistill.version import __version__

METADATA = "diffdistill.json"
FORMAT = 1
"""Of the files that are written. Files without a number are from before there was one."""

FORMS = ("pipeline", "network", "lora")
"""What of a student its folder holds."""

T = TypeVar("T")


@dataclass(frozen=True)
class Guidance:
    """How the teacher was guided that a student imitates.

    Either by one scale (1: not at all), or, where `least` and `greatest` are there, by any scale between them, which
    the student takes as an input; then `scale` is the one that it has if it is given none.
    """

    scale: float = 1.0
    least: float | None = None
    greatest: float | None = None
    negative_prompt: str | None = None  #: of one of text; None: what the family has for "no prompt"
    second: float | None = None  #: the scale of the second of a teacher's two networks; None: the same

    @property
    def is_input(self) -> bool:
        """Whether the student takes the scale as an input."""
        return self.least is not None


@dataclass(frozen=True)
class StudentRecord:
    """What an exported student's folder says of it."""

    kind: ClassVar[str] = "student"

    levels: tuple[float, ...]  #: timesteps or sigmas of the network's schedule, descending, one for each step
    move: str  #: from a level to the next, as `players.sampler.step_named` reads it
    teacher: str  #: a hub id, 'digits', or the name of a folder or class
    method: str = ""
    step: int = 0  #: of the training whose weights these are
    guidance: Guidance = Guidance()
    num_classes: int | None = None
    null_class: int | None = None
    resolution: Size | None = None  #: pixels a side or 'HEIGHTxWIDTH', of a latent model; None: its own
    frames: int | None = None  #: of a video
    call: dict[str, Any] | None = None  #: arguments of the stock pipeline's call besides the prompt, of a latent model
    own_network: dict[str, Any] | None = None  #: of one that is not diffusers': what is needed to build it again
    #: of FORMS: all that is needed, or network or LoRA with a scheduler, which need the teacher's folder too
    form: str = "pipeline"
    options: dict[str, Any] = field(default_factory=dict)  #: of the training, without paths
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def teacher_null_class(self) -> int | None:
        """The option `null_class` of the training, for a teacher whose folder does not say it."""
        return self.options.get("null_class")


@dataclass(frozen=True)
class TeacherRecord:
    """What the folder of a teacher that diffdistill trained says of it."""

    kind: ClassVar[str] = "teacher"

    null_class: int | None = None  #: the class label that it learned as "no class"
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    resolution: Size | None = None  #: pixels of its videos, where its family's own are others
    frames: int | None = None


@dataclass(frozen=True)
class DiversityRecord:
    """What the folder of a student that its teacher starts says of it."""

    kind: ClassVar[str] = "diversity"

    student: str
    teacher: str
    call: dict[str, Any]  #: arguments of the pipeline's call besides the prompt


Record = StudentRecord | TeacherRecord | DiversityRecord
_KINDS: dict[str, type[Record]] = {kind.kind: kind for kind in (StudentRecord, TeacherRecord, DiversityRecord)}


def write_record(folder: Path, record: Record) -> None:
    """Write the record into a pipeline's folder."""
    values = {"format": FORMAT, "kind": record.kind, **dataclasses.asdict(record)}
    (folder / METADATA).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """The record of a pipeline's folder; None if diffdistill did not make it.

    Raises UserError for a file that is no record, of a newer format, or with a field that is missing or mistyped.
    """
    path = folder / METADATA
    if not path.is_file():
        return None
    try:
        values = json_of(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"record: {path} is not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"record: {path} holds no JSON object; export or train the model again")
    number = values.pop("format", 0)
    if not isinstance(number, int) or not 0 <= number <= FORMAT:
        raise UserError(
            f"record: {path} is of format {shown(number)}, and diffdistill {__version__} reads formats up to {FORMAT}; "
            "update diffdistill"
        )
    if number == 0:
        try:
            values = _without_number(values)
        except (AttributeError, TypeError):
            raise UserError(f"record: {path}: its options or call are no objects; export the model again") from None
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"record: {path} has the kind {shown(kind)}; known are {', '.join(_KINDS)}")
    record = _built(_KINDS[kind], values, str(path), "")
    if isinstance(record, StudentRecord) and record.form not in FORMS:
        raise UserError(f"record: {path}: 'form' is {record.form!r}, none of {', '.join(FORMS)}")
    if isinstance(record, StudentRecord) and step_named(record.move) is None:
        raise UserError(f"record: {path}: 'move' is {record.move!r}, none of {', '.join(STEPS)}, gamma and a number")
    return record


def _without_number(values: dict[str, Any]) -> dict[str, Any]:
    """A file from before formats had numbers, as it is written today."""
    if "levels" in values:
        values = {"kind": "student", "guidance": _guidance(values), **values}
        if "renoise" in values:
            values["move"] = "renoise" if values.pop("renoise") else "ddim"
        return values
    return {"kind": "diversity" if "student" in values else "teacher", **values}


def _guidance(values: Mapping[str, Any]) -> dict[str, Any]:
    options, call = values.get("options") or {}, values.get("call") or {}
    least, greatest = (options.get(name) for name in ("guidance_min", "guidance_max"))
    scale = options.get("guidance_scale")
    if least is None or greatest is None:
        return {"scale": 1.0 if scale is None else scale}
    if scale is None:
        scale = call.get("guidance_scale", (least + greatest) / 2)
    takes_scale = "call" in values or values.get("method") == "adapter_guidance"  # others were exported at one scale
    return {"scale": scale, **({"least": least, "greatest": greatest} if takes_scale and least < greatest else {})}


def _built(kind: type[T], values: Mapping[str, Any], where: str, prefix: str) -> T:
    """The dataclass from JSON values; UserError for a field that is missing, mistyped or unknown."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values.keys() - fields.keys():
        raise UserError(f"record: {where} has the unknown field {prefix + name!r}; remove it")
    fitted = {}
    for name, f in fields.items():
        if name in values:
            fitted[name] = _fitted(values[name], hints[name], where, prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"record: {where} has no {prefix + name!r}; export the model again")
    return kind(**fitted)


_WORDS = {int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def _fitted(value: Any, hint: Any, where: str, name: str) -> Any:
    """The JSON value as the type of a field."""
    if isinstance(hint, types.UnionType):  # with None, always
        if value is None:
            return None
        hint, _ = optional(hint)
    if hint is Size:
        try:
            return coerce(name, value, Size, {"at_least": 1})
        except UserError as error:
            raise UserError(f"record: {where}: {error}") from None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _built(hint, value, where, f"{name}.")
    kind = typing.get_origin(hint) or hint
    if kind is tuple:
        if not isinstance(value, list) or not value:
            raise UserError(f"record: {where}: {name!r} is {shown(value)}; it must be a list of at least one number")
        return tuple(_fitted(part, typing.get_args(hint)[0], where, name) for part in value)
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or kind not in _WORDS or not isinstance(value, accepted):
        raise UserError(f"record: {where}: {name!r} is {shown(value)}; it must be {_WORDS.get(kind, 'an object')}")
    return float(value) if kind is float else value
