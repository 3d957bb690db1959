"""SanaVideoTransformer3DModel: SANA-Video, in the latents of Wan's autoencoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.families._family import ATTENTION, Family, Source, latent_teacher, plain_text, without_variance
from diffdistill.families._flow import flow_schedule
from diffdistill.families.sana import encode
from diffdistill.families.wan import AUTOENCODER, FRAMES, frame_map, latent_shape
from diffdistill.players.teacher import Teacher


def _call(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    output = network(x, timestep=time, return_dict=False, **cond)[0]
    return without_variance(output, x)


def _teacher(network: Any, source: Source) -> Teacher:
    config = network.config
    teacher = latent_teacher(
        "sana_video",
        network,
        source,
        latent_shape("sana_video", config, source, 32),
        flow_schedule(source.scheduler, "own"),
        _call,
        feature_layer=f"transformer_blocks.{config.num_layers // 2}",
        feature_map=frame_map,
    )
    return replace(teacher, size={"frames": source.frames or FRAMES})  # as this pipeline calls them


FAMILY = Family(
    "sana_video",
    "SANA-Video, text to video",
    ("SanaVideoPipeline",),
    "transformer",
    "SanaVideoTransformer3DModel",
    "text",
    _teacher,
    lora_targets=ATTENTION,
    autoencoder=AUTOENCODER,
    text=plain_text(("tokenizer", "text_encoder"), encode),
    arguments=lambda steps: {
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    },
    videos=True,
)
