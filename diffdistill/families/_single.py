"""A teacher that is one file: diffusers' `from_single_file` reads it once, and a diffusers folder is in the cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import nn

from diffdistill.environment import process_count
from diffdistill.errors import UserError, first_line
from diffdistill.families._family import Family, diffusers_class
from diffdistill.families._hints import default_repository, hint_for_file, is_lora, tensors_in
from diffdistill.families._parts import LOADING, copy_part, parts_of
from diffdistill.families._registry import family_of
from diffdistill.files import atomic_folder, cache_folder

_CONFIG: list[str] = []  # the folder or hub id of `read_files_with`
_RECORD = "teacher-config.txt"  # in a folder that was made, whose configs it has
_VAES = ("first_stage_model.", "vae.")
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

FindFolder = Callable[[str, bool], Path]
"""(folder or hub id, whether its weights are needed) -> the folder."""


def read_files_with(config: str) -> None:
    """From now on single files are read with the configs of this diffusers folder or hub id (`--teacher-config`)."""
    _CONFIG[:] = [config]


def single_file_folder(path: Path, weights: bool, find: FindFolder) -> Path:
    """The diffusers folder of a pipeline that is one safetensors file.

    It is made once: the file's network, and its VAE and text encoders where it has them; else they are links to those
    of the configs' folder. Without `weights`, and where it is not made yet, the configs' folder stands for it. Raises
    UserError for a file that diffusers does not know, for 8-bit weights, and where no configs can be had.
    """
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    made = cache_folder() / "single-files" / hashlib.blake2b(state.encode(), digest_size=8).hexdigest() / path.stem
    config = _CONFIG[0] if _CONFIG else None
    if (made / _RECORD).is_file() and config in (None, (made / _RECORD).read_text(encoding="utf-8")):
        return made
    dtype = _stored_type(path)
    config = config or default_repository(path)
    if config is None:
        raise UserError(f"teacher: {path.name!r} is {hint_for_file(path)}; or give --teacher-config FOLDER_OR_ID")
    folder = _configs(path, config, find)
    if not weights:
        return folder
    if process_count() > 1:
        raise UserError(f"teacher: {path.name!r} would be read by each process; draw an image of it by `sample` first")
    family, _ = family_of(folder)
    try:
        with atomic_folder(made, "model_index.json") as new:
            if holds_pipeline(path):
                _save_pipeline(path, family, folder, new, dtype, lambda: find(config, True))
            else:
                _save_network(path, family, find(config, True), new, dtype)
            (new / _RECORD).write_text(config, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"teacher: {made.parent.parent} cannot be written ({error.strerror or first_line(error)}); name another "
            "folder by $DIFFDISTILL_CACHE"
        ) from None
    return made


def holds_pipeline(path: Path) -> bool:
    """Whether a file has other parts than a network, as diffusers reads whole pipelines."""
    return any(name.startswith(_VAES) for name in tensors_in(path))


def _stored_type(path: Path) -> torch.dtype:
    """The type of most of the file's numbers; UserError for 8-bit ones."""
    kinds = [kind for kind, _ in tensors_in(path).values()]
    if any(kind.startswith("F8") or kind in ("U8", "I8") for kind in kinds):
        raise UserError(
            f"teacher: {path.name!r} has 8-bit weights, which are too coarse to distill; give the file in float16, "
            "bfloat16 or float32"
        )
    return _TYPES[max(_TYPES, key=kinds.count)]


def _configs(path: Path, config: str, find: FindFolder) -> Path:
    try:
        return find(config, False)
    except UserError as error:
        if _CONFIG:
            raise UserError(f"teacher_config: {str(error).removeprefix('teacher: ')}") from None
        raise UserError(
            f"teacher: {path.name!r} needs the configs of its pipeline, and {config} could not be had from the hub; "
            "give --teacher-config FOLDER_OR_ID, a diffusers folder of its kind"
        ) from None


def _save_pipeline(
    path: Path, family: Family, folder: Path, to: Path, dtype: torch.dtype, whole: Callable[[], Path]
) -> None:
    """By the pipeline's class; text encoders that the file lacks are those of the whole folder."""
    kind: Any = diffusers_class(family.pipelines[0])
    for source in (lambda: folder, whole):
        try:
            pipeline = kind.from_single_file(str(path), config=str(source()), torch_dtype=dtype, local_files_only=True)
            break
        except SingleFileComponentError as error:
            missing = error
        except LOADING as error:
            raise _unfit(path, family, error) from None
    else:
        raise _unfit(path, family, missing) from None
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _check_whole(path, family, part)
    pipeline.save_pretrained(to)


def _save_network(path: Path, family: Family, folder: Path, to: Path, dtype: torch.dtype) -> None:
    """The network alone by its class, beside links to the folder's other parts."""
    kind = diffusers_class(family.network)
    named = {"config": str(folder), "subfolder": family.component, "local_files_only": True}
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"teacher: stock diffusers reads no single file of {kind.__name__}; give a diffusers folder")
    try:
        network = kind.from_single_file(str(path), torch_dtype=dtype, **named)
    except (*LOADING, SingleFileComponentError) as error:
        raise _unfit(path, family, error) from None
    _check_whole(path, family, network)
    network.save_pretrained(to / family.component)
    _, index = family_of(folder)
    for name in parts_of(index):
        if name != family.component and (folder / name).is_dir():
            copy_part(folder / name, to / name, link=True)
    shutil.copy2(folder / "model_index.json", to / "model_index.json")


def _check_whole(path: Path, family: Family, part: nn.Module) -> None:
    lacking = [name for name, tensor in part.named_parameters() if tensor.is_meta]
    if lacking:
        raise _unfit(path, family, ValueError(f"it has no {lacking[0]} of {type(part).__name__}"))


def _unfit(path: Path, family: Family, error: BaseException) -> UserError:
    lora = "; it is a LoRA, which --teacher-lora takes" if is_lora(path) else ""
    return UserError(f"teacher: {path.name!r} does not load as {family.name} ({first_line(error)[:120]}){lora}")
