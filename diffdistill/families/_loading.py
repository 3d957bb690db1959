"""From a diffusers folder to a teacher, a student's sampler or a stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffdistill.errors import UserError, first_line
from diffdistill.families._family import Config, Source, diffusers_class, read_json
from diffdistill.families._own import load_own
from diffdistill.families._record import METADATA, Record, StudentRecord, TeacherRecord, read_record
from diffdistill.families._registry import family_of
from diffdistill.players.guidance_adapters import load_adapters
from diffdistill.players.sampler import STEPS, Sampler
from diffdistill.players.teacher import Teacher

NOT_LOADED = [f"*.{kind}" for kind in ("bin", "msgpack", "ckpt", "pt", "pth", "onnx*", "fp16.*", "non_ema.*")]
"""What is never read of a pipeline's folder: what would be unpickled, and copies of the weights."""

_EMBEDDED = {"digits": Path(__file__).parent / "assets" / "digits-teacher"}


def load_teacher(
    path_or_hub_id: str | PathLike[str],
    *,
    null_class: int | None = None,
    resolution: int | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """A teacher from a diffusers folder, a hub id, or 'digits', the one embedded in this package.

    `null_class` is the class label that the teacher learned as "no class"; a folder made by diffdistill
    says it itself. `resolution` and `frames` choose the samples' size where the family has more than one. Only the
    network is loaded, and only safetensors are read. Raises UserError for whatever cannot be used.
    """
    folder = local_folder(fspath(path_or_hub_id))
    family, index = family_of(folder)
    record = read_record(folder)
    scale = None
    if isinstance(record, StudentRecord) and record.guidance.is_input:
        scale = record.guidance.scale
    if null_class is None and isinstance(record, StudentRecord | TeacherRecord):
        null_class = record.null_class
    scheduler = _with_defaults(read_json(folder / "scheduler" / "scheduler_config.json"))
    network = _load_model(diffusers_class(family.network), folder / family.component, dtype)
    source = Source(folder, index, scheduler, null_class, scale, resolution, frames)
    teacher = replace(family.teacher(network, source), family=family.name, source=fspath(path_or_hub_id))
    if family.conditions == "text":
        height, width = family.pixels(folder, teacher.shape)
        teacher = replace(teacher, size={"height": height, "width": width} | teacher.size)
    teacher.denoiser.requires_grad_(False).eval()
    return teacher


def _with_defaults(config: Config) -> Config:
    """A scheduler's config with what its class takes where it says nothing: the classes differ in that."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    try:
        whole = {} if kind is None else dict(kind.from_config(config).config)
    except (ValueError, TypeError, NotImplementedError, ImportError):
        return config  # schedule_of says what is wrong with it
    return {k: v for k, v in whole.items() if k != "_use_default_values"} | config


def parts_of(index: Config) -> list[str]:
    """The parts that a model_index.json names, each a sub-folder."""
    return [name for name, part in index.items() if isinstance(part, list) and part[0] is not None and name[0] != "_"]


def in_half(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How diffusers is told the type of a pipeline's weights; nothing for float32, which it is by default."""
    return {} if dtype == torch.float32 else {"torch_dtype": dtype}


def load_pipeline(
    folder: Path, *, leave_out: Sequence[str] = (), only: Sequence[str] | None = None, device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """The stock pipeline of a folder, in evaluation mode, without the parts in `leave_out`, or with `only` those."""
    family, index = family_of(folder)
    parts = parts_of(index)
    for name in parts:
        if not (folder / name).is_dir() and (only is None or name in only) and name not in leave_out:
            raise UserError(f"teacher: {folder} has no {name}/, which {family.name} needs; give the whole pipeline")
    absent = {name: None for name in parts if name in leave_out or (only is not None and name not in only)}
    absent.pop("scheduler", None)
    try:
        kind = diffusers_class(family.pipelines[0])
        pipeline = kind.from_pretrained(folder, use_safetensors=True, **in_half(dtype), **absent)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"teacher: the pipeline in {folder} does not load ({first_line(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def describe(folder: Path, resolution: int | None = None, frames: int | None = None) -> Teacher:
    """The teacher of a folder from its configs alone: samples and classes are those of it, weights there are none."""
    family, index = family_of(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    config = {k: v for k, v in read_json(folder / family.component / "config.json").items() if k[0] != "_"}
    with torch.device("meta"):
        network = diffusers_class(family.network).from_config(config)
    return family.teacher(network, Source(folder, index, scheduler, resolution=resolution, frames=frames))


def local_folder(name: str) -> Path:
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    path = Path(name)
    if path.is_dir():
        return path
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists()
    if not looks_like_hub_id:
        raise UserError(f"teacher: {name!r} is not a folder; give a diffusers folder, a hub id or 'digits'")
    from huggingface_hub import snapshot_download

    # The whole pipeline but what would be unpickled and what is not loaded: a student is exported with all its parts.
    try:
        return Path(
            snapshot_download(name, allow_patterns=["model_index.json", METADATA, "*/*"], ignore_patterns=NOT_LOADED)
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = first_line(error)
        raise UserError(f"teacher: {name!r} is no folder here, nor could it be had from the hub ({reason})") from error


def _load_model(model: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Read a diffusers model; a missing or damaged file is named."""
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"teacher: {folder} has no .safetensors weights; save it with safe_serialization=True")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"teacher: {file} is not a whole safetensors file ({error})") from None
    if config.get("_class_name") not in (None, model.__name__):
        raise UserError(f"teacher: {folder} holds a {config['_class_name']}; {model.__name__} is expected")
    try:
        network = model.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"teacher: {folder} does not load as {model.__name__} ({first_line(error)})") from error
    absent = [name for name, p in network.named_parameters() if p.is_meta]
    if absent:
        raise UserError(f"teacher: {folder} does not load as {model.__name__} (it has no {absent[0]})")
    return network


def record_of(path_or_hub_id: str | Path) -> Record | None:
    """What diffdistill wrote into the folder beside diffusers' own files; None if it did not make it."""
    return read_record(local_folder(str(path_or_hub_id)))


def student_record(path_or_hub_id: str | Path) -> StudentRecord:
    """The record of an exported student; UserError if the folder is none."""
    record = record_of(path_or_hub_id)
    if not isinstance(record, StudentRecord):
        raise UserError(
            f"student: {str(path_or_hub_id)!r} has no levels in {METADATA}; it is no student of diffdistill"
        )
    return record


def is_student(path_or_hub_id: str | Path) -> bool:
    """Whether the folder is a student exported by diffdistill."""
    return isinstance(record_of(path_or_hub_id), StudentRecord)


def load_student(
    path_or_hub_id: str | PathLike[str], network: nn.Module | Teacher | None = None
) -> tuple[Sampler, Teacher]:
    """A student's sampler from an exported folder, and its shape and classes as a Teacher.

    `network`: of a student whose network diffusers does not know, a module of the same class, or the teacher that it
    was distilled from; the weights are loaded into a copy. Raises UserError if the folder was not exported by
    diffdistill, or is of another network.
    """
    name = fspath(path_or_hub_id)
    record, folder = student_record(name), local_folder(name)
    if record.own_network is not None:
        described = load_own(folder, record.own_network, network, record.num_classes)
    elif network is not None:
        raise UserError(f"network: {name!r} is a pipeline of diffusers; leave the network out")
    else:
        described = load_teacher(name, resolution=record.resolution, frames=record.frames)
    adapters = folder / "adapter"
    if adapters.is_dir():
        described = replace(described, denoiser=load_adapters(adapters, described.denoiser))
    return Sampler(described.denoiser, record.levels, STEPS[record.move]), described
