"""Noise-image pairs: what the teacher's deterministic sampler makes of given noise, computed once and kept.

A folder of pairs holds shards of safetensors and an index, `pairs.json`, with every setting, a fingerprint of
the teacher and a checksum for each shard. Of each pair, `z` is standard normal, `x0` has unit variance
(an image is x0 times the schedule's data_std), and the rest are its conditions: `class_labels`, if the teacher has
classes, or an encoded prompt's.

Pair i is a function of (seed, i): its noise comes from a generator of its own, and classes or prompts take turns. The
noise is that of no evaluation seed, so that a student is never judged on the noise it was trained on. z and classes
are the same bits whatever the batch; x0 is too for the same batch and shard size, else to float rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import PairsConfig
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, heun_step, sample_ode
from diffdistill.core.schedule import sampling_grid
from diffdistill.data.encoded import Bucketed, Encoded, check_encoded, open_encoded, with_prompts
from diffdistill.data.examples import ClassLabels, Example, Examples
from diffdistill.data.processes import Processes
from diffdistill.data.shards import Kind, bytes_of, open_shards, rows, without_padding
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, attention_of, family_of, load_teacher, local_folder
from diffdistill.options import build
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator
from diffdistill.scaffold.method import Pair

KIND = Kind("pairs", "pairs", "pair")
_STEPS = {"ddim": ddim_step, "heun": heun_step}
# What a pair depends on, and which pairs a shard holds.
_RECIPE = ("count", "solver", "sampling_steps", "guidance_scale", "guidance_scale_2", "seed", "shard_size")


def described_schedule(teacher: Teacher) -> dict[str, Any]:
    """What tells two schedules apart: the scheduler's config, or of a network that diffusers lacks the schedule."""
    config = {k: v for k, v in sorted(teacher.scheduler.items()) if k != "_diffusers_version"}
    if teacher.family:
        return config
    schedule: Any = teacher.denoiser.schedule
    fields = dataclasses.fields(schedule) if dataclasses.is_dataclass(schedule) else ()
    values = {f.name: getattr(schedule, f.name) for f in fields if not f.name.startswith("_")}
    plain = {k: v.tolist() if isinstance(v, Tensor) else repr(v) for k, v in values.items()}
    return config | {"schedule": type(schedule).__name__} | plain


def fingerprint(teacher: Teacher) -> str:
    """16 hex digits that tell the content of two teachers apart: weights and scheduler."""
    return weights_fingerprint(teacher, json.dumps(described_schedule(teacher), default=str))


def weights_fingerprint(teacher: Teacher, besides: str = "{}") -> str:
    """16 hex digits of the teacher's weights, and of a text."""
    digest = hashlib.blake2b(besides.encode(), digest_size=8)
    weights = teacher.denoiser.network.state_dict()  # LoRA players may lie on the same network
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name, tensor in sorted(own.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


@torch.no_grad()
def draw_pairs(
    teacher: Teacher,
    denoise: nn.Module,
    config: PairsConfig,
    indices: Sequence[int],
    conditions: Examples | None = None,
) -> dict[str, Tensor]:
    """z and x0 (B, ...) and the conditions of pairs `indices`; `denoise` is the teacher, guided or not.

    Pair i has the condition i of `conditions`, which take turns; None: the teacher's classes.
    """
    weight = next(itertools.chain(teacher.denoiser.parameters(), teacher.denoiser.buffers()))
    z = torch.stack([torch.randn(teacher.shape, generator=generator("cpu", config.seed, "pair", i)) for i in indices])
    conditions = ClassLabels(teacher.num_classes) if conditions is None else conditions
    cond = conditions.get(torch.tensor(indices) % len(conditions)).cond
    moved = {key: value.to(weight.device) for key, value in cond.items()}
    schedule, step = teacher.denoiser.schedule, _STEPS[config.solver]
    x0 = sample_ode(step, denoise, schedule, z.to(weight), config.sampling_steps, moved).cpu()
    if not bool(x0.isfinite().all()):
        raise UserError(
            f"teacher: {teacher.source!r} makes images that are not finite; use --teacher-dtype float32 or another "
            "teacher"
        )
    return {"z": z, "x0": x0, **cond}


# -- making them -------------------------------------------------------------------------------------------


def make_pairs(
    *, teacher: str | PathLike[str] | Teacher | None = None, conditions: Examples | None = None, **values: Any
) -> Path:
    """`diffdistill pairs`: make a folder of pairs, or what is still missing of it; returns the folder.

    `teacher` and `conditions` are as in `diffdistill.make_pairs`; the rest are the command's options, with
    underscores. Shards are written whole, and those that are there and have their checksum are kept. Raises UserError
    for whatever cannot be used, a folder made with other settings for one.
    """
    named = teacher is None or isinstance(teacher, str | PathLike)
    config = build(PairsConfig, values | ({"teacher": teacher} if named and teacher is not None else {}))
    out, processes = Path(config.out), Processes(config.device)
    if isinstance(teacher, Teacher):
        own, conditions = _own_teacher(teacher, config, conditions)
    elif not named:
        raise UserError(
            f"teacher: {type(teacher).__name__} is no teacher; give a folder, a hub id, 'digits', or "
            "Teacher.around(network, ..)"
        )
    elif conditions is not None:
        raise UserError("conditions: they are for a teacher as an object; give prompts, a folder made by `encode`")
    else:
        own, conditions = _teacher(config)
    own.denoiser.to(processes.device)
    denoise = guided(own.denoiser, config.guidance_scale, second=config.guidance_scale_2)
    sampling_grid(own.denoiser.schedule, config.sampling_steps, option="sampling_steps")  # refuses too many steps now
    index = processes.start(KIND, out, _settings(own, config, conditions), {"teacher": own.source})

    def produce(indices: range) -> dict[str, Tensor]:
        columns = draw_pairs(own, denoise, config, indices, conditions)
        samples = {name: columns.pop(name) for name in ("z", "x0")}
        return samples | without_padding(columns)

    with attention_of(own.denoiser, config.attention):
        processes.make(KIND, out, index, config.batch_size, produce)
    return out


def _teacher(config: PairsConfig) -> tuple[Teacher, Encoded | None]:
    """The teacher that the options name, and its prompts if it needs any."""
    encoded = None if config.prompts is None else open_encoded(config.prompts)
    if isinstance(encoded, Bucketed):
        raise UserError(f"prompts: {config.prompts!r} has buckets, and pairs are of one size; encode without --buckets")
    size: dict[str, Any] = {} if encoded is None else encoded.size
    dtype = getattr(torch, config.teacher_dtype)
    teacher = load_teacher(config.teacher, null_class=config.null_class, dtype=dtype, **size)
    if teacher.size and encoded is None:
        command = f"`diffdistill encode --teacher {config.teacher}`"
        raise UserError(f"prompts: {config.teacher!r} needs them; give a folder made by {command}")
    return (teacher, None) if encoded is None else (_prompted(teacher, encoded), encoded)


def _prompted(teacher: Teacher, encoded: Encoded) -> Teacher:
    folder = local_folder(teacher.source)
    check_encoded(encoded, folder, family_of(folder)[0], teacher.shape)
    return with_prompts(teacher, encoded)


def _own_teacher(teacher: Teacher, config: PairsConfig, conditions: Examples | None) -> tuple[Teacher, Examples | None]:
    """A teacher that Python gave, and what its pairs are conditioned on; UserError where these do not fit."""
    defaults = PairsConfig()
    for name in ("null_class", "teacher_dtype"):
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(f"{name}: it is for a teacher that is given by name; the object has its own")
    if config.prompts is not None and conditions is not None:
        raise UserError("conditions: prompts are given too; give one of the two")
    if config.prompts is not None:
        if teacher.family not in FAMILIES:
            raise UserError(
                f"prompts: {teacher.source} is a network alone, and how it takes prompts is not known; "
                "give conditions, examples whose cond has what it is called with"
            )
        encoded, denoiser = open_encoded(config.prompts), copy.copy(teacher.denoiser)  # which gets a null condition
        return _prompted(dataclasses.replace(teacher, denoiser=denoiser), encoded), encoded
    needed = {name: tuple(value.shape[1:]) for name, value in teacher.sample_cond(1).items()}
    if conditions is None and teacher.num_classes is None and (needed or teacher.size):
        what = ", ".join(needed) or "prompts"
        raise UserError(f"conditions: {teacher.source} is conditioned on {what}; give examples whose cond has them")
    if conditions is not None:
        if not isinstance(conditions, Examples) or not len(conditions):
            raise UserError("conditions: give an object with __len__, at least 1, and get(indices) -> Example")
        cond = conditions.get(torch.zeros(1, dtype=torch.int64)).cond
        held = {name: tuple(value.shape[1:]) for name, value in cond.items()}
        if held != needed and (needed or not teacher.size):  # a text-to-image teacher does not say what it takes
            raise UserError(f"conditions: {teacher.source} takes {needed or 'none'}, and the examples have {held}")
    return teacher, conditions


def _settings(teacher: Teacher, config: PairsConfig, conditions: Examples | None) -> dict[str, Any]:
    options = asdict(config)
    if isinstance(conditions, Encoded):
        made = conditions.settings
        source = {"prompts": made["source"], "negative_prompt": made.get("negative_prompt")}
    else:
        source = {} if conditions is None else {"conditions": _content(conditions, config)}
    return {
        "fingerprint": fingerprint(teacher),
        "shape": list(teacher.shape),
        "num_classes": teacher.num_classes,
        "data_std": teacher.denoiser.schedule.data_std,
        **source,
        **{name: options[name] for name in _RECIPE},
        **({} if config.attention == "auto" else {"attention": config.attention}),
    }


def _content(conditions: Examples, config: PairsConfig) -> str:
    """16 hex digits of the conditions that the pairs have."""
    digest = hashlib.blake2b(f"{len(conditions)}".encode(), digest_size=8)
    for indices in torch.arange(min(len(conditions), config.count)).split(config.batch_size):
        for name, value in sorted(conditions.get(indices).cond.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(bytes_of(value))
    return digest.hexdigest()


# -- reading them ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pairs:
    """A finished folder of pairs. Shards are memory-mapped: of a large folder only what is read is in memory."""

    folder: Path
    settings: dict[str, Any]
    shards: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return self.settings["count"]

    def get(self, indices: Tensor) -> Example:
        """The pairs at int64 indices (B,), in that order, and their conditions; IndexError outside 0..len-1."""
        columns = rows(self.shards, self.settings["shard_size"], len(self), indices)
        z, x0 = columns.pop("z"), columns.pop("x0")
        return Example(cond=columns, pair=Pair(z, x0, columns))


def open_pairs(folder: str | Path) -> Pairs:
    """A folder made by `make_pairs`; every shard's checksum is verified. UserError if it is not finished or damaged."""
    folder = Path(folder)
    return Pairs(folder, *open_shards(KIND, folder))


def check_pairs(teacher: Teacher, pairs: Pairs) -> None:
    """UserError unless the pairs are this teacher's."""
    made = pairs.settings
    if tuple(made["shape"]) != tuple(teacher.shape):
        raise UserError(
            f"pairs: {str(pairs.folder)!r} has samples of shape {tuple(made['shape'])}; "
            f"the teacher's are {tuple(teacher.shape)}; make pairs of this teacher"
        )
    own = fingerprint(teacher)
    if (made["fingerprint"], made["num_classes"]) != (own, teacher.num_classes):
        raise UserError(
            f"pairs: {str(pairs.folder)!r} was made with another teacher (fingerprint {made['fingerprint']}, "
            f"{made['num_classes']} classes; this one has {own}, {teacher.num_classes}); make pairs of this one, "
            "with the same teacher_dtype"
        )
