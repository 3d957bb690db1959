"""Tiny pipelines of random weights in the real architectures: FLUX.2, Chroma, Krea 2, SANA-Video and others."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_a import (
    denoiser,
)
from tests.tiny_b import qwen_config, qwen_tokenizer


def flux2_parts(seed: int, guidance: bool) -> dict[str, Any]:
    """Those of FLUX.2 besides its text encoder, which gives three layers of 16 numbers a token."""
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=8,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": denoiser(transformer, seed), "vae": autoencoder.eval(), "scheduler": scheduler}


NARROW = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}


def flux2(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """As a base model: guided. The pipeline reads layers 9, 18 and 27 of its text encoder."""
    torch.manual_seed(seed)
    config = Qwen3Config(**(qwen_config() | NARROW | {"num_hidden_layers": 27}))
    return Flux2KleinPipeline(
        **flux2_parts(seed, guidance=False),
        text_encoder=Qwen3ForCausalLM(config).eval(),
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux2": flux2,
}
# In pixels, of an image whose latents are 8x8.
SIZES = {
    "flux2": 32,
}
