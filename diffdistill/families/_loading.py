"""From a diffusers folder to a teacher, a student's sampler or a stock pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.experts import Experts
from diffdistill.errors import UserError, first_line, shown
from diffdistill.families._by_class import ByClass
from diffdistill.families._equilibrium import Equilibrium, stand_in
from diffdistill.families._family import SMALL_AUTOENCODERS, Family, Source, diffusers_class
from diffdistill.families._folders import boundary_of, local_folder, networks_of
from diffdistill.families._own import load_own
from diffdistill.families._parts import (
    LOADING,
    LORA,
    LORA_2,
    Config,
    empty_part,
    load_part,
    null_parts,
    part_class,
    parts_of,
    read_json,
    weight_files,
    whole_index,
)
from diffdistill.families._record import METADATA, Record, StudentRecord, TeacherRecord, read_record
from diffdistill.families._registry import family_of
from diffdistill.options import Size, coerce, height_width
from diffdistill.players.class_experts import of_classes
from diffdistill.players.generators import seen_as
from diffdistill.players.guidance_adapters import load_adapters
from diffdistill.players.policy import POLICIES, policy_denoiser, seen_plain
from diffdistill.players.sampler import Sampler, step_named
from diffdistill.players.teacher import Teacher

CARRIED = (ByClass, Equilibrium)
"""Classes of networks whose code is a file of a student's folder, for diffusers alone."""


def load_teacher(
    path_or_hub_id: str | PathLike[str],
    *,
    null_class: int | None = None,
    resolution: Size | tuple[int, int] | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
) -> Teacher:
    """A teacher from a diffusers folder, a hub id, or 'digits', the one embedded in this package.

    `null_class` is the class label that the teacher learned as "no class"; a folder made by diffdistill
    says it itself. `resolution` (pixels a side, 'HEIGHTxWIDTH' or the pair) and `frames` choose the samples' size
    where the family has more than one; by default they are those that the folder's record says. Only the network is
    loaded, and only safetensors are read; without `weights` configs alone, and the network lies on the meta device.
    Raises UserError for whatever cannot be used.
    """
    folder = local_folder(fspath(path_or_hub_id), weights)
    family, index = family_of(folder)
    record = read_record(folder)
    scale = None
    if isinstance(record, StudentRecord) and record.guidance.is_input:
        scale = record.guidance.scale
    if null_class is None and isinstance(record, StudentRecord | TeacherRecord):
        null_class = record.null_class
    if isinstance(record, TeacherRecord):
        resolution, frames = resolution or record.resolution, frames or record.frames
    told, said = _scheduler(folder)
    scheduler = _with_defaults(told)
    network = _network(folder, family, index, scheduler, dtype, weights)
    size = coerce("resolution", resolution, Size | None, {"at_least": 1})
    pixels = None if size is None else height_width(size)
    source = Source(folder, index, scheduler, null_class, scale, pixels, frames)
    one = network
    if isinstance(network, ByClass):
        one = network.networks[0]  # all have one config
    elif isinstance(network, Equilibrium):
        one = stand_in(network)
    with nullcontext() if said is None else seen_plain(network, said):
        made_of = _checked(family, one, source)
    if isinstance(network, ByClass):
        made_of = replace(made_of, denoiser=_by_its_parts(made_of, network, folder))
    elif isinstance(network, Equilibrium):
        made_of = replace(made_of, denoiser=_as_teacher(made_of, network, folder))
    latent = family.autoencoder is not None
    teacher = replace(made_of, family=family.name, source=fspath(path_or_hub_id), latent=latent)
    if said is not None:
        teacher = replace(teacher, denoiser=policy_denoiser(teacher.denoiser, said))
    if family.conditions == "text":
        height, width = family.pixels(folder, teacher.shape)
        teacher = replace(teacher, size={"height": height, "width": width} | teacher.size)
    teacher.denoiser.requires_grad_(False).eval()
    return teacher


def _by_its_parts(one: Teacher, network: ByClass, folder: Path) -> Denoiser:
    """The denoiser of all networks, of the teacher of one of them; UserError where a class has none."""
    parts, known = network.config["parts"], range(len(network.networks))
    if len(parts) <= (one.num_classes or 0) or not all(type(part) is int and part in known for part in parts):
        raise UserError(
            f"teacher: the config in {folder} says parts that are not one of {len(known)} networks for each of the "
            f"{one.num_classes or 0} classes and for none; export the student again"
        )
    return of_classes(one.denoiser, list(network.networks), parts)


def _as_teacher(one: Teacher, network: Equilibrium, folder: Path) -> Denoiser:
    """The denoiser of the network, of the teacher in whose place it stands; UserError where it makes other samples."""
    transformer, classes = network.transformer, one.num_classes
    shape, labels = transformer.described["shape"], transformer.described["labels"]
    if tuple(shape) != tuple(one.shape) or (labels is None) != (classes is None) or (labels or 0) < (classes or 0):
        raise UserError(
            f"teacher: the config in {folder} says samples {tuple(shape)} and {labels or 0} labels, and those of its "
            f"pipeline are {tuple(one.shape)} and {classes or 0} classes; export the student again"
        )
    return seen_as(one.denoiser, transformer)


def _scheduler(folder: Path) -> tuple[Config, Config | None]:
    """The config of a folder's scheduler, or of its teacher's and its own where that is one of policies."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if config.get("_class_name") != POLICIES:
        return config, None
    if not isinstance(config.get("teacher"), dict):
        raise UserError(f"scheduler: {folder / 'scheduler'} does not say its teacher's; export the student again")
    return config["teacher"], config


def _network(
    folder: Path, family: Family, index: Config, scheduler: Config, dtype: torch.dtype, weights: bool
) -> nn.Module:
    """The network of a folder, or both where there are two; UserError where no network is for some of the noise."""
    model = expected = diffusers_class(family.network)
    made: dict[str, nn.Module] = {}
    boundary = boundary_of(family, index)
    for name in networks_of(family, index):
        config = read_json(folder / name / "config.json")
        kind = config.get("_class_name")
        carried = next((own for own in CARRIED if own.__name__ == kind), None)
        if carried is not None and boundary is None:
            model, kind = carried, config.get("kind")
        if kind not in (None, expected.__name__):
            raise UserError(f"teacher: {folder / name} holds a {kind}; {expected.__name__} is expected")
        if weights:
            made[name] = _with_lora(load_part(model, folder / name, dtype), folder, family, name)
        else:
            made[name] = empty_part(model, folder / name, dtype)
    if boundary is None:
        return made[family.component]
    return Experts(made, boundary * scheduler.get("num_train_timesteps", 1000))


def _with_lora(network: Any, folder: Path, family: Family, component: str) -> Any:
    """The network; of a student that is a LoRA on its teacher's, with that in its weights."""
    record = read_record(folder)
    file = folder / (LORA if component == family.component else LORA_2)
    # A student that never asks the second network has no LoRA for it.
    if isinstance(record, StudentRecord) and record.form == "lora" and (file.name == LORA or file.exists()):
        network.load_lora_adapter(load_file(file), prefix=family.component)
        network.fuse_lora()
        network.unload_lora()
    return network


def _checked(family: Family, network: Any, source: Source) -> Teacher:
    """The family's teacher; UserError for a network that reads more than noisy latents, such as a masked image."""
    try:
        _check_vae(family, source)
        teacher = family.teacher(network, source)
        made = None if family.autoencoder is None else family.autoencoder.channels(source.config("vae"))
    except UserError:
        raise
    except Exception as error:  # a config may hold anything, null where there must be a number for one
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"teacher: the configs in {source.folder} are not those of {family.name} ({reason})") from error
    if made is not None:
        taken = teacher.shape[0]
        if made != taken:
            raise UserError(
                f"teacher: {source.folder / family.component} takes {taken} channels and the VAE gives {made}; "
                "a network that also reads an image or a mask is not supported; give one of text or classes alone"
            )
    return teacher


def _check_vae(family: Family, source: Source) -> None:
    """UserError for an autoencoder of another class, or without the scale of its latents."""
    if family.autoencoder is None:
        return
    config, known = source.config("vae"), family.autoencoder.network
    made = config.get("_class_name")
    if known is not None and made not in (None, known, SMALL_AUTOENCODERS.get(known)):
        raise UserError(f"teacher: {source.folder / 'vae'} holds {shown(made)}; {known} is expected")
    for name in family.autoencoder.numbers:
        if config.get(name) is None:
            raise UserError(
                f"teacher: {source.folder / 'vae' / 'config.json'} has no {name}, by which latents are scaled"
            )


def _with_defaults(config: Config) -> Config:
    """A scheduler's config with what its class takes where it says nothing: the classes differ in that."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    try:
        whole = {} if kind is None else dict(kind.from_config(config).config)
    except Exception:  # whatever the class makes of what it does not expect
        return config  # schedule_of says what is wrong with it
    return {k: v for k, v in whole.items() if k != "_use_default_values"} | config


def load_pipeline(
    folder: Path, *, leave_out: Sequence[str] = (), only: Sequence[str] | None = None, device: Any = "cpu",
    dtype: torch.dtype = torch.float32, weights: bool = True,
) -> Any:  # fmt: skip
    """The stock pipeline of a folder, in evaluation mode, without the parts in `leave_out`, or with `only` those.

    All weights are of the type `dtype`, whatever the files hold. What no image needs, such as a safety checker, is not
    loaded. Without `weights` all networks are made of their configs, on the meta device. Raises UserError for a part
    that is missing, or whose files do not hold all of its weights.
    """
    family, index = family_of(folder)
    kind = diffusers_class(family.pipelines[0])
    for name in (name for name in family.packages if find_spec(name) is None):
        raise UserError(f"teacher: {kind.__name__} imports the package {name}, which is missing; pip install {name}")
    parts: dict[str, Any] = dict.fromkeys(null_parts(kind, index))
    for name in _named(folder, family, kind, index):
        if (
            name in leave_out
            or (only is not None and name not in (*only, *family.built_with))
            or (name not in (*family.needed_parts, *family.networks) and name in kind._optional_components)
        ):
            parts[name] = None
        elif not (folder / name).is_dir():
            raise UserError(
                f"teacher: {folder} has no {name}/, which {family.name} needs; give the whole pipeline"
                + (f', or write "{name}": [null, null] in its model_index.json' if _optional(family, name) else "")
            )
        elif isinstance(own := _part_kind(index[name]), type) and issubclass(own, nn.Module):
            parts[name] = (load_part if weights else empty_part)(own, folder / name, dtype)
            if weights and name in family.networks:
                parts[name] = _with_lora(parts[name], folder, family, name)
    told, said = _scheduler(folder)
    if said is not None:  # whose code is not run here
        parts["scheduler"] = getattr(diffusers, str(told.get("_class_name"))).from_config(told)
    settings = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    try:
        with _without_nulls(folder, kind, index) as view:
            pipeline = kind.from_pretrained(view, use_safetensors=True, torch_dtype=dtype, **parts, **settings)
    except LOADING as error:
        raise UserError(f"teacher: the pipeline in {folder} does not load ({first_line(error)})") from error
    pipeline.register_to_config(_name_or_path=str(folder))
    pipeline.set_progress_bar_config(disable=True)
    if family.steer is not None:
        family.steer(pipeline, 1.0)
    return pipeline.to(device) if weights else pipeline


def _part_kind(entry: Sequence[str]) -> Any:
    """The class of a part, of a network whose code is in the folder ours, so that none of that is run."""
    return next((own for own in CARRIED if [*entry] == [own.__module__, own.__name__]), None) or part_class(entry)


def _optional(family: Family, name: str) -> bool:
    return family.text is not None and name in family.text.optional


def _named(folder: Path, family: Family, kind: Any, index: Config) -> list[str]:
    """The parts in the index besides the scheduler; UserError where one that is needed is null or not named."""
    parts = [name for name in parts_of(index, kind) if name != "scheduler"]
    for name in family.needed_parts:
        if name not in parts and not _optional(family, name):
            raise UserError(f"teacher: {folder} names no {name} in model_index.json, which {family.name} needs")
    return parts


@contextmanager
def _without_nulls(folder: Path, kind: Any, index: Config) -> Iterator[Path]:
    """The folder as diffusers reads it: one whose index has a plain null for a part is seen with [null, null].

    A network whose code is in the folder is seen as any network of diffusers.
    """
    whole = whole_index(kind, index)
    carried = [[own.__module__, own.__name__] for own in CARRIED]
    own = [name for name, value in index.items() if value in carried]
    whole |= {name: ["diffusers", "ModelMixin"] for name in own}  # as which diffusers takes one that it is given
    if whole == index:
        yield folder
        return
    with TemporaryDirectory() as made:
        view = Path(made)
        for path in folder.iterdir():
            if path.name != "model_index.json":
                (view / path.name).symlink_to(path.resolve())
        (view / "model_index.json").write_text(json.dumps(whole), encoding="utf-8")
        yield view


def describe(folder: Path, resolution: Size | tuple[int, int] | None = None, frames: int | None = None) -> Teacher:
    """The teacher of a folder from its configs alone: samples and classes are those of it, weights there are none."""
    return load_teacher(folder, resolution=resolution, frames=frames, weights=False)


def check_weights(name: str) -> None:
    """UserError where a folder here is no pipeline, or has not the weights of its network; nothing is loaded."""
    if Path(name).is_dir():
        family, index = family_of(Path(name))
        for part in networks_of(family, index):
            weight_files(Path(name) / part)


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
    step = step_named(record.move)
    assert step is not None, "the record was read"
    return Sampler(described.denoiser, record.levels, step), described
