"""FluxTransformer2DModel: FLUX.1 Kontext, which changes an image as a prompt says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ATTENTION, KL, PATCHES, Family, Prompt, Source, Text
from diffdistill.families._flow import ADDED_ATTENTION
from diffdistill.families.flux import encode, flux_teacher, null
from diffdistill.players.teacher import Teacher


def _teacher(network: Any, source: Source) -> Teacher:
    teacher = flux_teacher("flux_kontext", network, source)
    height, width = (side * KL.factor(source.config("vae")) for side in teacher.shape[-2:])
    # The pipeline's call takes height and width for a ratio, of images with that area.
    return replace(teacher, size={"max_area": height * width})


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    assert prompt.images is not None
    parameter = next(pipe.vae.parameters())
    # One by one: the last bits of a convolution depend on how many there are.
    latents = [KL.encode(pipe.vae, image.to(parameter)) for image in prompt.images.split(1)]
    return encode(pipe, prompts, prompt) | {"image_latents": torch.cat(latents)}


FAMILY = Family(
    "flux_kontext",
    "FLUX.1 Kontext, an image changed by a prompt",
    ("FluxKontextPipeline",),
    "transformer",
    "FluxTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=KL,
    text=Text(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), _encode, null),
    # The pipeline would bring the image to one of its own sizes, of about a megapixel.
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 3.5, "_auto_resize": False},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ""},
    packing=PATCHES,
    flow_grid="given",
    stock_guidance="guidance_scale is an input of the network; true_cfg_scale g: u + g (c - u)",
    reads_image=True,
    single_file=True,
)
