"""PixArtTransformer2DModel: PixArt-alpha, whose networks of 1024 pixels take the image's size and shape too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families import pixart_sigma
from diffdistill.families._family import KL, Source, without_variance
from diffdistill.players.teacher import Teacher


def _teacher(network: Any, source: Source) -> Teacher:
    config, factor = network.config, KL.factor(source.config("vae"))

    def call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == 128:
            height, width = (float(side * factor) for side in x.shape[-2:])
            added["resolution"] = torch.tensor([height, width], device=x.device).expand(len(x), 2)
            added["aspect_ratio"] = torch.full((len(x), 1), height / width, device=x.device)
        output = network(x, timestep=time, added_cond_kwargs=added, return_dict=False, **cond)[0]
        return without_variance(output, x)

    return pixart_sigma.teacher_of("pixart_alpha", call, network, source)


FAMILY = replace(
    pixart_sigma.FAMILY,
    name="pixart_alpha",
    models="PixArt-alpha",
    pipelines=("PixArtAlphaPipeline",),
    teacher=_teacher,
)
