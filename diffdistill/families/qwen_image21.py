"""QwenImage21Transformer2DModel: Qwen-Image 2.1, from text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.denoiser import Cond
from diffdistill.errors import UserError, shown
from diffdistill.families._family import (
    ATTENTION,
    ROWS,
    Autoencoder,
    Family,
    Prompt,
    Source,
    last_tokens_map,
    latent_size,
    latent_teacher,
    plain_text,
)
from diffdistill.families._flow import decode_video, encode_video, flow_schedule
from diffdistill.pictures import opaque
from diffdistill.players.teacher import Teacher

_FACTOR = 16  #: pixels a latent pixel, whatever the autoencoder says
_SLOT = 4  #: latent pixels of the image for one place in the network's mask of images
_WORDS = 1024  #: tokens of a prompt at most; the pipeline has no limit, but what is stored must have one


def _lengths(cond: Cond) -> Tensor:
    return cond["encoder_hidden_states_mask"].sum(1)


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # The image's place follows that of the last word: prompts of a call have one length, to which they are cut.
    mask, text = cond["encoder_hidden_states_mask"], cond["encoder_hidden_states"]
    text = text if mask.is_meta else text[:, : int(_lengths(cond)[0])]
    height, width = x.shape[2:]
    is_image = torch.zeros(len(x), text.shape[1] + height * width // _SLOT, dtype=torch.bool, device=x.device)
    is_image[:, text.shape[1] :] = True
    output = network(
        ROWS.pack(x),
        encoder_hidden_states=text,
        timestep=time / 1000,
        img_shapes=[[(1, height, width)]] * len(x),
        img_mask=is_image,
        return_dict=False,
    )[0]
    return ROWS.unpack(output[:, -height * width :], x.shape[1:])


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    size = latent_size("qwen_image21", _FACTOR, 1024, source.resolution, 2)
    return latent_teacher(
        "qwen_image21",
        network,
        source,
        (config.in_channels, *size),
        flow_schedule(source.scheduler, "given", size[0] * size[1]),
        _call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=last_tokens_map(1),
        lengths=_lengths,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask, _ = pipe.encode_prompt(list(prompts))
    if mask is None:  # all of one length
        mask = embeds.new_ones(embeds.shape[:2])
    for text, count in zip(prompts, mask.sum(1).tolist(), strict=True):
        if count > _WORDS:
            raise UserError(f"prompts: {shown(text)} is longer than {_WORDS} tokens; shorten it")
    missing = _WORDS - embeds.shape[1]
    return {
        "encoder_hidden_states": F.pad(embeds, (0, 0, 0, missing)),
        "encoder_hidden_states_mask": F.pad(mask.bool(), (0, missing)),
    }


def _encode_image(vae: Any, images: Tensor) -> Tensor:
    """Opaque images: the autoencoder's fourth channel says how much."""
    return encode_video(vae, torch.cat([images, torch.ones_like(images[:, :1])], 1).unsqueeze(2)).squeeze(2)


def _decode_image(vae: Any, latents: Tensor) -> Tensor:
    """On white, as what is transparent is looked at."""
    return 2 * opaque(decode_video(vae, latents.unsqueeze(2)).squeeze(2).clamp(-1, 1) / 2 + 0.5) - 1


def _arguments(steps: int) -> dict[str, Any]:
    # A folder may have sigmas of its own, which come before a number of steps.
    sigmas = [1 - i / steps for i in range(steps)]
    return {"num_inference_steps": steps, "true_cfg_scale": 1.0, "sigmas": sigmas}


FAMILY = Family(
    "qwen_image21",
    "Qwen-Image 2.1",
    ("QwenImage21Pipeline",),
    "transformer",
    "QwenImage21Transformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=Autoencoder(
        lambda config: _FACTOR,
        _encode_image,
        _decode_image,
        lambda config: config["z_dim"],
        network="AutoencoderKLQwenImage21",
        numbers=("latents_mean", "latents_std"),
    ),
    text=plain_text(("processor", "text_encoder"), _encode, negative=" "),
    arguments=_arguments,
    guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": " "},
    built_with=("processor",),
    packing=ROWS,
    flow_grid="given",
    stock_guidance="u + g (c - u); g is true_cfg_scale",
    single_file=True,
)
