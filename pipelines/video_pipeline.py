"""A small, untrained Wan pipeline, from text or an image to video, whose tokenizer knows the words of captions."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_letters, digits, punctuation
from typing import Any

import diffusers
import torch

from diffdistill.rng import seed_for

LATENT_CHANNELS = 16
RATIO = 4  # frames of a latent frame but the first, and pixels a side of a latent pixel
HEAD = 32  # channels of an attention head


def word_tokenizer(words: Iterable[str]) -> Any:
    """A T5Tokenizer in which each of the words is one token, and any other text one a character or more."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    letters = [(letter, -9.0) for letter in ascii_letters + digits + punctuation]
    whole = [(f"▁{word}", -2.0) for word in words]
    return T5Tokenizer([*special, *letters, *whole], extra_ids=0, model_max_length=512)


def new_video_pipeline(
    words: Iterable[str], scheduler: Any, *, width: int, layers: int, vae_widths: tuple[int, ...], text_width: int,
    seed: int, from_image: bool,
) -> Any:  # fmt: skip
    """The pipeline; its weights are a function of the seed, and the moments of its latents are yet to be measured.

    `from_image`: it begins with an image, whose latents the network reads as Wan 2.2 A14B does.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed_for(seed, "initial weights"))
    tokenizer = word_tokenizer(words)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=width // HEAD,
        attention_head_dim=HEAD,
        in_channels=2 * LATENT_CHANNELS + RATIO if from_image else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text_width,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=layers,
    )
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=text_width, d_kv=text_width // 4, d_ff=4 * text_width, num_layers=2,
        num_heads=4, dropout_rate=0.0,
    )  # fmt: skip
    kind: Any = diffusers.WanImageToVideoPipeline if from_image else diffusers.WanPipeline
    return kind(
        transformer=transformer, vae=_autoencoder(vae_widths), text_encoder=UMT5EncoderModel(text),
        tokenizer=tokenizer, scheduler=scheduler,
    )  # fmt: skip


def _autoencoder(widths: tuple[int, ...]) -> Any:
    levels = len(widths) - 1
    vae = diffusers.AutoencoderKLWan(
        base_dim=widths[0],
        z_dim=LATENT_CHANNELS,
        dim_mult=[width // widths[0] for width in widths],
        num_res_blocks=1,
        temperal_downsample=[True] * levels,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=RATIO,
        scale_factor_spatial=RATIO,
    )
    with torch.no_grad():  # latents of little noise from the start, as those of `text_pipeline`
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae
