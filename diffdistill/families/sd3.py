"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import (
    ATTENTION,
    KL,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    native_pixels,
    plain_text,
    token_map,
)
from diffdistill.families._flow import ADDED_ATTENTION, flow_schedule
from diffdistill.families._parts import read_json
from diffdistill.players.teacher import Teacher


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, timestep=time, return_dict=False, **cond)[0]


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    factor = KL.factor(source.config("vae"))
    native = native_pixels(config.sample_size, factor, source.resolution)
    size = latent_size("sd3", factor, native, source.resolution, config.patch_size)
    return latent_teacher(
        "sd3",
        network,
        source,
        (config.in_channels, *size),
        flow_schedule(source.scheduler, "own", size[0] * size[1] // config.patch_size**2),
        _call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=token_map,
    )


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    if pipe.text_encoder_3 is None and pipe.transformer is None:
        # Zeros stand for T5's tokens, and the pipeline asks the network, which is not loaded here, how wide they are.
        config = read_json(Path(pipe.config["_name_or_path"]) / "transformer" / "config.json")
        width = config.get("joint_attention_dim", 4096)
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


FAMILY = Family(
    "sd3",
    "Stable Diffusion 3 and 3.5",
    ("StableDiffusion3Pipeline",),
    "transformer",
    "SD3Transformer2DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION + ADDED_ATTENTION,
    autoencoder=KL,
    text=plain_text(
        ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
        _encode,
        optional=("tokenizer_3", "text_encoder_3"),
    ),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    single_file=True,
)
