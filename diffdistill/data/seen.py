"""What a reward sees of a latent teacher's samples: images, and the prompts that they are to show."""

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


def images_seen(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Samples (B, ...) in the teacher's units -> images (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1].

    The VAE of a latent teacher is loaded at the first call and stays on the samples' device. Samples of a network of
    one's own are given as they are.
    """
    family = FAMILIES.get(teacher.family)
    if family is None:
        return lambda samples: samples
    autoencoder = family.autoencoder
    if autoencoder is None:
        return lambda images: images.clamp(-1, 1)
    held: list[Any] = []

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        if not held:
            held.append(load_pipeline(local_folder(teacher.source), only=("vae",), device=latents.device).vae)
        vae = held[0]
        return autoencoder.decode(vae, latents.to(next(vae.parameters()).dtype)).float().clamp(-1, 1)

    return decode


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
