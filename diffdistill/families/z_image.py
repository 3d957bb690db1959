"""ZImageTransformer2DModel: Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    plain_text,
    token_map,
)
from diffdistill.families._flow import flow_schedule
from diffdistill.players.teacher import Teacher

_WORDS = 512  #: tokens of a prompt at most, as the pipeline's own call


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # The network takes captions of their own lengths, on which the image's positions depend: the one read of a tensor
    # by the host that its interface leaves no way around. Without values, for a plan, they are as long as can be.
    lengths = [_WORDS] * len(x) if cond["cap_lengths"].is_meta else cond["cap_lengths"].tolist()
    captions = [caption[:length] for caption, length in zip(cond["cap_feats"], lengths, strict=True)]
    # Its time runs from noise to data, and so does its velocity.
    output = network(list(x.unsqueeze(2)), 1 - time / 1000, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def _image_map(output: Tensor, x: Tensor, cond: Cond) -> Tensor:
    # The image's tokens come first, then what fills them up to a multiple of 32, then the caption's.
    return token_map(output[:, : x.shape[2] * x.shape[3] // 4], x, cond)


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    size = latent_size("z_image", KL.factor(source.config("vae")), 1024, source.resolution, 2)
    return latent_teacher(
        "z_image",
        network,
        source,
        (config.in_channels, *size),
        flow_schedule(source.scheduler, "given", size[0] * size[1] // 4),
        _call,
        feature_layer=f"layers.{config.n_layers // 2}",
        feature_map=_image_map,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    # The pipeline writes its template into the list it is given.
    rows, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=_WORDS)
    lengths = [len(row) for row in rows]
    longest = rows[0].new_zeros(_WORDS, rows[0].shape[1])
    return {
        "cap_feats": pad_sequence([*rows, longest], batch_first=True)[:-1],
        "cap_lengths": torch.tensor(lengths, device=longest.device),
    }


FAMILY = Family(
    "z_image",
    "Z-Image and Z-Image-Turbo",
    ("ZImagePipeline",),
    "transformer",
    "ZImageTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 0.0},
    guided=lambda scale: {"guidance_scale": scale - 1},
    flow_grid="given",
    stock_guidance="c + g (c - u)",
    single_file=True,
)
