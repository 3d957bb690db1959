"""UNet2DConditionModel with pooled text and sizes: Stable Diffusion XL, and what is fine-tuned from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ATTENTION, KL, Family, Prompt, Text
from diffdistill.families.stable_diffusion import unet_teacher


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    text = cond["encoder_hidden_states"]
    added = {key: cond[key] for key in ("text_embeds", "time_ids")}
    others = {"timestep_cond": cond.get("timestep_cond"), "return_dict": False}
    return network(x, time, encoder_hidden_states=text, added_cond_kwargs=added, **others)[0]


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    # Original size, corner of the crop, target size, as the pipeline has them where it is told none.
    sizes = torch.tensor([*prompt.resolution, 0, 0, *prompt.resolution]).to(embeds)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": sizes.repeat(len(prompts), 1)}


def _null(pipe: Any, prompt: Prompt) -> Cond:
    # Without a negative prompt the pipeline's own: zeros, or the empty prompt where its config says so. The sizes stay
    # those of the prompt.
    negative = None if prompt.negative is None else [prompt.negative]
    _, embeds, _, pooled = pipe.encode_prompt([""], do_classifier_free_guidance=True, negative_prompt=negative)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


FAMILY = Family(
    "sdxl",
    "Stable Diffusion XL",
    ("StableDiffusionXLPipeline",),
    "unet",
    "UNet2DConditionModel",
    "text",
    unet_teacher("sdxl", _call, "text_time"),
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=Text(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), _encode, _null),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    single_file=True,
)
