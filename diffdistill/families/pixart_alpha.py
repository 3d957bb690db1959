"""PixArtTransformer2DModel: PixArt-alpha, whose networks of 1024 pixels take the image's size and shape too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ATTENTION, KL, Family, Source, latent_teacher, plain_text, token_map
from diffdistill.families._schedules import schedule_of
from diffdistill.families.pixart_sigma import encode, size_of
from diffdistill.players.teacher import Teacher


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = KL.factor(source.config("vae"))
    size = size_of("pixart_alpha", config, factor, source)

    def call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == 128:
            height, width = (float(side * factor) for side in x.shape[-2:])
            added["resolution"] = torch.tensor([height, width], device=x.device).expand(len(x), 2)
            added["aspect_ratio"] = torch.full((len(x), 1), height / width, device=x.device)
        output = network(x, timestep=time, added_cond_kwargs=added, return_dict=False, **cond)[0]
        return output[:, : x.shape[1]]  # the rest is a learned variance

    return latent_teacher(
        "pixart_alpha",
        network,
        source,
        (config.in_channels, *size),
        schedule_of(source.scheduler),
        call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=token_map,
    )


FAMILY = Family(
    "pixart_alpha",
    "PixArt-alpha",
    ("PixArtAlphaPipeline",),
    "transformer",
    "PixArtTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), encode),
    arguments=lambda steps: {
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    loads_lora=False,
)
