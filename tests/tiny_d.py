"""Tiny pipelines of random weights in the real architectures: those that read an image beside a prompt."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny_a import STABLE_DIFFUSION_BETAS, UNET, clip_config, clip_tokenizer, ddim, denoiser, noise_unet, vae
from tests.tiny_b import VISION, flux, qwen_config, qwen_parts, qwen_tokenizer, wan_parts
from tests.tiny_processor import IMAGE, make, make_of_texts


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


def qwen_image_edit(seed: int = 0, kind: Any = QwenImageEditPipeline, **settings: Any) -> Any:
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
    if settings:
        parts["transformer"] = denoiser(type(parts["transformer"])(**{**parts["transformer"].config, **settings}), seed)
    return kind(**parts, processor=make(reader, tokenizer))


def qwen_image_edit_plus(seed: int = 0, **settings: Any) -> QwenImageEditPlusPipeline:
    """Shows its text encoder images of another size than its autoencoder."""
    return qwen_image_edit(seed, QwenImageEditPlusPipeline, **settings)


def qwen_image21(seed: int = 0) -> QwenImage21Pipeline:
    """A latent pixel is 16 by 16 pixels, which the pipeline takes for granted."""
    torch.manual_seed(seed)
    transformer = QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**qwen_config(), "vocab_size": len(tokenizer), "head_dim": 16, "rope_parameters": rope},
        vision_config={**VISION, "deepstack_visual_indexes": [0]},
    )
    moments = {"latents_mean": [0.1 * k for k in range(16)], "latents_std": [1 + 0.1 * k for k in range(16)]}
    autoencoder = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, **moments
    )
    return QwenImage21Pipeline(
        transformer=denoiser(transformer, seed),
        vae=autoencoder.eval(),
        text_encoder=Qwen3VLForConditionalGeneration(config).eval(),
        processor=make_of_texts(tokenizer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        sample_sigmas=[1.0, 0.9, 0.5],
    )


def kandinsky5(seed: int = 0, **settings: Any) -> Kandinsky5T2VPipeline:
    """Lines of its template are tokens, so that it has hardly more than the 128 that the pipeline cuts off."""
    torch.manual_seed(seed)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=8,
        in_text_dim=32,
        in_text_dim2=32,
        time_dim=32,
        out_visual_dim=8,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **settings,
    )
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, "<|vision_start|>", "<|vision_end|>"]})
    template = Kandinsky5T2VPipeline(*[None] * 7).prompt_template
    tokenizer.add_tokens(template.split("\n")[1:6])
    autoencoder = AutoencoderKLHunyuanVideo(
        latent_channels=8,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    text = {**qwen_config(), "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config={**VISION, "fullatt_block_indexes": [0]}
    )
    return Kandinsky5T2VPipeline(
        transformer=denoiser(transformer, seed),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=make(Qwen2VLImageProcessor(), tokenizer),
        text_encoder_2=CLIPTextModel(clip_config(32)).eval(),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


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
    "qwen_image_edit_plus": qwen_image_edit_plus,
    "qwen_image21": qwen_image21,
    "kandinsky5": kandinsky5,
    "wan_i2v": wan_i2v,
}
# In pixels, of an image whose latents are 8x8.
SIZES = {
    "kandinsky5": 32,
    "qwen_image21": 64,
    "flux_kontext": 16,
    "instruct_pix2pix": 16,
    "qwen_image_edit": 16,
    "qwen_image_edit_plus": 16,
    "wan_i2v": 32,
}
