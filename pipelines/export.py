"""Saving networks as diffusers folders that stock diffusers loads, with their own scheduler."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

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
from diffdistill.families._own import own_record, save_weights
from diffdistill.families._parts import copy_part, stored_dtypes, weight_files, whole_index
from diffdistill.files import atomic_folder
from diffdistill.pipelines.shipped import adapted_pipeline
from diffdistill.pipelines.shipped.student_pipeline import FILE, pipeline_file
from diffdistill.players import adapter_networks
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.guidance_adapters import write_adapters
from diffdistill.players.lora import LoraNetwork, lora_weights
from diffdistill.players.scale_input import plain_network
from diffdistill.players.teacher import Teacher


@contextmanager
def pipeline_folder(folder: Path, record: Record, card: str, marker: str = METADATA) -> Iterator[Path]:
    """A folder to write a pipeline into; `folder` becomes it with record and model card, whole or not at all."""
    with atomic_folder(folder, marker) as partial:
        yield partial
        write_record(partial, record)
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def save_pipeline(
    folder: Path,
    family: str,
    network: nn.Module,
    scheduler: SchedulerMixin,
    record: StudentRecord | TeacherRecord,
    card: str,
    source: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a diffusers folder with its model card, whole or not at all.

    A latent family's other parts are those of the pipeline `source`. A LoRA student is saved merged, and its adapter
    beside it where the stock pipeline has `load_lora_weights`. `dtype` names the type of the network's weights; None:
    that of the source's.
    """
    entry = FAMILIES[family]
    stock = diffusers_class(entry.pipelines[0])
    with pipeline_folder(folder, record, card) as partial:
        plain = network.base if isinstance(network, AdaptedNetwork) else plain_network(network)
        if entry.autoencoder is None:
            if source is not None:
                plain = _typed(plain, local_folder(source) / entry.component, dtype)
            parts = {entry.component: plain, "scheduler": scheduler}
            stock(**parts).save_pretrained(partial, safe_serialization=True)
        else:
            _copy_parts(local_folder(str(source)), partial, entry, plain, scheduler, dtype)
            if isinstance(record, StudentRecord) and record.call is not None:
                (partial / FILE).write_text(pipeline_file(entry.class_names[0], record.call), encoding="utf-8")
        if isinstance(network, AdaptedNetwork):
            assert isinstance(record, StudentRecord)
            _add_adapters(partial, network, len(record.levels))
        if isinstance(network, LoraNetwork) and entry.loads_lora:
            layers = {f"{entry.component}_lora_layers": lora_weights(network)}
            stock.save_lora_weights(partial / "lora", **layers)
    return folder


def save_network(folder: Path, teacher: Teacher, network: nn.Module, record: StudentRecord, card: str) -> Path:
    """Write a student whose network diffusers does not know: weights, record and card, whole or not at all.

    Raises UserError for a student with adapters, whose pipeline would have to be diffusers'.
    """
    if isinstance(network, AdaptedNetwork):
        raise UserError("export: a student with guidance adapters needs a teacher that diffusers knows")
    with pipeline_folder(folder, replace(record, own_network=own_record(teacher)), card) as partial:
        save_weights(network, partial)
    return folder


def other_parts(source: Path, entry: Family) -> list[Path]:
    """The folders of a pipeline's parts besides network and scheduler; UserError where one is not whole.

    Parts that no image needs, such as a safety checker, are left out where they are not whole.
    """
    index = read_json(source / "model_index.json")
    optional = set(diffusers_class(entry.pipelines[0])._optional_components) - set(entry.needed_parts)
    parts = []
    for part in [source / name for name in parts_of(index) if name not in (entry.component, "scheduler")]:
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


def _copy_parts(
    source: Path, folder: Path, entry: Family, network: Any, scheduler: SchedulerMixin, dtype: str | None
) -> None:
    """The source's pipeline with another network and scheduler; its other parts are copied, not loaded."""
    kind = diffusers_class(entry.pipelines[0])
    index = whole_index(kind, read_json(source / "model_index.json"))
    parts = other_parts(source, entry)
    for part in parts:
        copy_part(part, folder / part.name)
    copied = {part.name for part in parts} | {entry.component, "scheduler"}
    index |= {name: [None, None] for name in parts_of(index) if name not in copied}
    if index.get("safety_checker") == [None, None] and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index["_class_name"] = entry.class_names[0]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    shards = {"max_shard_size": sys.maxsize} if entry.single_file else {}
    _typed(network, source / entry.component, dtype).save_pretrained(
        folder / entry.component, safe_serialization=True, **shards
    )
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _typed(network: Any, teacher: Path, dtype: str | None) -> Any:
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
