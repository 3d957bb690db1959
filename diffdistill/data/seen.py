"""What a reward or a discriminator sees of a latent teacher's samples: images, and a reward their prompts too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.encoded import KIND, Bucketed, Encoded
from diffdistill.data.images import open_data
from diffdistill.data.shards import read_index
from diffdistill.data.sources import prompts_of
from diffdistill.errors import UserError, shown
from diffdistill.families import FAMILIES, load_pipeline, local_folder
from diffdistill.players.teacher import Teacher


def decoder_of(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Latents (B, ...) in the teacher's units -> images (B, 3, H, W) or videos (B, 3, F, H, W), with a gradient.

    The VAE is loaded at the first call and stays on the latents' device; its weights have no gradient.
    """
    autoencoder = FAMILIES[teacher.family].autoencoder
    assert autoencoder is not None
    held: list[Any] = []

    def decode(latents: Tensor) -> Tensor:
        if not held:
            vae = load_pipeline(local_folder(teacher.source), only=("vae",), device=latents.device).vae
            held.append(vae.requires_grad_(False).eval())
        with torch.autocast(latents.device.type, enabled=False):
            return autoencoder.decode(held[0], latents.to(next(held[0].parameters()).dtype)).float()

    return decode


def images_seen(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Samples (B, ...) in the teacher's units -> images (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1].

    Of a latent teacher as `decoder_of` gives them. Samples of a network of one's own are given as they are.
    """
    family = FAMILIES.get(teacher.family)
    if family is None:
        return lambda samples: samples
    if family.autoencoder is None:
        return lambda images: images.clamp(-1, 1)
    decode = decoder_of(teacher)
    return lambda latents: decode(latents).clamp(-1, 1)


def with_texts(encoded: Encoded) -> Encoded:
    """The folder, whose examples say their prompts too; they are read again where the folder was made of them.

    Raises UserError where that is no longer there, or is another now.
    """
    folder, settings, index = shown(str(encoded.folder)), encoded.settings, read_index(KIND, encoded.folder)
    if isinstance(encoded, Bucketed) or "asked" in settings:
        how = "in buckets" if isinstance(encoded, Bucketed) else "of a stream"
        raise UserError(f"prompts: {folder} was made {how}, whose prompts a reward cannot be told; encode without that")
    spec, count = str(index.get("prompts") or index.get("data")), settings["count"]
    try:
        if index.get("prompts"):
            texts, _, source = prompts_of(spec, count, streaming=False)
            held = tuple(texts(range(count)))
        else:
            data = open_data(spec, resolution=tuple(settings["pixels"]), channels=3)
            rows = torch.arange(count).split(256)
            held = tuple(text for part in rows for text in data.get(part).captions or ())
            source = data.fingerprint
    except UserError as error:
        raise UserError(f"prompts: a reward reads those that {folder} was made of, and {error}") from None
    if source != settings["source"] or len(held) != count:
        raise UserError(f"prompts: {shown(spec)} is another than {folder} was made of; encode it again")
    return replace(encoded, texts=lambda indices: tuple(held[i] for i in indices.tolist()))
