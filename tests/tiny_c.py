"""Tiny pipelines of random weights in the real architectures: FLUX.2, Chroma, Krea 2, SANA-Video and others."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny_a import (
    TRANSFORMER,
    ddim,
    denoiser,
    gemma_encoder,
    gemma_tokenizer,
    noise_transformer,
    t5_encoder,
    t5_tokenizer,
    vae,
)
from tests.tiny_b import CHAT_TEMPLATE, VISION, qwen_config, qwen_tokenizer, qwen_vae, wan_vae


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


def flux2_dev(seed: int = 0) -> Flux2Pipeline:
    """The pipeline reads layers 10, 20 and 30 of its text encoder, and of its processor it asks a template alone."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m.content", "m.content[0].text")
    config = Mistral3Config(
        text_config={**qwen_config(), **NARROW, "model_type": "mistral", "num_hidden_layers": 30},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2, **NARROW},
    )
    return Flux2Pipeline(
        **flux2_parts(seed, guidance=True),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )


def chroma(seed: int = 0) -> ChromaPipeline:
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=denoiser(transformer, seed),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def aura_flow(seed: int = 0) -> AuraFlowPipeline:
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=144,
    )
    with torch.no_grad():  # a prompt is a few of 256 tokens, and the rest are zeros: it must be loud to be heard
        transformer.joint_transformer_blocks[0].attn.add_v_proj.weight.mul_(100)
        transformer.joint_transformer_blocks[0].norm1.linear.weight.mul_(4)  # as adapters of attention must be
    tokenizer = t5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    return AuraFlowPipeline(
        transformer=denoiser(transformer, seed),
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def pixart_alpha(seed: int = 0, sample_size: int = 8) -> PixArtAlphaPipeline:
    """A network of 128 latent pixels takes the image's size and shape, of any image."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        cross_attention_dim=36,
        caption_channels=32,
        **(TRANSFORMER | {"sample_size": sample_size, "attention_head_dim": 18}),
    )
    conditions = {
        "encoder_hidden_states": torch.randn(64, 4, 32),
        "added_cond_kwargs": {"resolution": torch.full((64, 2), 16.0), "aspect_ratio": torch.ones(64, 1)},
    }
    return PixArtAlphaPipeline(
        transformer=noise_transformer(transformer, transformer.proj_out, seed, **conditions),
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=ddim(timestep_spacing="trailing"),
    )


def krea2(seed: int = 0, is_distilled: bool = False) -> Krea2Pipeline:
    """The pipeline reads the embeddings and two layers of its text encoder."""
    torch.manual_seed(seed)
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**qwen_config(), "head_dim": 16, "rope_parameters": rope},
        vision_config={**VISION, "deepstack_visual_indexes": [0]},
    )
    return Krea2Pipeline(
        transformer=denoiser(transformer, seed),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(config).eval(),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(0, 1, 2),
        is_distilled=is_distilled,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
    )


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    """Images are eight times as wide as the latents, which the pipeline takes for granted."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(256, 16, 16),
        cap_feat_dim=32,
    )
    with torch.no_grad():  # its time is a number up to 1: it must be loud to be heard
        transformer.time_caption_embed.timestep_embedder.linear_1.weight.mul_(10)
    return Lumina2Pipeline(
        transformer=denoiser(transformer, seed),
        vae=vae(16, blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def sana_video(seed: int = 0) -> SanaVideoPipeline:
    torch.manual_seed(seed)
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        rope_max_seq_len=32,
    )
    return SanaVideoPipeline(
        transformer=denoiser(transformer, seed),
        vae=wan_vae(),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def hunyuan_video15(seed: int = 0) -> HunyuanVideo15Pipeline:
    """Its template is longer than the 108 tokens that the pipeline cuts off."""
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * 8 + 1,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    with torch.no_grad():  # a prompt is a part of 1985 tokens: it must be loud to be heard
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(30)
    autoencoder = AutoencoderKLHunyuanVideo15(
        latent_channels=8, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLTextConfig(**(qwen_config() | {"num_hidden_layers": 3}), rope_parameters=rope)
    return HunyuanVideo15Pipeline(
        transformer=denoiser(transformer, seed),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLTextModel(config).eval(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def cogvideox(seed: int = 0, **settings: Any) -> CogVideoXPipeline:
    """As CogVideoX-5B with the shift of 2B; 2B itself is not rotary, and 1.5 has two frames in a patch."""
    torch.manual_seed(seed)
    rotary = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False}
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        **(rotary | settings),
    )
    with torch.no_grad():  # a prompt is a few of 226 tokens: it must be loud to be heard
        transformer.patch_embed.text_proj.weight.mul_(30)
    blocks = 3
    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * blocks,
        up_block_types=("CogVideoXUpBlock3D",) * blocks,
        block_out_channels=(8, 8, 16),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return CogVideoXPipeline(
        transformer=denoiser(transformer, seed),
        vae=autoencoder.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=CogVideoXDDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux2": flux2,
    "flux2_dev": flux2_dev,
    "chroma": chroma,
    "aura_flow": aura_flow,
    "pixart_alpha": pixart_alpha,
    "krea2": krea2,
    "lumina2": lumina2,
    "sana_video": sana_video,
    "cogvideox": cogvideox,
    "hunyuan_video15": hunyuan_video15,
}
# In pixels, of an image whose latents are 8x8.
SIZES = {
    "flux2": 32,
    "flux2_dev": 32,
    "chroma": 16,
    "aura_flow": 16,
    "pixart_alpha": 16,
    "krea2": 16,
    "lumina2": 64,
    "sana_video": 32,
    "cogvideox": 32,
    "hunyuan_video15": 32,
}
