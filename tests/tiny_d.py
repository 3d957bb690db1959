"""Tiny pipelines of random weights in the real architectures: those that read an image beside a prompt."""

from collections.abc import Callable

import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
)
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, Qwen2VLImageProcessor

from tests.tiny_a import STABLE_DIFFUSION_BETAS, UNET, clip_config, clip_tokenizer, ddim, noise_unet, vae
from tests.tiny_b import flux, qwen_parts, qwen_tokenizer, wan_parts
from tests.tiny_processor import IMAGE, make


def flux_kontext(seed: int = 0) -> FluxKontextPipeline:
    return flux(seed, FluxKontextPipeline)


def instruct_pix2pix(seed: int = 0) -> StableDiffusionInstructPix2PixPipeline:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        **(UNET | {"in_channels": 8}),
    )
    return StableDiffusionInstructPix2PixPipeline(
        unet=noise_unet(unet, seed),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        scheduler=ddim(**STABLE_DIFFUSION_BETAS, timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def qwen_image_edit(seed: int = 0) -> QwenImageEditPipeline:
    """Its template is longer than the 64 tokens that the pipeline cuts off. A patch of the encoder is 4 by 4 pixels."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, "<|vision_start|>", "<|vision_end|>"]})
    names = {
        "image_token_id": IMAGE,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    reader = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1 << 20}
    )
    parts = qwen_parts(seed, tokenizer, {"patch_size": 4}, **tokens)
    return QwenImageEditPipeline(**parts, processor=make(reader, tokenizer))


def wan_i2v(seed: int = 0, inside: bool = False, boundary: float | None = None) -> WanImageToVideoPipeline:
    """As Wan 2.1; without an image encoder as Wan 2.2 TI2V, with the image `inside`, or A14B, with a `boundary`."""
    torch.manual_seed(seed)
    seeing = not inside and boundary is None
    settings = {"in_channels": 16 if inside else 36}
    parts = wan_parts(seed, boundary, **settings, **({"image_dim": 16, "added_kv_proj_dim": 32} if seeing else {}))
    if seeing:
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        parts["image_encoder"] = CLIPVisionModel(vision).eval()
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return WanImageToVideoPipeline(**parts, expand_timesteps=inside)


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux_kontext": flux_kontext,
    "instruct_pix2pix": instruct_pix2pix,
    "qwen_image_edit": qwen_image_edit,
    "wan_i2v": wan_i2v,
}
# In pixels, of an image whose latents are 8x8.
SIZES = {"flux_kontext": 16, "instruct_pix2pix": 16, "qwen_image_edit": 16, "wan_i2v": 32}
