"""Flux2Transformer2DModel: FLUX.2 klein, the base models and those of four steps, from text, or with images too."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.core.denoiser import Cond
from diffdistill.core.prediction import Output
from diffdistill.core.schedule import LinearFlow, Schedule
from diffdistill.errors import UserError, first_line
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
    middle_block,
    plain_text,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule
from diffdistill.families._parts import Config
from diffdistill.players.teacher import Teacher

TARGETS = (*ATTENTION, *ADDED_ATTENTION, "to_qkv_mlp_proj")
_STEPS = 50  #: the pipeline's own number, on which its shift depends
_APART = 10  #: times from one image to the next


def _positions(rows: int, columns: int, words: int, device: torch.device, at: int = 0) -> Tensor:
    """(rows columns words, 4) time, row, column and word of each token."""
    place = (torch.arange(n, device=device) for n in (1, rows, columns, words))
    return torch.cartesian_prod(*place).float() + torch.tensor([at, 0, 0, 0], device=device)


def _images(cond: Cond) -> tuple[Tensor, ...]:
    """The latents (B, C, h, w) of each image that comes with the prompts."""
    return cond["image_latents"].unbind(1) if "image_latents" in cond else ()


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """The guidance scale is an input of the development model alone."""
    text = cond["encoder_hidden_states"]
    seen = [x, *(image.to(x) for image in _images(cond))]
    output = network(
        torch.cat([ROWS.pack(image) for image in seen], 1),
        encoder_hidden_states=text,
        timestep=time / 1000,
        img_ids=torch.cat([_positions(y.shape[2], y.shape[3], 1, x.device, _APART * i) for i, y in enumerate(seen)]),
        txt_ids=_positions(1, 1, text.shape[1], x.device),
        guidance=cond.get("guidance"),
        return_dict=False,
    )[0]
    return ROWS.unpack(output[:, : x.shape[2] * x.shape[3]], x.shape[1:])


def _features(output: Any, x: Tensor, cond: Cond) -> Tensor:
    """Of the sample's tokens, which stand between the words and the images."""
    tokens = output[-1] if isinstance(output, tuple) else output
    behind = sum(image.shape[2] * image.shape[3] for image in _images(cond))
    return last_tokens_map(1)(tokens[:, : tokens.shape[1] - behind], x, cond)


def _schedule(config: Config, tokens: int) -> tuple[Schedule, Output]:
    """Shifted by a number that the makers fitted to the numbers of tokens and steps (`compute_empirical_mu`)."""
    if not config.get("use_dynamic_shifting"):
        return flow_schedule(config, "given")
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10
    slope = 0.0 if tokens > 4300 else (many - few) / 190
    log_shift = (slope, many - 200 * slope)
    shift = math.exp(log_shift[0] * _STEPS + log_shift[1])
    schedule, row = flow_schedule({**config, "use_dynamic_shifting": False, "shift": shift}, "given")
    assert isinstance(schedule, LinearFlow)
    return replace(schedule, log_shift=log_shift), row


def teacher_named(family: str, network: Any, source: Source) -> Teacher:
    """Of klein, or of the development model."""
    config = network.config
    size = latent_size(family, AUTOENCODER.factor(source.config("vae")), 1024, source.resolution)
    return latent_teacher(
        family,
        network,
        source,
        (config.in_channels, *size),
        _schedule(source.scheduler, size[0] * size[1]),
        _call,
        feature_layer=middle_block(
            ("transformer_blocks", config.num_layers), ("single_transformer_blocks", config.num_single_layers)
        ),
        feature_map=_features,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # The network reads the padding too.
    return {"encoder_hidden_states": pipe.encode_prompt(list(prompts))[0]} | image_latents(pipe, prompt)


def image_latents(pipe: Any, prompt: Prompt) -> Cond:
    """The images of each prompt, as the pipeline reads them: latents (n, k, C, h, w); nothing where it has none."""
    if prompt.images is None:
        return {}
    parameter, reader = next(pipe.vae.parameters()), pipe.image_processor
    pictures = [reader._resize_if_exceeds_area(picture) for picture in prompt.pictures]
    try:
        reader.check_image_input(pictures[0])
    except ValueError as error:
        raise UserError(f"resolution: the pipeline takes no such image ({first_line(error)})") from None
    multiple = 2 * pipe.vae_scale_factor
    latents = []
    for picture in pictures:  # one by one: the last bits of a convolution depend on how many there are
        width, height = (side // multiple * multiple for side in picture.size)
        pixels = reader.preprocess(picture, height=height, width=width, resize_mode="crop")
        latents.append(_from_images(pipe.vae, pixels.to(parameter)))
    return {"image_latents": torch.cat(latents).unflatten(0, (len(prompt.images), -1))}


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 4 C, 1, 1) of latents in patches of 2x2."""
    mean, variance = (row.view(1, -1, 1, 1) for row in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def _from_images(vae: Any, images: Tensor) -> Tensor:
    mean, std = _moments(vae)
    return (F.pixel_unshuffle(vae.encode(images).latent_dist.mode(), 2) - mean) / std


def _to_images(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _moments(vae)
    return vae.decode(F.pixel_shuffle(latents * std + mean, 2)).sample


AUTOENCODER = Autoencoder(
    lambda config: 2 ** len(config["block_out_channels"]),
    _from_images,
    _to_images,
    lambda config: 4 * config["latent_channels"],
    network="AutoencoderKLFlux2",
    numbers=("batch_norm_eps",),
)

FAMILY = Family(
    "flux2",
    "FLUX.2 klein",
    ("Flux2KleinPipeline",),
    "transformer",
    "Flux2Transformer2DModel",
    "text",
    partial(teacher_named, "flux2"),
    lora_targets=TARGETS,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    packing=ROWS,
    flow_grid="given",
    stock_guidance="u + g (c - u), of the base models alone",
    several=True,
    single_file=True,
)
