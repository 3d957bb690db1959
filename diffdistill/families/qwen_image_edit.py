"""QwenImageTransformer2DModel: Qwen-Image-Edit, which changes an image as a prompt says."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.denoiser import Cond
from diffdistill.errors import UserError, shown
from diffdistill.families._family import (
    ATTENTION,
    OWN_NULL,
    PATCHES,
    Family,
    Prompt,
    Source,
    Text,
    pack,
    unpack,
)
from diffdistill.families.flux import sample_map
from diffdistill.families.qwen_image import AUTOENCODER, qwen_teacher
from diffdistill.players.teacher import Teacher

_AREA = 1024 * 1024  #: pixels of the image that the pipeline shows to its encoders, whatever it makes
NEGATIVE = " "
_WORDS = 512  #: tokens of a prompt at most, and of what the template has behind it


def edit_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """With the image of each prompt behind the sample, or the k of it, `image_latents` (B, k, C, h, w)."""
    images = cond["image_latents"].to(x)
    seen = [x, *(images.unbind(1) if images.ndim == 5 else [images])]
    shapes = [(1, latents.shape[2] // 2, latents.shape[3] // 2) for latents in seen]
    tokens = pack(x)
    output = network(
        torch.cat([tokens, *map(pack, seen[1:])], 1),
        timestep=time / 1000,
        img_shapes=[shapes] * len(x),
        encoder_hidden_states=cond["encoder_hidden_states"],
        encoder_hidden_states_mask=cond["encoder_hidden_states_mask"],
        return_dict=False,
    )[0]
    return unpack(output[:, : tokens.shape[1]], x.shape[1:])


def _teacher(network: Any, source: Source) -> Teacher:
    return qwen_teacher("qwen_image_edit", network, source, edit_call, sample_map)


def words_of(pipe: Any, texts: list[str], pictures: list[Any]) -> Cond:
    """The words of prompts, as the text encoder reads them beside their images; an image is many of them.

    `pictures` has for each prompt what the pipeline's `encode_prompt` takes: an image, or a list.
    """
    first = pictures[0] if isinstance(pictures[0], list) else [pictures[0]]
    reader, (width, height) = pipe.processor.image_processor, first[0].size
    patches = reader.get_number_of_image_patches(height, width) // reader.merge_size**2
    most = _WORDS + len(first) * patches
    rows = [pipe.encode_prompt([text], image=picture)[0][0] for text, picture in zip(texts, pictures, strict=True)]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > most:
            raise UserError(f"prompts: {shown(text)} is longer than {_WORDS} tokens; shorten it")
    mask = torch.stack([torch.arange(most, device=row.device) < len(row) for row in rows])
    embeds = torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows])
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    height, width = prompt.resolution
    width, height, _ = stock.calculate_dimensions(_AREA, width / height)
    pictures = [pipe.image_processor.resize(picture, height, width) for picture in prompt.pictures]
    parameter = next(pipe.vae.parameters())
    pixels = [pipe.image_processor.preprocess(picture, height, width).to(parameter) for picture in pictures]
    latents = torch.cat([AUTOENCODER.encode(pipe.vae, image) for image in pixels])
    return both_words(pipe, prompts, prompt, pictures) | {"image_latents": latents}


def both_words(pipe: Any, prompts: list[str], prompt: Prompt, pictures: list[Any]) -> Cond:
    """`words_of` the prompts, and of "no prompt" or the negative one beside the same images."""
    negative = NEGATIVE if prompt.negative is None else prompt.negative
    words, none = (words_of(pipe, texts, pictures) for texts in (prompts, [negative] * len(prompts)))
    return words | {f"{OWN_NULL}{name}": value for name, value in none.items()}


FAMILY = Family(
    "qwen_image_edit",
    "Qwen-Image-Edit, an image changed by a prompt",
    ("QwenImageEditPipeline",),
    "transformer",
    "QwenImageTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=Text(("tokenizer", "text_encoder", "processor"), _encode, lambda pipe, prompt: {}, negative=NEGATIVE),
    arguments=lambda steps: {"num_inference_steps": steps, "true_cfg_scale": 1.0},
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": NEGATIVE},
    packing=PATCHES,
    flow_grid="given",
    stock_guidance="u + g (c - u), as long as c in every token; g is true_cfg_scale",
    reads_image=True,
    single_file=True,
)
