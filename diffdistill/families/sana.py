"""SanaTransformer2DModel: Sana, in the latents of AutoencoderDC."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    Autoencoder,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    native_pixels,
    padded_with_zeros,
    plain_text,
    token_map,
    without_variance,
)
from diffdistill.families._flow import flow_schedule
from diffdistill.players.teacher import Teacher

_AUTOENCODER = Autoencoder(
    lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
    lambda vae, images: vae.encode(images).latent * vae.config.scaling_factor,
    lambda vae, latents: vae.decode(latents / vae.config.scaling_factor).sample,
    network="AutoencoderDC",
    numbers=("scaling_factor",),
)


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = _AUTOENCODER.factor(source.config("vae"))
    # The pipeline takes multiples of 32 pixels, whatever its autoencoder.
    multiple = max(config.patch_size, 32 // factor)
    size = latent_size(
        "sana", factor, native_pixels(config.sample_size, factor, source.resolution), source.resolution, multiple
    )
    time_scale = config.timestep_scale

    def call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output = network(x, timestep=time * time_scale, return_dict=False, **cond)[0]
        return without_variance(output, x)

    return latent_teacher(
        "sana",
        network,
        source,
        (config.in_channels, *size),
        flow_schedule(source.scheduler, "own"),
        call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=token_map,
    )


def encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    """Rows and mask of each prompt, as it is written."""
    # Without clean_caption, whose result depends on whether bs4 and ftfy are installed, and without the pipeline's
    # complex_human_instruction, which asks a language model to embellish the prompt. A student is called likewise.
    embeds, mask, _, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, clean_caption=False, complex_human_instruction=None
    )
    return {"encoder_hidden_states": padded_with_zeros(embeds, mask), "encoder_attention_mask": mask}


FAMILY = Family(
    "sana",
    "Sana",
    ("SanaPipeline",),
    "transformer",
    "SanaTransformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=_AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), encode),
    arguments=lambda steps: {
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
    },
    single_file=True,
)
