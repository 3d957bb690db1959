"""AuraFlowTransformer2DModel: AuraFlow."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    check_positions,
    last_tokens_map,
    latent_size,
    latent_teacher,
    middle_block,
    native_pixels,
    plain_text,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule
from diffdistill.players.teacher import Teacher


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, timestep=time / 1000, return_dict=False, **cond)[0]


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = KL.factor(source.config("vae"))
    native = native_pixels(config.sample_size, factor, source.resolution)
    size = latent_size("aura_flow", factor, native, source.resolution, 2)
    check_positions(size, math.isqrt(config.pos_embed_max_size) * config.patch_size, factor)
    return latent_teacher(
        "aura_flow",
        network,
        source,
        (config.in_channels, *size),
        flow_schedule(source.scheduler, "own"),
        _call,
        feature_layer=middle_block(
            ("joint_transformer_blocks", config.num_mmdit_layers),
            ("single_transformer_blocks", config.num_single_dit_layers),
        ),
        feature_map=last_tokens_map(config.patch_size),
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # Zeros where the tokenizer's mask has them; the network is given no mask and reads them.
    embeds, _, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


FAMILY = Family(
    "aura_flow",
    "AuraFlow",
    ("AuraFlowPipeline",),
    "transformer",
    "AuraFlowTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    single_file=True,
)
