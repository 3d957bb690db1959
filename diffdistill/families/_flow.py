"""What flow-matching families share: the shift by the number of tokens, and Wan's autoencoder, also Qwen-Image's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.core.prediction import Output
from diffdistill.core.schedule import LinearFlow, Schedule
from diffdistill.errors import UserError
from diffdistill.families._family import Config
from diffdistill.families._schedules import schedule_of

ADDED_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  #: those of the text's own stream


def flow_schedule(config: Config, grid: Literal["own", "given"], tokens: int | None = None) -> tuple[Schedule, Output]:
    """The schedule and row of a pipeline that may start at sigma 1, for samples of so many tokens.

    `tokens` None: the pipeline does not tell its scheduler, so dynamic shifting is refused.
    """
    if config.get("use_dynamic_shifting") and tokens is not None:
        # At one resolution it is a static shift. `shift_terminal` stretches the teacher's own grid only, which need
        # not be followed: a level means the same with and without it.
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        linear = config.get("time_shift_type") == "linear"
        config = {**config, "use_dynamic_shifting": False, "shift": mu if linear else math.exp(mu)}
    schedule, row = schedule_of(config)
    if not isinstance(schedule, LinearFlow):
        known = "use a flow-matching one, such as FlowMatchEulerDiscreteScheduler"
        raise UserError(f"scheduler: {config['_class_name']} does not fit this teacher; {known}")
    return replace(schedule, grid=grid, starts_at_one=True), row


def latent_frames(family: str, frames: int, ratio: int) -> int:
    """Frames of latents for so many of a video; UserError where they do not fit."""
    if frames < 1 or (frames - 1) % ratio:
        near = max(round((frames - 1) / ratio), 0) * ratio + 1
        right = f"one more than a multiple of {ratio}, which {family} needs"
        raise UserError(f"frames: {frames} is not {right}; use {near}")
    return (frames - 1) // ratio + 1


def _moments(vae: Any, latents: Tensor) -> list[Tensor]:
    rows = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(row).view(-1, 1, 1, 1).to(latents) for row in rows]


def encode_video(vae: Any, videos: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, C, F', h, w) of zero mean and unit variance by channel."""
    z = vae.encode(videos).latent_dist.mode()
    mean, std = _moments(vae, z)
    return (z - mean) / std


def decode_video(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, F', h, w) -> (B, 3, F, H, W)."""
    mean, std = _moments(vae, latents)
    return vae.decode(latents * std + mean).sample
