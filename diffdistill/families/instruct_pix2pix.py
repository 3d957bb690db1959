"""UNet2DConditionModel: InstructPix2Pix, Stable Diffusion that changes an image as a prompt says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ATTENTION, KL, Family, Prompt, plain_text
from diffdistill.families.stable_diffusion import unet_teacher


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    both = torch.cat([x, cond["image_latents"].to(x)], 1)
    return network(both, time, encoder_hidden_states=cond["encoder_hidden_states"], return_dict=False)[0]


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds = {"encoder_hidden_states": pipe._encode_prompt(list(prompts), pipe.device, 1, False)}
    if prompt.images is None:  # of "no prompt", which leaves the image as it is
        return embeds
    parameter = next(pipe.vae.parameters())
    # The pipeline does not scale them. One by one: a convolution's last bits depend on how many there are.
    latents = [pipe.vae.encode(image.to(parameter)).latent_dist.mode() for image in prompt.images.split(1)]
    return embeds | {"image_latents": torch.cat(latents)}


FAMILY = Family(
    "instruct_pix2pix",
    "InstructPix2Pix, an image changed by a prompt",
    ("StableDiffusionInstructPix2PixPipeline",),
    "unet",
    "UNet2DConditionModel",
    "text",
    unet_teacher("instruct_pix2pix", _call, reads_image=True),
    lora_targets=ATTENTION,
    autoencoder=KL,
    text=plain_text(("tokenizer", "text_encoder"), _encode),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    guided=lambda scale: {"guidance_scale": scale, "image_guidance_scale": 1.0},
    stock_guidance="i + g (c - i), i with the image and no prompt, where image_guidance_scale is 1",
    reads_image=True,
    single_file=True,
)
