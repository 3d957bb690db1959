"""WanTransformer3DModel: videos of Wan 2.1 and of Wan 2.2 that begin with an image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Call, Cond
from diffdistill.errors import UserError
from diffdistill.families._family import ATTENTION, Family, Prompt, Source, plain_text
from diffdistill.families.wan import ADVISED, AUTOENCODER, encode, wan_teacher
from diffdistill.players.teacher import Teacher

_WORDS, _SEEN = "encoder_hidden_states", "encoder_hidden_states_image"


def beside(marks: int, read: tuple[str, ...], network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Wan 2.1: behind the sample's channels, `marks` that are 1 in the image's frame, and latents of it and grey."""
    image = cond["image_latents"].to(x)
    first = (torch.arange(x.shape[2], device=x.device) == 0).to(x).view(1, 1, -1, 1, 1)
    both = torch.cat([x, first.expand(len(x), marks, -1, *x.shape[3:]), image], 1)
    return network(both, timestep=time, return_dict=False, **{name: cond[name] for name in read})[0]


def _inside(full: int, patch: list[int], network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Wan 2.2 TI2V: the first frame is the image's, without noise and at time 0; of it nothing is left to predict."""
    image = cond["image_latents"].to(x)
    tokens = (x.shape[3] // patch[1]) * (x.shape[4] // patch[2])
    times = torch.stack([torch.zeros_like(time), *[time] * (x.shape[2] - 1)], 1).repeat_interleave(tokens, 1)
    words = cond[_WORDS]
    held = torch.cat([image, x[:, :, 1:]], 2)
    output = network(held, timestep=times, encoder_hidden_states=words, return_dict=False)[0]
    # The velocity on the straight line from the image, which the pipeline puts in the place of the frame at its end.
    sigma = (time / full).clamp(min=1e-6).to(x).view(-1, 1, 1, 1, 1)
    return torch.cat([(x[:, :, :1] - image) / sigma, output[:, :, 1:]], 2)


def _call(config: Any, source: Source, channels: int) -> Call:
    """How the network is called; UserError for one that reads something else."""
    encoder = source.parts.get("image_encoder")
    if config.pos_embed_seq_len is not None:
        raise UserError("teacher: a network that reads a first and a last image is not supported; use one of the first")
    if config.image_dim is not None and (not encoder or encoder[0] is None):
        raise UserError(
            "teacher: the network reads what an image_encoder sees, and model_index.json names none; give the whole "
            "pipeline"
        )
    inside, ratio = bool(source.parts.get("expand_timesteps")), source.config("vae")["scale_factor_temporal"]
    needed = channels if inside else 2 * channels + ratio
    if config.in_channels != needed:
        raise UserError(
            f"teacher: the network takes {config.in_channels} channels; one that reads a first image takes {needed}"
        )
    if inside:
        return partial(_inside, source.scheduler.get("num_train_timesteps", 1000), config.patch_size)
    return partial(beside, ratio, (_WORDS, _SEEN) if config.image_dim is not None else (_WORDS,))


def _teacher(network: Any, source: Source) -> Teacher:
    channels = network.config.out_channels
    teacher = wan_teacher("wan_i2v", network, source, _call(network.config, source, channels))
    return replace(teacher, shape=(channels, *teacher.shape[1:]))


def first_and_grey(vae: Any, images: Tensor, grey: int) -> Tensor:
    """Latents (B, C, F', h, w) of videos that are an image (B, 3, H, W), and so many frames of grey after it."""
    parameter, latents = next(vae.parameters()), []
    for image in images.unsqueeze(2).split(1):  # one by one: a convolution's last bits depend on their number
        video = torch.cat([image, image.new_zeros(1, 3, grey, *image.shape[3:])], 2)
        latents.append(AUTOENCODER.encode(vae, video.to(parameter)))
    return torch.cat(latents)


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds = encode(pipe, prompts, prompt)
    if prompt.images is None:  # of "no prompt", which leaves the image as it is
        return embeds
    assert prompt.frames is not None
    grey = 0 if pipe.config.expand_timesteps else prompt.frames - 1
    embeds |= {"image_latents": first_and_grey(pipe.vae, prompt.images, grey)}
    if pipe.image_encoder is not None:
        seen = [pipe.encode_image(picture) for picture in prompt.pictures]
        embeds |= {_SEEN: torch.cat(seen)}
    return embeds


FAMILY = Family(
    "wan_i2v",
    "Wan 2.1 and Wan 2.2, image to video",
    ("WanImageToVideoPipeline",),
    "transformer",
    "WanTransformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(
        ("tokenizer", "text_encoder", "image_encoder", "image_processor"),
        _encode,
        optional=("image_encoder", "image_processor"),
        advised=ADVISED,
    ),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    videos=True,
    reads_image=True,
    packages=("ftfy",),
    second="transformer_2",
    stock_guidance="u + g (c - u); of two networks the second may have a g of its own, guidance_scale_2",
    single_file=True,
)
