"""A small, untrained Stable Diffusion pipeline whose tokenizer knows the words of given captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import diffusers
import torch

from diffdistill.rng import seed_for

TOKENS = 16  # of a caption, with start and end
LATENT_CHANNELS = 4


def tokenizer_of(words: Iterable[str]) -> Any:
    """A CLIPTokenizer in which each of the words is one token, and any other text one token a byte or more."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for part in parts.values() for pair in pairwise(part)):
        pair = max(sorted(counts), key=counts.__getitem__)
        merges.append(pair)
        for word, part in parts.items():
            joined: list[str] = []
            while part:
                size = 2 if tuple(part[:2]) == pair else 1
                joined.append("".join(part[:size]))
                part = part[size:]
            parts[word] = joined
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, pad_token="<|endoftext|>", model_max_length=TOKENS)


def new_text_pipeline(
    words: Iterable[str],
    scheduler: Any,
    *,
    pixels: int,
    widths: tuple[int, ...],
    layers: int,
    attention: tuple[int, ...],
    dropout: float,
    vae_widths: tuple[int, ...],
    text_width: int,
    seed: int,
    edits: bool = False,
) -> Any:
    """The pipeline; its weights are a function of the seed, and its scaling_factor is yet to be measured.

    `edits`: it is InstructPix2Pix, whose UNet also reads the latents of an image.
    """
    from transformers import CLIPTextModel

    torch.manual_seed(seed_for(seed, "initial weights"))
    tokenizer = tokenizer_of(words)
    unet = _unet(pixels // 2 ** (len(vae_widths) - 1), widths, layers, attention, dropout, text_width, edits)
    vae = _autoencoder(pixels, vae_widths)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)
    scheduler.register_to_config(steps_offset=1)  # which the pipeline wants, and trailing steps do not look at
    kind: Any = diffusers.StableDiffusionInstructPix2PixPipeline if edits else diffusers.StableDiffusionPipeline
    return kind(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, text_width)),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _text_config(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(
    side: int, widths: tuple[int, ...], layers: int, attention: tuple[int, ...], dropout: float, text_width: int,
    edits: bool,
) -> Any:  # fmt: skip
    levels = range(len(widths))
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        in_channels=2 * LATENT_CHANNELS if edits else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # which is the number of heads in this class
        norm_num_groups=8,
        dropout=dropout,
    )


def _autoencoder(pixels: int, widths: tuple[int, ...]) -> Any:
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        norm_num_groups=8,
        sample_size=pixels,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # latents of little noise from the start: those of variance 1 drown the picture for long
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae
