"""HunyuanVideo15Transformer3DModel: HunyuanVideo 1.5, text to video; its guidance is a part of its folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond
from diffdistill.families._family import (
    ATTENTION,
    Autoencoder,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    padded_with_zeros,
    plain_text,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule, latent_frames
from diffdistill.families.wan import frame_map
from diffdistill.players.teacher import Teacher

_SIZES = {640: (480, 848), 960: (720, 1280)}  #: height and width of the 480p and the 720p model, by their target_size
_FRAMES = 121  #: the pipeline's own


def _cut(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (n, L, D) and mask (n, L) without the tokens at the end that no row looks at; one is left."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    length = max(int((mask.bool().any(0) * places).max()), 1)
    return embeds[:, :length], mask[:, :length]


def _caller(width: int) -> Call:
    """The call of a network that takes images' tokens of that width."""

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        # A first frame, and the mask of what is known of it.
        nothing = x.new_zeros(len(x), x.shape[1] + 1, *x.shape[2:])
        # Two inputs meet a layer norm first, which on a CPU takes no float32 beside weights of half precision.
        kind, half = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            half = torch.get_autocast_dtype(kind)
        # The pipeline has 729 tokens of an image that is zeros, and 1256 of a prompt. The network sorts them by their
        # masks, which it reads, and nothing looks at the rest: a small video spends nearly all of its time on them.
        image = x.new_zeros(len(x), 1, width, dtype=half)
        text, mask = _cut(cond["encoder_hidden_states"], cond["encoder_attention_mask"])
        glyphs, glyph_mask = _cut(cond["encoder_hidden_states_2"].to(half), cond["encoder_attention_mask_2"])
        return network(
            torch.cat([x, nothing], 1),
            timestep=time,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=glyph_mask,
            image_embeds=image,
            return_dict=False,
        )[0]

    return call


def _teacher(network: Any, source: Source) -> Teacher:
    config, vae = network.config, source.config("vae")
    frames = source.frames or _FRAMES
    length = latent_frames("hunyuan_video15", frames, vae["temporal_compression_ratio"])
    native, factor = _SIZES.get(config.target_size, _SIZES[640]), AUTOENCODER.factor(vae)
    height, width = latent_size("hunyuan_video15", factor, native, source.resolution)
    teacher = latent_teacher(
        "hunyuan_video15",
        network,
        source,
        (config.out_channels, length, height, width),
        flow_schedule(source.scheduler, "given"),
        _caller(config.image_embed_dim),
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=lambda output, x, cond: frame_map(output[0], x, cond),  # the text's tokens come second
    )
    return replace(teacher, size={"num_frames": frames})


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask, glyphs, glyph_mask = pipe.encode_prompt(list(prompts), batch_size=len(prompts))
    return {
        "encoder_hidden_states": padded_with_zeros(embeds, mask),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": padded_with_zeros(glyphs, glyph_mask),
        "encoder_attention_mask_2": glyph_mask,
    }


def _steer(pipe: Any, scale: float) -> None:
    if pipe.guider is not None:  # of a pipeline without its other parts
        pipe.guider = pipe.guider.new(guidance_scale=scale)


def _from_videos(vae: Any, videos: Tensor) -> Tensor:
    # One by one: the mask of its attention is that of one video.
    latents = torch.cat([vae.encode(video).latent_dist.mode() for video in videos.split(1)])
    return latents * vae.config.scaling_factor


def _to_videos(vae: Any, latents: Tensor) -> Tensor:
    return torch.cat([vae.decode(one).sample for one in (latents / vae.config.scaling_factor).split(1)])


AUTOENCODER = Autoencoder(
    lambda config: config["spatial_compression_ratio"],
    _from_videos,
    _to_videos,
    network="AutoencoderKLHunyuanVideo15",
    numbers=("scaling_factor", "temporal_compression_ratio"),
)

FAMILY = Family(
    "hunyuan_video15",
    "HunyuanVideo 1.5, text to video",
    ("HunyuanVideo15Pipeline",),
    "transformer",
    "HunyuanVideo15Transformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), _encode),
    guided=lambda scale: {},
    steer=_steer,
    settings={"guider/guider_config.json": {"guidance_scale": 1.0}},
    flow_grid="given",
    stock_guidance="u + g (c - u); g is that of guider/",
    loads_lora=False,
    videos=True,
)
