"""QwenImageTransformer2DModel: Qwen-Image-Edit-Plus (2509, 2511), which changes images as a prompt says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

from diffdistill.core.denoiser import Cond
from diffdistill.families import qwen_image_edit as edit
from diffdistill.families._family import Prompt, Source, Text
from diffdistill.families.flux import sample_map
from diffdistill.families.qwen_image import AUTOENCODER, qwen_teacher
from diffdistill.players.teacher import Teacher


def _teacher(network: Any, source: Source) -> Teacher:
    return qwen_teacher("qwen_image_edit_plus", network, source, edit.edit_call, sample_map)


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    """The text encoder is shown images of another size than the autoencoder, each of an area of its own."""
    height, width = prompt.resolution
    smaller, larger = (
        stock.calculate_dimensions(area, width / height) for area in (stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE)
    )
    reader, parameter = pipe.image_processor, next(pipe.vae.parameters())
    shown = [[reader.resize(picture, *smaller[1::-1]) for picture in row] for row in prompt.lists]
    pixels = [reader.preprocess(picture, *larger[1::-1]).to(parameter) for picture in prompt.pictures]
    latents = torch.cat([AUTOENCODER.encode(pipe.vae, image) for image in pixels])
    return edit.both_words(pipe, prompts, prompt, shown) | {"image_latents": latents.unflatten(0, (len(prompts), -1))}


FAMILY = replace(
    edit.FAMILY,
    name="qwen_image_edit_plus",
    models="Qwen-Image-Edit-Plus (2509, 2511), images changed by a prompt",
    pipelines=("QwenImageEditPlusPipeline",),
    teacher=_teacher,
    text=Text(("tokenizer", "text_encoder", "processor"), _encode, lambda pipe, prompt: {}, negative=edit.NEGATIVE),
    several=True,
)
