"""FluxTransformer2DModel: FLUX.1-dev, which takes the guidance scale as an input, and FLUX.1-schnell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    PATCHES,
    Family,
    Prompt,
    Source,
    Text,
    latent_size,
    latent_teacher,
    middle_block,
    pack,
    token_map,
    unpack,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule
from diffdistill.players.teacher import Teacher


def image_ids(height: int, width: int, device: torch.device, first: int = 0) -> Tensor:
    """(height width, 3) `first`, row and column of each token."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.stack([torch.full_like(rows, first), rows, columns], 1).float()


def caller(takes_guidance: bool) -> Call:
    """The call of a network that takes the guidance scale as an input, or does not.

    The latents of an image that is to be changed, `image_latents` among the conditions, are tokens after the sample's.
    """

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, image = cond["encoder_hidden_states"], cond.get("image_latents")
        tokens, ids = pack(x), image_ids(x.shape[2] // 2, x.shape[3] // 2, x.device)
        count = tokens.shape[1]
        if image is not None:
            tokens = torch.cat([tokens, pack(image.to(x))], 1)
            ids = torch.cat([ids, image_ids(image.shape[2] // 2, image.shape[3] // 2, x.device, 1)])
        output = network(
            tokens,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_projections"],
            timestep=time / 1000,
            img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            guidance=cond["guidance"] if takes_guidance else None,
            return_dict=False,
        )[0]
        return unpack(output[:, :count], x.shape[1:])

    return call


def sample_map(output: Any, x: Tensor, cond: Cond) -> Tensor:
    """`token_map` of a block whose tokens of the sample are followed by those of another image."""
    tokens = output[-1] if isinstance(output, tuple) else output
    return token_map(tokens[:, : x.shape[2] * x.shape[3] // 4], x, cond)


def flux_teacher(name: str, network: Any, source: Source) -> Teacher:
    """The teacher of a family whose network is FLUX.1's."""
    config = network.config
    factor = KL.factor(source.config("vae"))
    size = latent_size(name, factor, 128 * factor, source.resolution, 2)
    return latent_teacher(
        name,
        network,
        source,
        (config.in_channels // 4, *size),
        flow_schedule(source.scheduler, "given", size[0] * size[1] // 4),
        caller(config.guidance_embeds),
        feature_layer=middle_block(
            ("transformer_blocks", config.num_layers), ("single_transformer_blocks", config.num_single_layers)
        ),
        feature_map=sample_map,
    )


def _teacher(network: Any, source: Source) -> Teacher:
    return flux_teacher("flux", network, source)


def encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    """The network's conditions of n prompts: both text encoders', and the guidance scale."""
    embeds, pooled, _ = pipe.encode_prompt(list(prompts))
    # Schnell is given it too and its call drops it: the network that would say so need not be loaded here.
    guidance = torch.full((len(prompts),), prompt.guidance, device=embeds.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "guidance": guidance}


def null(pipe: Any, prompt: Prompt) -> Cond:
    """Those of "no prompt", (1, ...) each."""
    # Without the guidance, so that a prompt keeps its own.
    return {key: value for key, value in encode(pipe, [prompt.negative or ""], prompt).items() if key != "guidance"}


FAMILY = Family(
    "flux",
    "FLUX.1-dev and FLUX.1-schnell",
    ("FluxPipeline",),
    "transformer",
    "FluxTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=KL,
    text=Text(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), encode, null),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 3.5},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ""},
    packing=PATCHES,
    flow_grid="given",
    stock_guidance="guidance_scale is an input of the network; true_cfg_scale g: u + g (c - u)",
    single_file=True,
)
