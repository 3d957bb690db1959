"""CogVideoXTransformer3DModel: videos of CogVideoX and CogVideoX 1.5."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Packing,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    plain_text,
)
from diffdistill.families._flow import latent_frames
from diffdistill.families._schedules import schedule_of
from diffdistill.families.wan import frame_map
from diffdistill.players.teacher import Teacher

_AUTOENCODER = replace(KL, network="AutoencoderKLCogVideoX")


def _frames_first(x: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B, F, C, h, w), and back."""
    return x.transpose(1, 2)


def _call(positions: Any, network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    frames, height, width = x.shape[2:]
    rotary = None
    if positions.transformer.config.use_rotary_positional_embeddings:
        # The pipeline's own function, which reads nothing of it but the config; sizes are those of latents here.
        tables = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
        rotary = tables(positions, height, width, frames, x.device)
    output = network(_frames_first(x), timestep=time, image_rotary_emb=rotary, return_dict=False, **cond)[0]
    return _frames_first(output)


def _length(config: Any, source: Source, frames: int) -> int:
    """Frames of the latents; UserError where they do not fit."""
    ratio, together = source.config("vae")["temporal_compression_ratio"], config.patch_size_t or 1
    length = latent_frames("cogvideox", frames, ratio)
    if length % together:
        # The pipeline would draw more, of which it throws the first away, and data have none for them.
        near = " or ".join(str((length + more) * ratio - ratio + 1) for more in (-1, 1))
        raise UserError(
            f"frames: {frames} are {length} of latents, and this network takes {together} of them together; use {near}"
        )
    return length


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor, patch = _AUTOENCODER.factor(source.config("vae")), config.patch_size
    frames = source.frames or config.sample_frames
    native = config.sample_height * factor, config.sample_width * factor
    size = latent_size("cogvideox", factor, native, source.resolution, max(patch, 8 // factor))
    teacher = latent_teacher(
        "cogvideox",
        network,
        source,
        (config.in_channels, _length(config, source, frames), *size),
        schedule_of(source.scheduler),
        partial(_call, SimpleNamespace(vae_scale_factor_spatial=1, transformer=SimpleNamespace(config=config))),
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        # The text's tokens come second; frames may be patches too.
        feature_map=lambda output, x, cond: frame_map(output[0], x[:, :, :: config.patch_size_t or 1], cond),
    )
    return replace(teacher, size={"num_frames": frames})


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # The network is given no mask and reads the padding.
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


FAMILY = Family(
    "cogvideox",
    "CogVideoX and CogVideoX 1.5, text to video",
    ("CogVideoXPipeline",),
    "transformer",
    "CogVideoXTransformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=_AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    packing=Packing(_frames_first, lambda y, shape: _frames_first(y), dims=5, drawn=True),
    stock_guidance="u + g (c - u), by one g in all steps (without use_dynamic_cfg)",
    videos=True,
)
