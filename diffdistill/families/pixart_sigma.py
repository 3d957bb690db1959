"""PixArtTransformer2DModel: PixArt-Sigma."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from diffdistill.core.denoiser import Call, Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    native_pixels,
    padded_with_zeros,
    plain_text,
    token_map,
    without_variance,
)
from diffdistill.families._schedules import schedule_of
from diffdistill.players.teacher import Teacher


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    added = {"resolution": None, "aspect_ratio": None}  # PixArt-Alpha's, which Sigma no longer has
    output = network(x, timestep=time, added_cond_kwargs=added, return_dict=False, **cond)[0]
    return without_variance(output, x)


def teacher_of(family: str, call: Call, network: Any, source: Source) -> Teacher:
    """The teacher of a network that is called so."""
    config, factor = network.config, KL.factor(source.config("vae"))
    native = native_pixels(config.sample_size, factor, source.resolution)
    # The pipeline takes multiples of 8 pixels, whatever its autoencoder.
    size = latent_size(family, factor, native, source.resolution, max(config.patch_size, 8 // factor))
    return latent_teacher(
        family,
        network,
        source,
        (config.in_channels, *size),
        schedule_of(source.scheduler),
        call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=token_map,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # Without clean_caption, whose result depends on whether bs4 and ftfy are installed.
    embeds, mask, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, clean_caption=False)
    return {"encoder_hidden_states": padded_with_zeros(embeds, mask), "encoder_attention_mask": mask}


FAMILY = Family(
    "pixart_sigma",
    "PixArt-Sigma",
    ("PixArtSigmaPipeline",),
    "transformer",
    "PixArtTransformer2DModel",
    "text",
    partial(teacher_of, "pixart_sigma", _call),
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    loads_lora=False,
)
