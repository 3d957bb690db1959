"""Tiny pipelines of random weights in the real architectures: videos with their sound."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.tiny_a import denoiser, gemma_tokenizer


def gemma3(tokens: int) -> Gemma3ForConditionalGeneration:
    """Two layers, of images too, with so many tokens."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": tokens, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def ltx2_transformer(seed: int, **settings: Any) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(seed)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        vae_scale_factors=(2, 8, 8),
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
        rope_type="split",
        **settings,
    )
    with torch.no_grad():  # a prompt is a few of 1024 tokens: it must be loud to be heard
        transformer.caption_projection.linear_2.weight.mul_(10)
        transformer.audio_caption_projection.linear_2.weight.mul_(10)
    return denoiser(transformer, seed)


def ltx2(seed: int = 0, **settings: Any) -> LTX2Pipeline:
    """Latents are an eighth as wide and high and half as long; 5 frames have 5 tokens of sound."""
    transformer, words = ltx2_transformer(seed, **settings), gemma_tokenizer()
    sides = ("video", "audio")
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=3,
        **{f"{side}_connector_num_attention_heads": 4 for side in sides},
        **{f"{side}_connector_attention_head_dim": 8 for side in sides},
        **{f"{side}_connector_num_layers": 1 for side in sides},
        **{f"{side}_connector_num_learnable_registers": 8 for side in sides},
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=16,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    vae.latents_mean += 0.1 * torch.arange(16)
    vae.latents_std += 0.1 * torch.arange(16)
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=16, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=32
    )
    vocoder = LTX2Vocoder(
        in_channels=64, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return LTX2Pipeline(
        transformer=transformer,
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=gemma3(len(words)),
        tokenizer=words,
        connectors=connectors.eval(),
        vocoder=vocoder.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024
        ),
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {"ltx2": ltx2}
SIZES = {"ltx2": 32}  # in pixels, of an image whose latents are 4x4
