"""LTX2VideoTransformer3DModel: LTX-2, videos with their sound.

A sample is both latents in one tensor (B, C, F + G, h, w): the F frames of the video's, and after them as many as the
sound's tokens fill, (B, L, C) of its own autoencoder, row by row. What is left of the last frame is 0 in every clean
sample.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond
from diffdistill.errors import UserError
from diffdistill.families._family import (
    ATTENTION,
    Autoencoder,
    Config,
    Family,
    Packing,
    Prompt,
    Source,
    latent_size,
    latent_teacher,
    plain_text,
)
from diffdistill.families._flow import flow_schedule, latent_frames
from diffdistill.families._parts import part_config
from diffdistill.families.wan import frame_map
from diffdistill.players.teacher import Teacher

_SIZE, _FRAMES = (512, 768), 121  #: the pipeline's own
_SIDE = 32  #: of which its height and width are multiples
_RATE = 24.0  #: frames a second, the pipeline's own
_TOKENS = 25.0  #: of the sound a second: 16,000 samples, of 160 a column of the spectrogram and 4 columns a token


def _tokens(frames: int) -> int:
    """Those of the sound of so many frames."""
    return round(frames / _RATE * _TOKENS)


def _laid_out(x: Tensor, ratio: int) -> tuple[int, int]:
    """Of samples (B, C, F + G, h, w) F and the number of the sound's tokens."""
    length, area = x.shape[2], x.shape[3] * x.shape[4]
    for frames in range(1, length):
        tokens = _tokens((frames - 1) * ratio + 1)
        if frames - (-tokens // area) == length:
            return frames, tokens
    raise ValueError(f"{tuple(x.shape)} is no video with its sound")


def _rows(x: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B, F h w, C)."""
    return x.flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, shape: Any) -> Tensor:
    """(B, N, C) -> (B, *shape) with zeros where no token is."""
    c, *sides = shape
    rest = torch.Size(sides).numel() - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, rest)).transpose(1, 2).reshape(-1, c, *sides)


def _call(ratio: int, steps: int, network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    frames, tokens = _laid_out(x, ratio)
    rest = _rows(x[:, :, frames:])
    output = network(
        hidden_states=_rows(x[:, :, :frames]),
        audio_hidden_states=rest[:, :tokens],
        timestep=time,
        sigma=time,
        audio_encoder_attention_mask=cond["encoder_attention_mask"],
        num_frames=frames,
        height=x.shape[3],
        width=x.shape[4],
        fps=_RATE,
        audio_num_frames=tokens,
        use_cross_timestep=True,
        return_dict=False,
        **cond,
    )
    # Where there is no token x0 is 0, and what is there is noise alone.
    nothing = rest[:, tokens:].float() / (time / steps).clamp(min=1e-6)[:, None, None]
    return _unpack(torch.cat([*output, nothing], 1), x.shape[1:])


def _teacher(network: Any, source: Source) -> Teacher:
    config, vae, sound = network.config, source.config("vae"), source.config("audio_vae")
    if config.patch_size != 1 or config.patch_size_t != 1 or config.audio_in_channels != config.in_channels:
        raise UserError("teacher: this network of LTX-2 takes other tokens than latent pixels, which is not supported")
    if sound["sample_rate"] / sound["mel_hop_length"] / 4 != _TOKENS:
        raise UserError(f"teacher: the sound's autoencoder gives no {_TOKENS:g} tokens a second, as that of LTX-2 does")
    frames, ratio = source.frames or _FRAMES, _ratio(vae)
    length, tokens = latent_frames("ltx2", frames, ratio), _tokens(frames)
    factor = AUTOENCODER.factor(vae)
    height, width = latent_size("ltx2", factor, _SIZE, source.resolution, _SIDE // factor)
    teacher = latent_teacher(
        "ltx2",
        network,
        source,
        (config.in_channels, length - (-tokens // (height * width)), height, width),
        flow_schedule(source.scheduler, "given", length * height * width),
        partial(_call, ratio, source.scheduler.get("num_train_timesteps", 1000)),
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=lambda output, x, cond: frame_map(output[0], x[:, :, : _laid_out(x, ratio)[0]], cond),
    )
    return replace(teacher, size={"num_frames": frames})


def _encode(pipe: Any, prompts: list[str], prompt: Prompt) -> Cond:
    embeds, mask, _, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    seen, heard, mask = pipe.connectors(embeds, mask, padding_side=pipe.tokenizer.padding_side)
    return {"encoder_hidden_states": seen, "audio_encoder_hidden_states": heard, "encoder_attention_mask": mask}


def _halvings(vae: Config) -> int:
    scaling = vae["spatio_temporal_scaling"]
    return sum(scaling) if isinstance(scaling, list | tuple) else scaling * (len(vae["layers_per_block"]) - 1)


def _ratio(vae: Config) -> int:
    """Frames of the video a frame of latents."""
    return int(vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2 ** _halvings(vae))


def _factor(vae: Config) -> int:
    """Pixels a side of a latent pixel."""
    return int(vae.get("spatial_compression_ratio") or vae["patch_size"] * 2 ** _halvings(vae))


def _decode(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, F + G, h, w) -> the video (B, 3, F', H, W) without its sound."""
    frames, _ = _laid_out(latents, vae.temporal_compression_ratio)
    mean, std = (value.view(1, -1, 1, 1, 1).to(latents) for value in (vae.latents_mean, vae.latents_std))
    at = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
    return vae.decode(latents[:, :, :frames] * std / vae.config.scaling_factor + mean, at).sample


def _first_noise(teacher: Teacher, generator: torch.Generator) -> Tensor:
    """(1, *shape) the video's noise, and then that of the sound, which has channels and rows of a spectrogram."""
    c, length, h, w = teacher.shape
    tokens = _tokens(teacher.size["num_frames"])
    channels = part_config(Path(teacher.source) / "audio_vae")["latent_channels"]
    video = torch.randn(1, c, length + (-tokens // (h * w)), h, w, generator=generator)
    sound = torch.randn(1, channels, tokens, c // channels, generator=generator)
    return _unpack(torch.cat([_rows(video), sound.transpose(1, 2).flatten(2)], 1), teacher.shape)


def _scales(scale: float) -> Config:
    """The sound's are None, which is the video's, by whatever scale that is called; other guidances are off."""
    own = {"guidance_scale": scale, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    return own | {f"audio_{name}": None for name in own}


def _encode_video(vae: Any, videos: Tensor) -> Tensor:
    raise UserError("data: nothing encodes the sound of a sample of ltx2; give --prompts alone")


AUTOENCODER = Autoencoder(
    _factor,
    _encode_video,
    _decode,
    encodes=False,
    network="AutoencoderKLLTX2Video",
    numbers=("scaling_factor",),
)

FAMILY = Family(
    "ltx2",
    "LTX-2, text to video with sound",
    ("LTX2Pipeline",),
    "transformer",
    "LTX2VideoTransformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder", "connectors"), _encode, advised=DEFAULT_NEGATIVE_PROMPT),
    arguments=lambda steps: {"num_inference_steps": steps, **_scales(1.0)},
    guided=_scales,
    packing=Packing(_rows, _unpack),
    first_noise=_first_noise,
    flow_grid="given",
    stock_guidance="u + g (c - u), of both latents by one g; without STG, modality guidance and rescaling",
    videos=True,
    single_file=True,
)
