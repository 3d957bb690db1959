"""Diffusers families: how a saved pipeline becomes a teacher, and a network a pipeline again.

To add a family, add an entry to FAMILIES: which pipeline classes it covers, which sub-folder holds the
network, how the teacher is read from that, and which stock pipeline a student of it is saved as.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .errors import UserError
from .guidance_adapters import load_adapters
from .players import FewStepSampler, Teacher
from .prediction import ROWS, Row, edm_boundary
from .schedule import EDM, DiscreteVP, LinearFlow, Schedule

METADATA = "diffdistill.json"
"""Beside model_index.json, what diffusers' configs cannot say: classes, null class, student levels."""

_VP = {
    *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LMSDiscreteScheduler", "TCDScheduler", "LCMScheduler"),
}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"}


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, Row]:
    """The schedule and output row of a diffusers scheduler config (with its `_class_name`).

    Raises UserError for a scheduler or prediction type that is not supported.
    """
    name = config.get("_class_name", "")
    kind = config.get("prediction_type", "epsilon")
    for option in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(option):
            raise UserError(f"scheduler: {option} is not supported; set it to false")
    if config.get("timestep_type") == "continuous":
        raise UserError("scheduler: timestep_type 'continuous' is not supported; use 'discrete'")
    if name in _FLOW or (name in _VP and config.get("use_flow_sigmas")):
        if name in _VP and kind != "flow_prediction":
            raise UserError(f"scheduler: use_flow_sigmas with prediction_type {kind!r}; flow_prediction is supported")
        count = config.get("num_train_timesteps", 1000)
        shift = config.get("shift", 1.0) if name in _FLOW else config.get("flow_shift", 1.0)
        return LinearFlow(shift, time_scale=count, train_timesteps=count), ROWS["flow_prediction"]
    if name == "CMStochasticIterativeScheduler":
        low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
        edm = EDM(low, high, config.get("sigma_data", 0.5), config.get("rho", 7.0), 250.0, unit_init=False)
        return edm, edm_boundary(low)
    if name in _EDM:
        low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"scheduler: prediction_type {kind!r} is not EDM's; use epsilon or v_prediction")
        row = ROWS["edm"] if kind == "epsilon" else _negated(ROWS["edm"])
        return EDM(low, high, config.get("sigma_data", 0.5), config.get("rho", 7.0)), row
    if name in _VP:
        if kind not in ("epsilon", "sample", "v_prediction"):
            known = "epsilon, sample or v_prediction"
            raise UserError(f"scheduler: prediction_type {kind!r} is not supported; use {known}")
        schedule = DiscreteVP.from_config(config)
        if kind == "epsilon" and float(schedule.alphas_cumprod[-1]) <= 0:
            raise UserError("scheduler: epsilon says nothing of x0 at zero terminal SNR; use v_prediction")
        return schedule, ROWS[kind]
    known = ", ".join(sorted(_VP | _FLOW | _EDM))
    raise UserError(f"scheduler: {name or 'no _class_name'!r} is not supported; supported are {known}")


def _negated(row: Row) -> Row:
    def negative(alpha: Tensor, sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
        a, b = row(alpha, sigma, data_std)
        return -a, -b

    return negative


@dataclass(frozen=True)
class Family:
    """One entry: `read` makes the teacher of a folder, `pipeline` wraps a network for saving."""

    name: str
    pipelines: tuple[str, ...]  #: `_class_name`s in model_index.json
    component: str  #: the sub-folder of the network
    read: Callable[[Path, dict[str, Any], dict[str, Any]], Teacher]
    pipeline: Callable[[nn.Module, SchedulerMixin], DiffusionPipeline]


def _unet2d(folder: Path, scheduler: dict[str, Any], meta: dict[str, Any]) -> Teacher:
    network = _load_model(UNet2DModel, folder / "unet")
    return unet2d_teacher(network, scheduler, meta)


def unet2d_teacher(network: UNet2DModel, scheduler: dict[str, Any], meta: dict[str, Any]) -> Teacher:
    """A teacher from a UNet2DModel, its scheduler's config and `{"null_class": int}` where it has one."""
    config = network.config
    if config.in_channels != config.out_channels:
        raise UserError(
            f"teacher: the UNet predicts {config.out_channels} channels from {config.in_channels}; "
            "networks that learn a variance are not supported"
        )
    if config.class_embed_type is not None:
        raise UserError(f"teacher: class_embed_type {config.class_embed_type!r} is not supported; use null")
    schedule, row = schedule_of(scheduler)
    # Convolutions run 1.6 times as fast this way round on a CPU, and no slower on a GPU.
    network.to(memory_format=torch.channels_last)
    null_class = meta.get("null_class")
    num_classes = config.num_class_embeds
    if null_class is not None:
        if num_classes is None or null_class != num_classes - 1:
            raise UserError(f"null_class: {null_class} is not the last of the teacher's {num_classes or 0} labels")
        num_classes -= 1

    def null(cond: Cond) -> Cond:
        return {"class_labels": torch.full_like(cond["class_labels"], int(null_class or 0))}

    def call(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if config.time_embedding_type == "learned":
            time = time.round().long()  # an index into a table
        return module(x, time, return_dict=False, **cond)[0]

    denoiser = Denoiser(
        network,
        schedule,
        row,
        call=call,
        null=None if null_class is None else null,
        feature_layer="mid_block" if network.mid_block is not None else None,
    )
    size = config.sample_size
    if not isinstance(size, int):
        raise UserError(f"teacher: sample_size {size} of the UNet is not one number, which its pipelines take")
    return Teacher(denoiser, (config.in_channels, size, size), num_classes, "unet2d", "", scheduler)


def new_unet2d(
    shape: tuple[int, int, int],
    num_classes: int | None,
    scheduler: dict[str, Any],
    *,
    widths: tuple[int, ...],
    layers: int,
    attention: tuple[int, ...],
    dropout: float,
) -> Teacher:
    """An untrained class-conditional UNet2DModel with one label more than classes, which means no class."""
    levels = range(len(widths))
    network = UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
        norm_num_groups=8,
        attention_head_dim=min(*widths, 32),
        dropout=dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    return unet2d_teacher(network, scheduler, {} if num_classes is None else {"null_class": num_classes})


def _unet2d_pipeline(network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
    # The one stock pipeline that takes class labels or none, scales noise and input as the scheduler says,
    # and makes one step by default.
    return diffusers.ConsistencyModelPipeline(unet=network, scheduler=scheduler)


FAMILIES = {
    "unet2d": Family(
        "unet2d",
        ("ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline", "AdaptedPipeline"),
        "unet",
        _unet2d,
        _unet2d_pipeline,
    )
}

_EMBEDDED = {"digits": Path(__file__).parent / "assets" / "digits-teacher"}


def load_teacher(path_or_hub_id: str | Path, *, null_class: int | None = None) -> Teacher:
    """A teacher from a diffusers folder, a hub id, or 'digits', the one embedded in this package.

    `null_class` is the class label that the teacher learned as "no class"; a folder made by diffdistill
    says it itself. Only safetensors are read. Raises UserError for whatever cannot be used.
    """
    folder = _folder(str(path_or_hub_id))
    index = _read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if isinstance(name, list):  # of a file in the folder, [file, class]
        name = name[-1]
    family = next((f for f in FAMILIES.values() if name in f.pipelines), None)
    if family is None:
        known = ", ".join(p for f in FAMILIES.values() for p in f.pipelines)
        raise UserError(f"teacher: pipeline class {name!r} is not supported; supported are {known}")
    meta = read_metadata(folder)
    if null_class is not None:
        meta["null_class"] = null_class
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    teacher = replace(family.read(folder, scheduler, meta), source=str(path_or_hub_id))
    teacher.denoiser.requires_grad_(False).eval()
    return teacher


def _folder(name: str) -> Path:
    if name in _EMBEDDED:
        return _EMBEDDED[name]
    path = Path(name)
    if path.is_dir():
        return path
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists()
    if not looks_like_hub_id:
        raise UserError(f"teacher: {name!r} is not a folder; give a diffusers folder, a hub id or 'digits'")
    from huggingface_hub import snapshot_download

    patterns = [
        "model_index.json",
        METADATA,
        "scheduler/*",
        "adapter/*",
        *(f"{f.component}/*" for f in FAMILIES.values()),
    ]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.bin", "*.msgpack"]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = _first_line(error)
        raise UserError(f"teacher: {name!r} is no folder here, nor could it be had from the hub ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"teacher: {path} is missing; a diffusers folder must have it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} is not readable JSON ({error})") from None


def _load_model(model: type[UNet2DModel], folder: Path) -> UNet2DModel:
    """Read a diffusers model; a missing or damaged file is named."""
    from safetensors import SafetensorError, safe_open

    config = _read_json(folder / "config.json")
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
        network = model.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"teacher: {folder} does not load as {model.__name__} ({_first_line(error)})") from error
    return network


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_metadata(path_or_hub_id: str | Path) -> dict[str, Any]:
    """What diffdistill wrote into the folder beside diffusers' own files; empty if it did not make it."""
    path = _folder(str(path_or_hub_id)) / METADATA
    return _read_json(path) if path.is_file() else {}


def is_student(path_or_hub_id: str | Path) -> bool:
    """Whether the folder is a student exported by diffdistill."""
    return "levels" in read_metadata(path_or_hub_id)


def load_student(path_or_hub_id: str | Path) -> tuple[FewStepSampler, Teacher]:
    """A student's sampler from an exported folder, and its shape and classes as a Teacher.

    Raises UserError if the folder was not exported by diffdistill.
    """
    described, meta = load_teacher(path_or_hub_id), read_metadata(path_or_hub_id)
    if "levels" not in meta:
        raise UserError(
            f"student: {str(path_or_hub_id)!r} has no levels in {METADATA}; it is no student of diffdistill"
        )
    adapters = _folder(str(path_or_hub_id)) / "adapter"
    if adapters.is_dir():
        described = replace(described, denoiser=load_adapters(adapters, described.denoiser))
    return FewStepSampler(described.denoiser, meta["levels"], renoise=meta["renoise"]), described
