"""WanTransformer3DModel: videos of Wan 2.1 and of Wan 2.2, which has one transformer or two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffdistill.core.denoiser import Call, Cond
from diffdistill.core.experts import Experts
from diffdistill.families._family import (
    ATTENTION,
    Autoencoder,
    Config,
    Family,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    plain_text,
    token_map,
)
from diffdistill.families._flow import decode_video, encode_video, flow_schedule, latent_frames
from diffdistill.players.teacher import Teacher

_SIZE = (480, 832)  #: the pipeline's own, in pixels
FRAMES = 81
TOKENS = 512  #: of a prompt; the default of the pipeline's call, not that of its encode_prompt
# wan/configs/shared_config.py of Wan-Video/Wan2.1. WanPipeline has "" where it is given none, and so has our teacher.
ADVISED = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def _call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, timestep=time, return_dict=False, **cond)[0]


def frame_map(output: Tensor, x: Tensor, cond: Cond) -> Tensor:
    """The mean of the frames (B, D, h', w'), since a discriminator's head is one of images."""
    return token_map(output.unflatten(1, (x.shape[2], -1)).mean(1), x, cond)


def latent_shape(family: str, config: Config, source: Source, pixels: int = 16) -> tuple[int, int, int, int]:
    """(C, F', h, w) of a video in the latents of Wan's autoencoder; its sides in pixels are multiples of `pixels`."""
    vae = source.config("vae")
    frames = latent_frames(family, source.frames or FRAMES, vae.get("scale_factor_temporal", 4))
    factor = AUTOENCODER.factor(vae)
    multiple = max(config["patch_size"][1], pixels // factor)
    size = latent_size(family, factor, _SIZE, source.resolution, multiple)
    return config["in_channels"], frames, *size


def wan_teacher(name: str, network: Any, source: Source, call: Call) -> Teacher:
    """The teacher of a family whose network is Wan's."""
    config, block = network.config, f"blocks.{network.config.num_layers // 2}"
    # The released models' scheduler, UniPC, takes 1, .., 1/n of itself, where the flow scheduler would end at 1/1000.
    own = source.scheduler.get("_class_name", "").startswith("FlowMatch")
    teacher = latent_teacher(
        name,
        network,
        source,
        latent_shape(name, config, source),
        flow_schedule(source.scheduler, "own" if own else "given"),
        call,
        feature_layer=f"{network.names[0]}.{block}" if isinstance(network, Experts) else block,
        feature_map=frame_map,
    )
    return replace(teacher, size={"num_frames": source.frames or FRAMES})


def _teacher(network: Any, source: Source) -> Teacher:
    return wan_teacher("wan", network, source, _call)


def encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    """The embeddings of prompts."""
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return {"encoder_hidden_states": embeds}


AUTOENCODER = Autoencoder(
    lambda config: config.get("scale_factor_spatial", 8),
    encode_video,
    decode_video,
    lambda config: config["z_dim"],
    network="AutoencoderKLWan",
    numbers=("latents_mean", "latents_std"),
)

FAMILY = Family(
    "wan",
    "Wan 2.1 and Wan 2.2, text to video",
    ("WanPipeline",),
    "transformer",
    "WanTransformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), encode, advised=ADVISED),
    arguments=lambda steps: {"num_inference_steps": steps, "guidance_scale": 1.0},
    videos=True,
    second="transformer_2",
    stock_guidance="u + g (c - u); of two networks the second may have a g of its own, guidance_scale_2",
    single_file=True,
)
