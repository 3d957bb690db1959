"""Kandinsky5Transformer3DModel: Kandinsky 5, text to video.

Its network has rotary queries and keys in bfloat16 whatever the type of its weights, as the stock one that a student is
exported as: in float32 a finite difference of it sees these steps, and the gradient of a Jacobian-vector product is
right to 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.denoiser import Call, Cond
from diffdistill.errors import UserError
from diffdistill.families._family import (
    KL,
    Family,
    Packing,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    plain_text,
)
from diffdistill.families._flow import flow_schedule, latent_frames
from diffdistill.families.wan import frame_map
from diffdistill.players.teacher import Teacher

_SIZE, _FRAMES = (512, 768), 121  #: of the pipeline's own call
_WORDS = 512  #: tokens of a prompt at most, as the pipeline's own call
_NEGATIVE = (  # which the pipeline takes where it is given none
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
_AUTOENCODER = replace(
    KL, factor=lambda config: config["spatial_compression_ratio"], network="AutoencoderKLHunyuanVideo"
)


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B, F, h, w, C)."""
    return x.movedim(1, -1)


def _scales(height: int, width: int) -> tuple[float, float, float]:
    """What positions are divided by, of a video of that size in pixels, as the pipeline has it."""
    near = all(480 <= side <= 854 for side in (height, width))
    return (1, 2, 2) if near else (1, 3.16, 3.16)


def _caller(conditioned: bool, scales: tuple[float, float, float]) -> Call:
    """The call of a network that reads a first image and its mask besides, here none, where it is `conditioned`."""

    def call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        # It has no mask of words: prompts of a call have one length, to which they are cut.
        text, lengths = cond["encoder_hidden_states"], cond["lengths"]
        text = text if lengths.is_meta else text[:, : int(lengths[0])]
        latents = _channels_last(x)
        if conditioned:
            latents = F.pad(latents, (0, x.shape[1] + 1))
        frames, height, width = x.shape[2:]
        output = network(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=time,
            pooled_projections=cond["pooled_projections"],
            visual_rope_pos=[torch.arange(count, device=x.device) for count in (frames, height // 2, width // 2)],
            text_rope_pos=torch.arange(text.shape[1], device=x.device),
            scale_factor=scales,
            return_dict=False,
        )
        return output.movedim(-1, 1)

    return call


def _teacher(network: Any, source: Source) -> Teacher:
    config, vae = network.config, source.config("vae")
    if config.attention_type != "regular":
        raise UserError(
            f"teacher: the network's attention_type is {config.attention_type!r}, of which blocks are left out by its "
            "own queries; one with 'regular' is read"
        )
    frames, factor = source.frames or _FRAMES, _AUTOENCODER.factor(vae)
    length = latent_frames("kandinsky5", frames, vae["temporal_compression_ratio"])
    size = latent_size("kandinsky5", factor, _SIZE, source.resolution, 2)
    teacher = latent_teacher(
        "kandinsky5",
        network,
        source,
        (config.in_visual_dim, length, *size),
        flow_schedule(source.scheduler, "own"),
        _caller(config.visual_cond, _scales(size[0] * factor, size[1] * factor)),
        feature_layer=f"visual_transformer_blocks.{config.num_visual_blocks // 2}",
        feature_map=frame_map,
        lengths=lambda cond: cond["lengths"],
    )
    return replace(teacher, size={"num_frames": frames})


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # One by one: the text encoder is given no mask either.
    rows = [pipe.encode_prompt([text], max_sequence_length=_WORDS)[:2] for text in prompts]
    return {
        "encoder_hidden_states": torch.cat([F.pad(words, (0, 0, 0, _WORDS - words.shape[1])) for words, _ in rows]),
        "pooled_projections": torch.cat([pooled for _, pooled in rows]),
        "lengths": torch.tensor([words.shape[1] for words, _ in rows], device=rows[0][0].device),
    }


FAMILY = Family(
    "kandinsky5",
    "Kandinsky 5, text to video",
    ("Kandinsky5T2VPipeline",),
    "transformer",
    "Kandinsky5Transformer3DModel",
    "text",
    _teacher,
    lora_targets=("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    autoencoder=_AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"), _encode, negative=_NEGATIVE),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    packing=Packing(_channels_last, lambda y, shape: y.movedim(-1, 1), dims=5, drawn=True),
    videos=True,
)
