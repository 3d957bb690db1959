"""DiTTransformer2DModel: DiT-XL/2 of ImageNet, in latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Source,
    latent_teacher,
    token_map,
    with_null,
    without_variance,
)
from diffdistill.families._parts import one_side
from diffdistill.families._schedules import schedule_of
from diffdistill.players.teacher import Teacher


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    output = network(x, timestep=time, return_dict=False, **cond)[0]
    return without_variance(output, x)


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    side = one_side(config.sample_size)
    if side is None:
        raise UserError(
            f"teacher: sample_size {config.sample_size} of the DiT is not one number, which its pipeline takes"
        )
    native = side * KL.factor(source.config("vae"))
    if source.resolution not in (None, (native, native)):
        asked = "x".join(map(str, dict.fromkeys(source.resolution)))
        raise UserError(
            f"resolution: {asked} is not the {native} that this DiT makes, and its pipeline takes no size; use {native}"
        )
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            # In training mode each block would drop labels on its own, and a student no longer be a function.
            module.dropout_prob = 0.0
    teacher = latent_teacher(
        "dit",
        network,
        source,
        (config.in_channels, side, side),
        schedule_of(source.scheduler),
        _call,
        num_classes=config.num_embeds_ada_norm,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=token_map,
    )
    with_null(teacher.denoiser, {"class_labels": torch.tensor([config.num_embeds_ada_norm])})
    return teacher


FAMILY = Family(
    "dit",
    "DiT-XL/2",
    ("DiTPipeline",),
    "transformer",
    "DiTTransformer2DModel",
    "classes",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=KL,
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    loads_lora=False,
)
