"""Tiny pipelines of random weights in the real architectures: UNets, DiT, PixArt-Sigma, Sana, and what they share."""

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PRINTABLE = sorted(set(string.printable) - set(string.whitespace))


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """One token a byte, in the order of the real vocabulary: in a word ("!" is 0), at its end, start, end of text."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One token a printable character, after pad, end of text, unknown and the start of a word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer([*special, *((letter, -3.0) for letter in PRINTABLE)], extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a printable character, bytes for the rest; text starts with <bos>."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *PRINTABLE, *(f"<0x{i:02X}>" for i in range(256))]
    return GemmaTokenizer({token: i for i, token in enumerate(tokens)}, [], add_bos_token=True, model_max_length=512)


def t5_encoder(width: int = 32) -> T5EncoderModel:
    """T5 v1.1 of two layers; the tokens are those of t5_tokenizer()."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()


def gemma_encoder() -> Gemma2Model:
    """Gemma 2 of two layers; the tokens are those of gemma_tokenizer()."""
    config = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    return Gemma2Model(config).eval()


def clip_config(width: int = 32, **settings: Any) -> CLIPTextConfig:
    """Of a two-layer CLIP text encoder, with or without projection; the tokens are those of clip_tokenizer()."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def vae(latent_channels: int = 4, blocks: int = 2, **settings: Any) -> AutoencoderKL:
    """Of two blocks: images twice as wide as the latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * (blocks - 1) + (16,),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=latent_channels,
        **{"scaling_factor": 0.18215, **settings},
    ).eval()


def redraw_zeros(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> nn.Module:
    """The module, with every parameter that is zero throughout (so gates and last layers) drawn from N(0, std²)."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=std, generator=generator)
    return module


def ddim(**settings: Any) -> DDIMScheduler:
    """Linear betas from 0.0001 to 0.02 and no clipping, unless told otherwise."""
    return DDIMScheduler(**{"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, **settings})


STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TRANSFORMER = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def denoiser(network: nn.Module, seed: int) -> Any:
    """In evaluation mode, with nothing left at zero."""
    return redraw_zeros(network, torch.Generator().manual_seed(seed)).eval()


@torch.no_grad()
def noise_unet(network: Any, seed: int) -> Any:
    """The denoiser, its output near its input: the noise at large t, where dividing by alpha blows up any other output.

    Channels 2i and 2i + 1 carry x_i and -x_i from conv_in over the last skip to conv_out: silu(x) - silu(-x) = x.
    """
    n, resnet = network.config.out_channels, network.up_blocks[-1].resnets[-1]
    pairs = torch.stack([torch.eye(n), -torch.eye(n)], 1).flatten(0, 1)
    network.conv_in.weight[: 2 * n] = 0
    network.conv_in.weight[: 2 * n, :n, 1, 1] = pairs
    width = network.conv_in.out_channels
    resnet.conv_shortcut.weight[: 2 * n] *= 0.3
    resnet.conv_shortcut.weight[: 2 * n, -width:, 0, 0] = torch.eye(2 * n, width)
    resnet.conv2.weight[: 2 * n] *= 0.3
    network.conv_out.weight[:, : 2 * n] *= 0.3
    network.conv_out.weight[:, : 2 * n, 1, 1] = pairs.T
    return denoiser(network, seed)


@torch.no_grad()
def noise_transformer(network: Any, last: nn.Linear, seed: int, **conditions: Any) -> Any:
    """The denoiser, its output near its input as in noise_unet: its last layer fitted to 64 samples at t = 999.

    The bias of the embedding, larger than the patches, keeps the layer norms nearly linear.
    """
    p, n, width = network.config.patch_size, network.config.in_channels, last.in_features
    nn.init.orthogonal_(network.pos_embed.proj.weight, 8.0)
    network.pos_embed.proj.bias.copy_(128 * torch.randn(width) / width**0.5)
    x, features = torch.randn(64, n, 8, 8), []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    denoiser(network, seed)(x, timestep=torch.full((64,), 999), **conditions)
    hook.remove()
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1)
    inputs = nn.functional.pad(features[0].reshape(-1, width), (0, 1), value=1.0).double()
    gram = inputs.T @ inputs + 0.01 * torch.eye(width + 1)  # ridge: a layer norm leaves a direction empty
    fit = torch.linalg.solve(gram, inputs.T @ patches.double()).T.unflatten(0, (p, p, n))
    fit = fit.mul(1024).round() / 1024  # hides rounding errors, so that builds agree
    last.weight.view(p, p, -1, width)[:, :, :n] = fit[..., :-1]
    last.bias.view(p, p, -1)[:, :, :n] = fit[..., -1]
    return network


def stable_diffusion(
    seed: int = 0, prediction_type: str = "epsilon", zero_snr: bool = False
) -> StableDiffusionPipeline:
    """Trailing steps, so that they start at t = 999; zero_snr needs another prediction than epsilon."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        **UNET,
    )
    return StableDiffusionPipeline(
        unet=noise_unet(unet, seed),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        scheduler=ddim(
            **STABLE_DIFFUSION_BETAS,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        **UNET,
    )
    return StableDiffusionXLPipeline(
        unet=noise_unet(unet, seed),
        vae=vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(hidden_act="gelu")).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )


def dit(seed: int = 0) -> DiTPipeline:
    """Classes 0 to 999 with labels for ten; the pipeline fixes the null class, 1000."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **TRANSFORMER)
    for block in transformer.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.1)
    network = noise_transformer(transformer, transformer.proj_out_2, seed, class_labels=torch.randint(1001, (64,)))
    labels = {i: f"digit {i}, {i}" for i in range(10)}
    pipeline = DiTPipeline(
        transformer=network,
        vae=vae(),
        scheduler=ddim(),
        id2label=labels,
    )
    pipeline.register_to_config(id2label=labels)  # as in the published folder; diffusers itself would not save them
    return pipeline


def pixart_sigma(seed: int = 0) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
        **TRANSFORMER,
    )
    conditions = {
        "encoder_hidden_states": torch.randn(64, 4, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return PixArtSigmaPipeline(
        transformer=noise_transformer(transformer, transformer.proj_out, seed, **conditions),
        vae=vae(scaling_factor=0.13025),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=ddim(timestep_spacing="trailing"),
    )


def sana(seed: int = 0) -> SanaPipeline:
    """Images four times as wide as the latents: the pipeline takes multiples of 32 only."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        **TRANSFORMER,
    )
    halves = ("encoder", "decoder")
    autoencoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **{f"{half}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for half in halves},
        **{f"{half}_block_out_channels": (8, 16, 16) for half in halves},
        **{f"{half}_layers_per_block": (1, 1, 1) for half in halves},
        **{f"{half}_qkv_multiscales": ((), (), (5,)) for half in halves},
    )
    return SanaPipeline(
        transformer=denoiser(transformer, seed),
        vae=autoencoder.eval(),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def unet2d_ddim(seed: int = 0) -> DDIMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **UNET
    )
    return DDIMPipeline(unet=noise_unet(unet, seed), scheduler=ddim())


def consistency_model(seed: int = 0) -> ConsistencyModelPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10,
        attn_norm_num_groups=8,
        **UNET,
    )
    return ConsistencyModelPipeline(unet=denoiser(unet, seed), scheduler=CMStochasticIterativeScheduler())


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "dit": dit,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "unet2d_ddim": unet2d_ddim,
    "consistency_model": consistency_model,
}
# In pixels, of an image whose latents (or itself, for the last two) are 8x8. DiT and those two take no size.
SIZES = {
    "stable_diffusion": 16,
    "sdxl": 16,
    "dit": 16,
    "pixart_sigma": 16,
    "sana": 32,
    "unet2d_ddim": 8,
    "consistency_model": 8,
}
