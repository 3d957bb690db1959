"""Tiny pipelines of random weights in the real architectures: SD3, FLUX, Qwen-Image, Z-Image and Wan."""

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny_a import clip_config, clip_tokenizer, denoiser, t5_encoder, t5_tokenizer, vae

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# QwenImagePipeline drops the first 34 tokens of what it encodes: its template up to the prompt, one token a word.
QWEN_WORDS = re.findall(
    r" ?\w+",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships"
    " of the objects and background:",
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, a word of the two templates, or a special token."""
    tokenizer = Qwen2Tokenizer(
        {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))},
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    tokenizer.add_tokens(["system", "user", "assistant", *QWEN_WORDS])
    return tokenizer


def qwen_config() -> dict[str, Any]:
    """Of a two-layer Qwen language model; the tokens are those of qwen_tokenizer()."""
    return {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """As in 3.5: normalized queries and keys, and a second self-attention in the first layer."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=denoiser(transformer, seed),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(32, hidden_act="gelu")).eval(),
        text_encoder_3=t5_encoder(64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(seed: int = 0, kind: type[Any] = FluxPipeline) -> Any:
    """As FLUX.1-dev: told the guidance."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return kind(
        transformer=denoiser(transformer, seed),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(32)).eval(),
        text_encoder_2=t5_encoder(64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def qwen_vae() -> AutoencoderKLQwenImage:
    """Images twice as wide as the latents."""
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]).eval()


def wan_vae() -> AutoencoderKLWan:
    """Videos four times as wide and as long as the latents."""
    return AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], scale_factor_spatial=4
    ).eval()


def qwen_parts(seed: int, tokenizer: Any, vision: dict[str, Any] | None = None, **tokens: int) -> dict[str, Any]:
    """Those of a pipeline of Qwen-Image."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    config = Qwen2_5_VLConfig(
        text_config={
            **qwen_config(),
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={**VISION, "fullatt_block_indexes": [0], **(vision or {})},
        **tokens,
    )
    return {
        "transformer": denoiser(transformer, seed),
        "vae": qwen_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    }


def qwen_image(seed: int = 0) -> QwenImagePipeline:
    return QwenImagePipeline(**qwen_parts(seed, qwen_tokenizer()))


def z_image(seed: int = 0) -> ZImagePipeline:
    """As Z-Image-Turbo. Narrow, because the middle of the time embedding is always 1024 wide."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    )
    return ZImagePipeline(
        transformer=denoiser(transformer, seed),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(Qwen3Config(**qwen_config(), head_dim=16)).eval(),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_transformer(seed: int, **settings: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 64, "num_layers": 2}
    transformer = WanTransformer3DModel(**size, rope_max_seq_len=32, **settings)
    with torch.no_grad():  # a prompt is a few of 512 tokens, and the rest are alike: it must be loud to be heard
        transformer.condition_embedder.text_embedder.linear_2.weight.mul_(10)
    return denoiser(transformer, seed)


def wan_parts(seed: int, boundary: float | None = None, **settings: Any) -> dict[str, Any]:
    """Those of a pipeline of Wan, whose network has these settings besides; as Wan 2.2 A14B two with a `boundary`.

    Latents are a quarter as long and as wide; the pipeline takes multiples of 16.
    """
    two = {} if boundary is None else {"transformer_2": wan_transformer(seed + 1, **settings)}
    transformer = wan_transformer(seed, **settings)
    tokenizer = t5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "boundary_ratio": boundary,
        **two,
    }


def wan(seed: int = 0, boundary: float | None = None) -> WanPipeline:
    """As Wan 2.1, or with a `boundary` as Wan 2.2 A14B."""
    return WanPipeline(**wan_parts(seed, boundary))


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd3": sd3,
    "flux": flux,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "wan": wan,
}
# In pixels, of an image whose latents are 8x8; Wan also takes num_frames, and FRAMES make two of latents.
SIZES = {"sd3": 16, "flux": 16, "qwen_image": 16, "z_image": 16, "wan": 32}
FRAMES = 5
