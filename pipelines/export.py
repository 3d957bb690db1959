"""Saving networks as diffusers folders that stock diffusers loads, with their own scheduler."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from diffdistill.config import SavingConfig
from diffdistill.core.experts import ClassExperts, Experts, asked, experts_of
from diffdistill.errors import UserError
from diffdistill.families import (
    FAMILIES,
    METADATA,
    Family,
    Record,
    StudentRecord,
    TeacherRecord,
    diffusers_class,
    local_folder,
    parts_of,
    read_json,
    write_record,
)
from diffdistill.families._by_class import ByClass, by_class
from diffdistill.families._equilibrium import Equilibrium, in_place_of
from diffdistill.families._own import own_record, save_weights
from diffdistill.families._parts import LORA, LORA_2, copy_part, sized, stored_dtypes, student_index, weight_files
from diffdistill.files import atomic_folder
from diffdistill.pipelines.comfyui import check_comfyui, write_comfyui_lora
from diffdistill.pipelines.origin import copy_licenses, remove_paths
from diffdistill.pipelines.shipped import adapted_pipeline
from diffdistill.pipelines.shipped.student_pipeline import FILE, pipeline_class, pipeline_file
from diffdistill.pipelines.steps import OtherSteps
from diffdistill.players import adapter_networks
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.equilibrium import EquilibriumTransformer
from diffdistill.players.guidance_adapters import write_adapters
from diffdistill.players.lora import LoraNetwork, lora_weights
from diffdistill.players.scale_input import plain_network
from diffdistill.players.teacher import Teacher

Card = str | Callable[[str, Path], str]
"""A model card's text, or a function of what the folder holds (a record's `form`) and of the folder."""
SAVED = SavingConfig()
OWN_STEPS = OtherSteps()


@contextmanager
def pipeline_folder(
    folder: Path, record: Record, card: str | Callable[[Path], str], marker: str = METADATA
) -> Iterator[Path]:
    """A folder to write a pipeline into; `folder` becomes it with record and model card, whole or not at all.

    Paths of this machine are taken out of its configs. `card` may be a function of the folder as it was written.
    """
    with atomic_folder(folder, marker) as partial:
        yield partial
        remove_paths(partial)
        _finish(partial, record, card)


def _finish(folder: Path, record: Record, card: str | Callable[[Path], str]) -> None:
    write_record(folder, record)
    text = card if isinstance(card, str) else card(folder)
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def save_pipeline(
    folder: Path,
    family: str,
    network: nn.Module,
    scheduler: SchedulerMixin,
    record: StudentRecord | TeacherRecord,
    card: Card,
    source: str | None = None,
    dtype: str | None = None,
    saving: SavingConfig = SAVED,
    others: OtherSteps = OWN_STEPS,
) -> Path:
    """Write a diffusers folder with its model card, whole or not at all.

    A latent family's other parts are those of the pipeline `source`: copied, linked, or (`saving.parts`) left out. A
    LoRA student is saved merged, with its LoRA in the sub-folder `lora` where that can be loaded alone by the stock
    pipeline's `load_lora_weights`, or (`saving.export`) as one of the two alone. `dtype` names the type of the
    network's weights; None: that of the source's. `others` are the other numbers of steps that a whole pipeline serves.
    """
    entry = FAMILIES[family]
    teacher = None if source is None else local_folder(source)
    form = folder_form(entry, saving)
    kept = replace(record, form=form) if isinstance(record, StudentRecord) else record
    with pipeline_folder(folder, kept, card if isinstance(card, str) else partial(card, form)) as made:
        if form == "lora":
            assert isinstance(network, LoraNetwork)
            _write_lora(made, entry, network, scheduler, kept, dtype)
        else:
            _write_network(made, entry, network, scheduler, teacher, dtype, saving, kept)
            _write_call(made, entry, kept, others if form == "pipeline" else OWN_STEPS)
        copy_licenses(teacher, made)
        if saving.layout == "comfyui" and isinstance(network, LoraNetwork):
            write_comfyui_lora(made, entry.name, _lora_in(network, dtype))
        if isinstance(network, AdaptedNetwork):
            assert isinstance(record, StudentRecord)
            _add_adapters(made, network, len(record.levels))
        if isinstance(network, LoraNetwork) and network.alone and entry.loads_lora and saving.export == "both":
            alone = replace(kept, form="lora") if isinstance(kept, StudentRecord) else kept
            (made / "lora").mkdir()
            _write_lora(made / "lora", entry, network, scheduler, alone, dtype)
            copy_licenses(teacher, made / "lora")
            _finish(made / "lora", alone, card if isinstance(card, str) else partial(card, "lora"))
    return folder


def folder_form(entry: Family, saving: SavingConfig) -> str:
    """What a student's folder holds, as its record has it: 'pipeline', 'network' or 'lora'."""
    if saving.export == "lora":
        return "lora"
    return "network" if saving.parts == "reference" and entry.autoencoder is not None else "pipeline"


def check_saving(entry: Family | None, network: nn.Module, saving: SavingConfig) -> None:
    """UserError for a student that cannot be saved so."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", saving.max_shard_size):
        raise UserError(
            f"max_shard_size: {saving.max_shard_size!r} is no size; give a whole number with MB or GB, such as 10GB"
        )
    if saving.export == "lora":
        if not isinstance(network, LoraNetwork):
            raise UserError("export: 'lora' is for a student that is LoRA, and this one is trained whole; give merged")
        if entry is None or not entry.loads_lora:
            what = "a network that is not in diffusers" if entry is None else entry.class_names[0]
            raise UserError(f"export: stock diffusers loads no LoRA on {what}; give merged, which is a whole student")
        if not network.alone:
            raise UserError(
                "export: the LoRA alone cannot say what a guidance scale adds, which is a layer of its own; give merged"
            )
    if saving.parts == "reference" and entry is not None and entry.settings:
        raise UserError(
            f"parts: the guidance of {entry.class_names[0]} is a file of its folder, and a student's is another; give "
            "copy or link"
        )
    if saving.parts == "reference" and isinstance(network, AdaptedNetwork):
        raise UserError("parts: a student with guidance adapters is saved as a whole; give copy or link")
    if isinstance(network, ClassExperts | EquilibriumTransformer):
        for name, value in (("parts", "reference"), ("layout", "comfyui")):
            if getattr(saving, name) == value:
                raise UserError(
                    f"{name}: a student of a network of ours is saved as a whole diffusers folder; not {value}"
                )
    if saving.layout == "comfyui":
        check_comfyui(entry, network)


def check_policies(entry: Family | None, saving: SavingConfig) -> None:
    """UserError for a student of policies, whose scheduler is a file of its own, that cannot be saved so."""
    if entry is None:
        raise UserError(
            "policy: a student of policies is saved with a scheduler of its own, for pipelines of diffusers; "
            "give a teacher of diffusers"
        )
    for name, value, right in (
        ("export", "lora", "merged"),
        ("parts", "reference", "copy or link"),
        ("layout", "comfyui", "diffusers"),
    ):
        if getattr(saving, name) == value:
            raise UserError(
                f"{name}: a student of policies has a last layer and a scheduler of its own; give {right} for {value}"
            )


def _write_network(
    folder: Path,
    entry: Family,
    network: nn.Module,
    scheduler: SchedulerMixin,
    teacher: Path | None,
    dtype: str | None,
    saving: SavingConfig,
    record: Record,
) -> None:
    """The network with its scheduler, and with the teacher's other parts unless they are only referred to.

    Of one that is two, the second goes along where a level of the student's asks it.
    """
    plain: Any = network.base if isinstance(network, AdaptedNetwork) else plain_network(network)
    networks = {entry.component: plain}
    if isinstance(plain, ClassExperts):
        networks = {entry.component: by_class(list(plain.children()), plain.parts)}
    elif isinstance(plain, EquilibriumTransformer):
        assert teacher is not None
        config = sized(read_json(teacher / entry.component / "config.json"))
        networks = {entry.component: in_place_of(diffusers_class(entry.network).__name__, config, plain)}
    elif isinstance(plain, Experts):
        networks = {name: plain.get_submodule(name) for name in asked(plain, _times(record, scheduler))}
    if teacher is not None:
        networks = {name: as_stored(part, teacher / name, dtype) for name, part in networks.items()}
    size = saving.max_shard_size
    if entry.autoencoder is None:
        parts = {**networks, "scheduler": scheduler}
        diffusers_class(entry.pipelines[0])(**parts).save_pretrained(folder, max_shard_size=size)
        return
    assert teacher is not None
    for name, part in networks.items():
        part.save_pretrained(folder / name, max_shard_size=size)
    scheduler.save_pretrained(folder / "scheduler")
    if saving.parts == "reference":
        return
    parts_there = other_parts(teacher, entry)
    for path in parts_there:
        copy_part(path, folder / path.name, link=saving.parts == "link")
    kind, index = diffusers_class(entry.pipelines[0]), read_json(teacher / "model_index.json")
    names = [*(path.name for path in parts_there), *networks]
    if entry.second not in networks and index.get("boundary_ratio") is not None:
        index["boundary_ratio"] = None
    stepped = type(scheduler)  # of diffusers, or with its code in its folder
    index = student_index(kind, index, names, entry.component, (stepped.__module__.split(".")[0], stepped.__name__))
    if isinstance(carried := networks.get(entry.component), ByClass | Equilibrium):
        index[entry.component] = [type(carried).__module__, type(carried).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, values in entry.settings.items():
        text = json.dumps({**read_json(folder / file), **values}, indent=2)
        (folder / file).write_text(text + "\n", encoding="utf-8")


def _times(record: Record, scheduler: Any) -> list[float]:
    """The times of a student's levels in a flow, whose sigmas they are."""
    assert isinstance(record, StudentRecord)
    return [level * scheduler.config["num_train_timesteps"] for level in record.levels]


def _lora_in(network: LoraNetwork, dtype: str | None) -> dict[str, torch.Tensor]:
    """The LoRA in that type; None: as it was trained."""
    weights = lora_weights(network)
    return weights if dtype is None else {name: value.to(getattr(torch, dtype)) for name, value in weights.items()}


def _write_lora(
    folder: Path, entry: Family, network: LoraNetwork, scheduler: SchedulerMixin, record: Any, dtype: str | None
) -> None:
    """The LoRA as `load_lora_weights` reads it, and the scheduler and the call that go with it; of two networks two."""
    weights = {LORA: _lora_in(network, dtype)}
    if experts_of(network) is not None:
        names = asked(network, _times(record, scheduler))
        weights = {
            file: {key.partition(".")[2]: value for key, value in weights[LORA].items() if key.startswith(f"{name}.")}
            for file, name in zip((LORA, LORA_2), names, strict=False)
        }
    for file, layers in weights.items():
        kind = diffusers_class(entry.pipelines[0])
        kind.save_lora_weights(folder, **{f"{entry.component}_lora_layers": layers}, weight_name=file)
    scheduler.save_pretrained(folder / "scheduler")
    _write_call(folder, entry, record)


def _write_call(folder: Path, entry: Family, record: Record, others: OtherSteps = OWN_STEPS) -> None:
    """The file that gives the stock pipeline the student's own call, and other numbers of steps."""
    if not isinstance(record, StudentRecord) or (record.call is None and not others.schedulers and not others.rows):
        return
    if others.schedulers:
        others.write(folder)
    call, base = record.call or {"num_inference_steps": len(record.levels)}, entry.class_names[0]
    source = pipeline_file(base, entry.component, call, others.schedulers, others.rows)
    (folder / FILE).write_text(source, encoding="utf-8")
    if len(record.levels) in others.rows:  # the folder does not work without
        index = read_json(folder / "model_index.json")
        index["_class_name"] = [FILE.removesuffix(".py"), pipeline_class(base)]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_network(folder: Path, teacher: Teacher, network: nn.Module, record: StudentRecord, card: str) -> Path:
    """Write a student whose network diffusers does not know: weights, record and card, whole or not at all.

    Raises UserError for a student with adapters, whose pipeline would have to be diffusers'.
    """
    if isinstance(network, AdaptedNetwork):
        raise UserError("export: a student with guidance adapters needs a teacher that diffusers knows")
    with pipeline_folder(folder, replace(record, own_network=own_record(teacher)), card) as made:
        save_weights(network, made)
    return folder


def other_parts(source: Path, entry: Family) -> list[Path]:
    """The folders of a pipeline's parts besides network and scheduler; UserError where one is not whole.

    Parts that no image needs, such as a safety checker, are left out where they are not whole.
    """
    index, kind = read_json(source / "model_index.json"), diffusers_class(entry.pipelines[0])
    optional = set(kind._optional_components) - set(entry.needed_parts)
    parts = []
    for part in [source / name for name in parts_of(index, kind) if name not in (*entry.networks, "scheduler")]:
        try:
            if not part.is_dir():
                raise UserError(
                    f"teacher: {source} has no {part.name}/, which its pipeline needs; give the whole pipeline"
                )
            if (part / "config.json").is_file():
                weight_files(part)
        except UserError:
            if part.name in optional:
                continue
            raise
        parts.append(part)
    return parts


def as_stored(network: Any, teacher: Path, dtype: str | None) -> Any:
    """The network with its weights in `dtype`, or (None) each in the type that the teacher's files have it in."""
    types, most = stored_dtypes(teacher) if dtype is None else ({}, getattr(torch, dtype))
    tensors = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    rest = torch.float32 if types.keys() & tensors.keys() else most
    kinds = {name: types.get(name, rest) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if all(tensors[name].dtype is kind for name, kind in kinds.items()):
        return network
    twin = copy.deepcopy(network)
    for name, tensor in itertools.chain(twin.named_parameters(), twin.named_buffers()):
        if name in kinds:
            tensor.data = tensor.data.to(kinds[name])
            if not bool(tensor.data.isfinite().all()):
                raise UserError(f"dtype: {name} of the student overflows in {kinds[name]}; use bfloat16 or float32")
    return twin


def _add_adapters(folder: Path, network: AdaptedNetwork, steps: int) -> None:
    """Beside the base model: the adapters, and the code of their pipeline, which stock diffusers runs from there."""
    (folder / "adapter").mkdir()
    write_adapters(folder / "adapter", network)
    for module, where in ((adapted_pipeline, folder), (adapter_networks, folder / "adapter")):
        source = Path(inspect.getsourcefile(module) or "")
        (where / source.name).write_bytes(source.read_bytes())
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [adapted_pipeline.__name__.rpartition(".")[2], adapted_pipeline.AdaptedPipeline.__name__]
    index["adapter"] = [adapter_networks.__name__.rpartition(".")[2], adapter_networks.GuidanceAdapters.__name__]
    index["num_inference_steps"] = steps
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
