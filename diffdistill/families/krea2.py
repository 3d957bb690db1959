"""Krea2Transformer2DModel: Krea 2, the base model and the one of few steps, in Qwen-Image's latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond
from diffdistill.families._family import (
    ATTENTION,
    PATCHES,
    Family,
    Prompt,
    Source,
    last_tokens_map,
    latent_size,
    latent_teacher,
    pack,
    padded_with_zeros,
    plain_text,
    unpack,
)
from diffdistill.families._flow import flow_schedule
from diffdistill.families.flux import image_ids
from diffdistill.families.qwen_image import AUTOENCODER
from diffdistill.players.teacher import Teacher


def _caller(layers: int) -> Call:
    """The call of a network that reads so many layers of each word."""

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text = cond["encoder_hidden_states"]
        words = torch.zeros(text.shape[1], 3, device=x.device)
        output = network(
            pack(x),
            encoder_hidden_states=text.unflatten(2, (layers, -1)),
            timestep=time / 1000,
            position_ids=torch.cat([words, image_ids(x.shape[2] // 2, x.shape[3] // 2, x.device)]),
            encoder_attention_mask=cond["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return unpack(output, x.shape[1:])

    return call


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = AUTOENCODER.factor(source.config("vae"))
    size = latent_size("krea2", factor, 1024, source.resolution, 2)
    scheduler = source.scheduler
    if source.parts.get("is_distilled") and scheduler.get("use_dynamic_shifting"):
        # The pipeline shifts the distilled model by one number, whatever the size.
        scheduler = {**scheduler, "use_dynamic_shifting": False, "shift": math.exp(1.15)}
    return latent_teacher(
        "krea2",
        network,
        source,
        (config.in_channels // 4, *size),
        flow_schedule(scheduler, "given", size[0] * size[1] // 4),
        _caller(config.num_text_layers),
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=last_tokens_map(2),
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask = pipe.encode_prompt(list(prompts))
    # The pipeline has its padding before the template's last words. Words have no position, so that they may stand in
    # front, and the padding, which the mask hides, is not stored.
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    rows = embeds.flatten(2)
    rows = rows.gather(1, order.unsqueeze(2).expand_as(rows))
    mask = mask.gather(1, order)
    return {"encoder_hidden_states": padded_with_zeros(rows, mask), "encoder_attention_mask": mask}


FAMILY = Family(
    "krea2",
    "Krea 2",
    ("Krea2Pipeline",),
    "transformer",
    "Krea2Transformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 0.0},
    guided=lambda scale: {"guidance_scale": scale - 1},
    packing=PATCHES,
    flow_grid="given",
    stock_guidance="c + g (c - u)",
    single_file=True,
)
