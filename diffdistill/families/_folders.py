"""Where a model's folder is: here, embedded, or on the hub; and the teacher's, where a student leaves parts to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from diffdistill.config import INPUTS
from diffdistill.errors import UserError, first_line, shown
from diffdistill.families._family import Family, diffusers_class
from diffdistill.families._hints import CHECKPOINTS, hint_for_file, is_single_file
from diffdistill.families._parts import LORA, LORA_2, PICKLED, Config, parts_of, read_json, student_index
from diffdistill.families._record import METADATA, StudentRecord, read_record
from diffdistill.families._registry import family_of
from diffdistill.families._single import single_file_folder
from diffdistill.files import json_object

NOT_LOADED = [*PICKLED, "*.fp16.*", "*.non_ema.*"]
"""What is not fetched of a pipeline's folder: what would be unpickled, and, unless they are alone, copies."""

_LICENSES = ["*LICEN[CS]E*", "*[Ll]icen[cs]e*", "NOTICE*"]
_FETCHED = ["model_index.json", METADATA, LORA, LORA_2, "*/*", "README.md", *_LICENSES]
_EMBEDDED = {"digits": Path(__file__).parent / "assets" / "digits-teacher"}
_CACHED = re.compile(r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


def local_folder(name: str, weights: bool = True) -> Path:
    """The folder of a model: of a path, a hub id or 'digits'. UserError where there is none.

    Without `weights` no file of weights is fetched from the hub. A single safetensors file is a folder in the cache
    (`_single`). A student that leaves parts to its teacher is a folder
    of links to its own files and the teacher's.
    """
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    path = Path(name)
    if path.is_dir():
        return _whole(path)
    if is_single_file(path):
        return single_file_folder(path, weights, local_folder)
    if path.suffix in CHECKPOINTS:
        raise UserError(f"teacher: {path.name!r} is {hint_for_file(path)}")  # the name alone: the command must fit
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists()
    if not looks_like_hub_id:
        raise UserError(f"teacher: {name!r} is not a folder; give a diffusers folder, a hub id or 'digits'")
    folder = _fetched(name, NOT_LOADED if weights else [*NOT_LOADED, "*.safetensors"])
    if weights and (folder / "model_index.json").is_file() and _has_variants_alone(folder):
        folder = _fetched(name, [pattern for pattern in NOT_LOADED if "fp16" not in pattern])
    return _whole(folder)


def _fetched(name: str, left_out: list[str]) -> Path:
    """A hub's pipeline: all of it, since a student is exported with all its parts, but what would be unpickled."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=left_out))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = first_line(error)
        raise UserError(f"teacher: {name!r} is no folder here, nor could it be had from the hub ({reason})") from error


def _has_variants_alone(folder: Path) -> bool:
    """Whether a network's configs are there and its weights are not, which the hub may have in half precision alone."""
    parts = [folder / name for name in parts_of(read_json(folder / "model_index.json"))]
    return any((part / "config.json").is_file() and not any(part.glob("*.safetensors")) for part in parts)


# -- names ---------------------------------------------------------------------------------------------------


def is_path(text: str) -> bool:
    """Whether a text can be nothing but a path, whatever there is on this machine."""
    return text.startswith(("/", "~", "./", "../", ".\\", "..\\")) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\", text))


def public_name(source: str) -> str:
    """What a model or data set is called where its path means nothing: a hub id, or the folder's own name.

    The folder `teacher` or `student` of a run is named with its run. The name of a local folder has no slash, so that
    nobody takes it for a hub id.
    """
    if cached := _CACHED.search(f"{source}/"):
        return f"{cached[1]}/{cached[2]}"
    path = Path(source)
    if source in _EMBEDDED or not (path.exists() or is_path(source)):
        return source
    path = path.absolute()
    return f"{path.parent.name}-{path.name}" if path.name in ("teacher", "student") and path.parent.name else path.name


def teacher_of(folder: Path, record: StudentRecord) -> str:
    """Where the teacher of a student is: the path that its run has, or the name in its record.

    Raises UserError where that is the name of a folder that is not here.
    """
    name, run = record.teacher, folder.parent / INPUTS
    try:
        source = json_object(run).get("teacher") if run.is_file() else None
    except (OSError, ValueError):
        source = None
    if isinstance(source, str) and public_name(source) == name:
        return source
    if name in _EMBEDDED or name.count("/") == 1 or Path(name).exists():
        return name
    raise UserError(
        f"teacher: the student in {folder} was distilled from {name!r}, which is no folder here; give --teacher, or "
        "make a link of that name"
    )


# -- two networks ---------------------------------------------------------------------------------------------


def networks_of(family: Family, index: Config) -> tuple[str, ...]:
    """The sub-folders of the networks that the index has; UserError as `boundary_of` has it."""
    return (family.component,) if boundary_of(family, index) is None else family.networks


def boundary_of(family: Family, index: Config) -> float | None:
    """The part of the noise from which on the network is asked, and below which the second; None where there is one.

    UserError for an index that has one without the other, or leaves some of the noise to neither.
    """
    if family.second is None:
        return None
    ratio, there = index.get("boundary_ratio"), family.second in parts_of(index)
    if ratio is None and not there:
        return None
    if ratio is None or not there:
        lacks, has = ("boundary_ratio", family.second) if there else (family.second, f"boundary_ratio {shown(ratio)}")
        raise UserError(
            f"teacher: model_index.json has {has} and no {lacks}, so that no network is for the lower noise; give "
            "both, or neither"
        )
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(
            f"teacher: boundary_ratio in model_index.json is {shown(ratio)}, with which one of the networks is for no "
            "noise; give a number between 0 and 1"
        )
    return float(ratio)


# -- students without their teacher's parts --------------------------------------------------------------------

_VIEWS: dict[tuple[str, int, int], TemporaryDirectory[str]] = {}  # each of which lasts as long as the process


def is_partial(folder: Path) -> bool:
    """Whether a folder holds a student that needs its teacher's folder: a LoRA, or a network without other parts."""
    if (folder / "model_index.json").is_file() or not (folder / METADATA).is_file():
        return False
    record = read_record(folder)
    return isinstance(record, StudentRecord) and record.form != "pipeline"


def _whole(folder: Path) -> Path:
    if not is_partial(folder):
        return folder
    stat = (folder / METADATA).stat()  # an export that is made again is another file
    key = (str(folder.resolve()), stat.st_ino, stat.st_mtime_ns)
    if key not in _VIEWS:
        made = TemporaryDirectory(prefix="diffdistill-")
        _link_parts(folder, Path(made.name) / folder.resolve().name)
        _VIEWS[key] = made
    return Path(_VIEWS[key].name) / folder.resolve().name


def _link_parts(folder: Path, view: Path) -> None:
    """Make the whole pipeline of a partial student, of links to its files and its teacher's."""
    record = read_record(folder)
    assert isinstance(record, StudentRecord)
    teacher = local_folder(teacher_of(folder, record))
    family, index = family_of(teacher)
    if record.form == "network" and family.second is not None and not (folder / family.second).is_dir():
        index |= {family.second: [None, None], "boundary_ratio": None}  # the student is one network
    view.mkdir()
    if (folder.parent / INPUTS).is_file():  # which says where the teacher is
        (view.parent / INPUTS).symlink_to((folder.parent / INPUTS).resolve())
    for path in (*folder.iterdir(), *(teacher / name for name in parts_of(index))):
        if path.exists() and not (view / path.name).exists():
            (view / path.name).symlink_to(path.resolve())
    scheduler = "diffusers", read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    parts = [name for name in parts_of(index) if (view / name).is_dir()]
    whole = student_index(diffusers_class(family.pipelines[0]), index, parts, family.component, scheduler)
    (view / "model_index.json").write_text(json.dumps(whole), encoding="utf-8")
