"""UNet2DConditionModel: Stable Diffusion 1 and 2, and what is fine-tuned from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffdistill.core.denoiser import Call, Cond
from diffdistill.errors import UserError, shown
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    native_pixels,
    plain_text,
)
from diffdistill.families._schedules import schedule_of
from diffdistill.players.scale_input import take_scale
from diffdistill.players.teacher import Teacher


def unet_teacher(
    family: str, call: Call, addition: str | None = None, reads_image: bool = False
) -> Callable[[Any, Source], Teacher]:
    """How a UNet2DConditionModel becomes the teacher of such a family; `addition` is its addition_embed_type.

    `reads_image`: behind the sample's channels it has those of another image's latents.
    """

    def teacher(network: Any, source: Source) -> Teacher:
        config, vae = network.config, source.config("vae")
        if config.time_cond_proj_dim is not None and source.guidance_scale is None:
            raise UserError(
                "teacher: a UNet that takes the guidance scale as an input (time_cond_proj_dim) is not supported"
            )
        _check_inputs(config, family, addition, KL.channels(vae))
        if vae.get("latents_mean") is not None:
            raise UserError("teacher: a VAE with latents_mean is not supported; use one with a scaling_factor alone")
        factor = KL.factor(vae)
        # The pipeline takes multiples of 8 pixels, whatever its autoencoder.
        native = native_pixels(config.sample_size, factor, source.resolution)
        size = latent_size(family, factor, native, source.resolution, max(1, 8 // factor))
        shape = (config.in_channels - (KL.channels(vae) if reads_image else 0), *size)
        layer = "mid_block" if network.mid_block is not None else None
        schedule = schedule_of(source.scheduler)
        made = latent_teacher(family, network, source, shape, schedule, call, feature_layer=layer)
        if config.time_cond_proj_dim is not None and source.guidance_scale is not None:
            take_scale(made.denoiser, source.guidance_scale, config.time_cond_proj_dim)
        return made

    return teacher


def _check_inputs(config: Any, family: str, addition: str | None, channels: int) -> None:
    """UserError for a UNet that takes more than the family's pipeline gives, or makes more than latents."""
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if (value := getattr(config, name)) is not None:
            raise UserError(f"teacher: a UNet with {name} {shown(value)} is not supported; use null")
    if config.addition_embed_type != addition:
        own = shown(config.addition_embed_type)
        raise UserError(f"teacher: the UNet's addition_embed_type is {own}; that of {family} is {shown(addition)}")
    if config.out_channels != channels:
        raise UserError(
            f"teacher: the UNet makes {config.out_channels} channels and the VAE takes {channels}; "
            "networks that learn a variance are not supported"
        )


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, time, return_dict=False, **cond)[0]


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, False)
    return {"encoder_hidden_states": embeds}


FAMILY = Family(
    "stable_diffusion",
    "Stable Diffusion 1 and 2",
    ("StableDiffusionPipeline",),
    "unet",
    "UNet2DConditionModel",
    "text",
    unet_teacher("stable_diffusion", _call),
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    single_file=True,
)
