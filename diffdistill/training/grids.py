"""Grids of samples, drawn while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffdistill.data.encoded import decoder
from diffdistill.data.examples import Examples, to_device
from diffdistill.families import FAMILIES
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators


def grid_writer(
    out: Path,
    sampler_now: Callable[[], Sampler],
    teacher: Teacher,
    prompts: Examples | None = None,
    *,
    saving: bool = True,
) -> Callable[[int], None] | None:
    """step -> writes <out>/samples/step-<step>.png, always of the same noise and conditions: the first `prompts`.

    None where samples are no pictures: neither latents with their decoder, nor (1 or 3, H, W). Without `saving` they
    are drawn, for another process that cannot do it alone, and that is all.
    """
    from diffdistill.pictures import image_grid, save_png

    columns = min(teacher.num_classes or 8, 10)
    entry = FAMILIES.get(teacher.family)
    latent = entry is not None and entry.autoencoder is not None
    if not latent and (len(teacher.shape) != 3 or teacher.shape[0] not in (1, 3)):
        return None
    count = 8 if latent else 8 * columns  # large images, and a decoder
    decode = decoder(teacher) if saving else None

    def write(step: int) -> None:
        sampler = sampler_now()
        device = next(sampler.denoiser.parameters()).device
        cond = {} if teacher.num_classes is None else {"class_labels": torch.arange(count, device=device) % columns}
        if prompts is not None:
            cond = to_device(prompts.get(torch.arange(count) % len(prompts)), device).cond
        samples = sampler(teacher.shape, cond, image_generators(0, range(count)))
        if decode is None:
            return
        images = decode(samples).float().clamp(-1, 1)
        picture = image_grid(images, columns, scale=max(1, 32 // images.shape[-1]))
        save_png(picture, out / "samples" / f"step-{step:08d}.png")

    return write
