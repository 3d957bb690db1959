"""A small autoencoder for a latent model, and the model's folder with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny

from diffdistill.families import read_json
from diffdistill.files import atomic_folder

INDEX = "model_index.json"
LEAST = 1  # residual blocks at the size of the image


def new_autoencoder(own: Mapping[str, Any], width: int, blocks: int) -> AutoencoderTiny:
    """An untrained one with the latents of the autoencoder whose config `own` is, as the pipeline scales them."""
    levels = len(own["block_out_channels"])
    widths, inner = (width,) * levels, (blocks,) * (levels - 1)
    return AutoencoderTiny(
        in_channels=own["in_channels"],
        out_channels=own["out_channels"],
        latent_channels=own["latent_channels"],
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(LEAST, *inner),
        num_decoder_blocks=(*inner, LEAST),
    ).train()


def with_autoencoder(source: Path, folder: Path, small: AutoencoderTiny, counts: Sequence[int]) -> Path:
    """A copy of the pipeline in `source` whose `vae` is the small one, whole or not at all.

    `counts` are the parameters of both decoders, the small one's first, which the model card says.
    """
    with atomic_folder(folder, INDEX) as made:
        shutil.copytree(source, made, dirs_exist_ok=True, ignore=_autoencoder_of(source))
        small.eval().save_pretrained(made / "vae", safe_serialization=True)
        index = read_json(source / INDEX) | {"vae": ["diffusers", type(small).__name__]}
        (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        card = made / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        line = (
            f"Its autoencoder is a small one, made by `diffdistill decoder`: the decoder has {counts[0]:,} parameters "
            f"in place of {counts[1]:,}, and learned the images of the other.\n"
        )
        card.write_text(f"{text.rstrip()}\n\n{line}".lstrip(), encoding="utf-8")
    return folder


def _autoencoder_of(source: Path) -> Callable[[str, list[str]], list[str]]:
    """What copytree leaves out: the autoencoder that is replaced, and a snapshot's own bookkeeping."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if os.path.samefile(folder, source) and name in ("vae", ".cache", ".git", INDEX)]

    return ignored
