"""Lumina2Transformer2DModel: Lumina-Image 2.0, with its system prompt before each prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    Text,
    check_positions,
    latent_size,
    latent_teacher,
    native_pixels,
    padded_with_zeros,
    token_map,
)
from diffdistill.families._flow import flow_schedule
from diffdistill.players.teacher import Teacher


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # Its time runs from noise to data, and so does its velocity. It reads the captions' lengths from their mask.
    return -network(x, timestep=1 - time / 1000, return_dict=False, **cond)[0]


def _rescale(guided: Tensor, conditional: Tensor) -> Tensor:
    """The guided velocity as long as the conditional one in every row of latent pixels."""
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _image_map(output: Tensor, x: Tensor, cond: Cond) -> Tensor:
    # The image's tokens stand right behind the caption's, whose number is each caption's own.
    behind = cond["encoder_attention_mask"].sum(1, keepdim=True)
    places = behind + torch.arange(x.shape[2] * x.shape[3] // 4, device=behind.device)
    return token_map(output.gather(1, places.unsqueeze(2).expand(-1, -1, output.shape[2])), x, cond)


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = KL.factor(source.config("vae"))
    native = native_pixels(config.sample_size, factor, source.resolution)
    size = latent_size("lumina2", factor, native, source.resolution, config.patch_size)
    check_positions(size, min(config.axes_lens[1:]) * config.patch_size, factor)
    return latent_teacher(
        "lumina2",
        network,
        source,
        (config.in_channels, *size),
        # The pipeline takes the number of channels for that of tokens, where the shift depends on it.
        flow_schedule(source.scheduler, "given", config.in_channels),
        _call,
        feature_layer=f"layers.{config.num_layers // 2}",
        feature_map=_image_map,
        rescale=_rescale,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": padded_with_zeros(embeds, mask), "encoder_attention_mask": mask.bool()}


def _null(pipe: Any, prompt: Prompt) -> Cond:
    # Without the system prompt, which the pipeline has before a prompt alone.
    _, _, embeds, mask = pipe.encode_prompt([""], negative_prompt=[prompt.negative or ""])
    return {"encoder_hidden_states": padded_with_zeros(embeds, mask), "encoder_attention_mask": mask.bool()}


FAMILY = Family(
    "lumina2",
    "Lumina-Image 2.0",
    ("Lumina2Pipeline",),
    "transformer",
    "Lumina2Transformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=Text(("tokenizer", "text_encoder"), _encode, _null),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    flow_grid="given",
    stock_guidance="u + g (c - u), as long as c in every row of latents, in all steps (cfg_trunc_ratio 1)",
    single_file=True,
)
