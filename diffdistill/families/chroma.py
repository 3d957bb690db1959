"""ChromaTransformer2DModel: Chroma, which is FLUX.1 without pooled text, guided, and with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    PATCHES,
    Family,
    Prompt,
    Source,
    last_tokens_map,
    latent_size,
    latent_teacher,
    middle_block,
    pack,
    plain_text,
    unpack,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule
from diffdistill.families.flux import image_ids
from diffdistill.players.teacher import Teacher


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    text, mask = cond["encoder_hidden_states"], cond["attention_mask"]
    tokens = pack(x)
    output = network(
        tokens,
        encoder_hidden_states=text,
        timestep=time / 1000,
        img_ids=image_ids(x.shape[2] // 2, x.shape[3] // 2, x.device),
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
        attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
        return_dict=False,
    )[0]
    return unpack(output, x.shape[1:])


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = KL.factor(source.config("vae"))
    size = latent_size("chroma", factor, 128 * factor, source.resolution, 2)
    return latent_teacher(
        "chroma",
        network,
        source,
        (config.in_channels // 4, *size),
        flow_schedule(source.scheduler, "given", size[0] * size[1] // 4),
        _call,
        feature_layer=middle_block(
            ("transformer_blocks", config.num_layers), ("single_transformer_blocks", config.num_single_layers)
        ),
        feature_map=last_tokens_map(2),
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # The mask is one of numbers, which attention adds: what it hides is still heard a little, and is kept.
    embeds, _, mask, _, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "attention_mask": mask}


FAMILY = Family(
    "chroma",
    "Chroma",
    ("ChromaPipeline",),
    "transformer",
    "ChromaTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    packing=PATCHES,
    flow_grid="given",
    single_file=True,
)
