"""Students of networks that diffusers does not know: their weights beside a record, and how they load again."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import EDM, DiscreteVP, LinearFlow, Schedule, TrigFlow
from diffdistill.errors import UserError, first_line
from diffdistill.players.lora import without_lora
from diffdistill.players.scale_input import plain_network
from diffdistill.players.teacher import Teacher

WEIGHTS = "network.safetensors"
SCHEDULES: dict[str, type] = {kind.__name__: kind for kind in (DiscreteVP, EDM, LinearFlow, TrigFlow)}


def own_record(teacher: Teacher) -> dict[str, Any]:
    """What a student's record says of such a network: enough to sample it, unless it is called in a way of its own.

    `schedule` or `predicts` are None where JSON has no word for them; the student then loads with its teacher alone.
    """
    schedule = teacher.denoiser.schedule
    fields = None
    if type(schedule) in SCHEDULES.values():
        fields = {"name": type(schedule).__name__} | {
            f.name: _plain(getattr(schedule, f.name))
            for f in dataclasses.fields(schedule)  # type: ignore[arg-type]
            if not f.name.startswith("_")
        }
    return {
        "network": teacher.source,
        "shape": list(teacher.shape),
        "schedule": fields,
        "predicts": teacher.scheduler.get("predicts"),
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def save_weights(network: nn.Module, folder: Path) -> None:
    """Write a network's weights, LoRA merged; its class is the user's own."""
    # clone(): tensors that share memory are refused by safetensors.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in plain_network(network).state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def load_own(
    folder: Path, record: dict[str, Any], network: nn.Module | Teacher | None, num_classes: int | None
) -> Teacher:
    """The student in `folder` as a Teacher with the denoiser, on a copy of `network`: a module of the same class with
    any weights, or the teacher that the student was distilled from. UserError where it is another network.
    """
    if network is None:
        raise UserError(
            f"network: {folder} is a student of {record['network']}, which is not in diffusers; load it in Python by "
            "load_student(folder, network=..), which takes the network or its Teacher"
        )
    if isinstance(network, Teacher):
        denoiser = network.denoiser.with_network(_copy(network.denoiser.network), network.denoiser.feature_layer)
    elif record["schedule"] is None or record["predicts"] is None:
        raise UserError(
            "network: the teacher called its network in a way of its own, which the student's record does not hold; "
            "give the Teacher instead of its network"
        )
    else:
        fields = dict(record["schedule"])
        kind = SCHEDULES[fields.pop("name")]
        schedule: Schedule = kind(
            **{k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in fields.items()}
        )
        denoiser = Denoiser(_copy(network), schedule, OUTPUTS[record["predicts"]])
    try:
        denoiser.network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise UserError(f"student: {folder / WEIGHTS} cannot be read ({first_line(error)})") from None
    except RuntimeError as error:
        raise UserError(f"network: {folder} holds the weights of another network ({first_line(error)})") from None
    denoiser.requires_grad_(False).eval()
    return Teacher(denoiser, tuple(record["shape"]), num_classes, "", str(folder))


def _copy(network: nn.Module) -> nn.Module:
    return without_lora(copy.deepcopy(network))
