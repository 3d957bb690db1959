"""UNet2DModel: DDPM and DDIM pipelines, and EDM's networks as ConsistencyModelPipeline has them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.schedule import DiscreteVP, Schedule
from diffdistill.errors import UserError, shown
from diffdistill.families._family import Family
from diffdistill.families._parts import one_side
from diffdistill.families._schedules import schedule_of
from diffdistill.players.teacher import Teacher


def unet2d_teacher(network: UNet2DModel, scheduler: dict[str, Any], null_class: int | None) -> Teacher:
    """A teacher from a UNet2DModel, its scheduler's config and the label that means "no class", if there is one."""
    config = network.config
    if config.in_channels != config.out_channels:
        raise UserError(
            f"teacher: the UNet predicts {config.out_channels} channels from {config.in_channels}; "
            "networks that learn a variance are not supported"
        )
    if config.class_embed_type is not None:
        raise UserError(f"teacher: class_embed_type {config.class_embed_type!r} is not supported; use null")
    schedule, row = schedule_of(scheduler)
    _check_table(config, schedule)
    # Convolutions run 1.6 times as fast this way round on a CPU, and no slower on a GPU.
    network.to(memory_format=torch.channels_last)
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
    size = one_side(config.sample_size)
    if size is None:
        raise UserError(
            f"teacher: the UNet's sample_size is {shown(config.sample_size)}; it must be one whole number, which its "
            "pipelines take; write it into unet/config.json"
        )
    network.register_to_config(sample_size=size)  # of a list of two, which not all pipelines take
    return Teacher(denoiser, (config.in_channels, size, size), num_classes, "unet2d", "", scheduler)


def _check_table(config: Any, schedule: Schedule) -> None:
    """UserError for a table of time embeddings that has not the scheduler's timesteps."""
    if config.time_embedding_type != "learned":
        return
    steps = len(schedule.alphas_cumprod) if isinstance(schedule, DiscreteVP) else None
    if steps is None or (config.num_train_timesteps or 0) < steps:
        raise UserError(
            f"teacher: the UNet's learned time embedding has {config.num_train_timesteps} timesteps, and its scheduler "
            f"{'has none' if steps is None else steps}; give the scheduler that it was trained with"
        )


def new_unet2d(
    shape: tuple[int, ...],
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
    return unet2d_teacher(network, scheduler, num_classes)


# Exported as the one stock pipeline that takes class labels or none, scales noise and input as the scheduler says,
# and makes one step by default.
FAMILY = Family(
    "unet2d",
    "DDPM, DDIM and consistency models in pixels",
    ("ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline", "AdaptedPipeline"),
    "unet",
    "UNet2DModel",
    "classes",
    lambda network, source: unet2d_teacher(network, source.scheduler, source.null_class),
    guided=None,
    loads_lora=False,
)
