"""Flux2Transformer2DModel: FLUX.2-dev, which takes the guidance scale as an input and was distilled with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ROWS, Family, Prompt, Text
from diffdistill.families.flux2 import AUTOENCODER, TARGETS, image_latents, teacher_named


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, _ = pipe.encode_prompt(list(prompts))
    guidance = torch.full((len(prompts),), prompt.guidance, device=embeds.device)
    return {"encoder_hidden_states": embeds, "guidance": guidance} | image_latents(pipe, prompt)


def _null(pipe: Any, prompt: Prompt) -> Cond:
    # Without the guidance, so that a prompt keeps its own.
    plain = prompt._replace(images=None)
    return {"encoder_hidden_states": _encode(pipe, [prompt.negative or ""], plain)["encoder_hidden_states"]}


FAMILY = Family(
    "flux2_dev",
    "FLUX.2-dev",
    ("Flux2Pipeline",),
    "transformer",
    "Flux2Transformer2DModel",
    "text",
    partial(teacher_named, "flux2_dev"),
    lora_targets=TARGETS,
    autoencoder=AUTOENCODER,
    text=Text(("tokenizer", "text_encoder"), _encode, _null),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 3.5},
    guided=None,
    packing=ROWS,
    flow_grid="given",
    stock_guidance="guidance_scale is an input of the network; there is no other",
    several=True,
    single_file=True,
)
