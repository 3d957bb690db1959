"""The one record of pipelines that people ask for and that no family reads yet, and why."""

from __future__ import annotations

from typing import NamedTuple


class Missing(NamedTuple):
    """Pipelines that no family reads."""

    models: str  #: what people know them by
    pipelines: tuple[str, ...]  #: by the names of their classes in diffusers
    reason: str  #: one line: what has to be there first


NOT_YET = (
    Missing(
        "Stable Diffusion inpainting",
        ("StableDiffusionInpaintPipeline",),
        "it reads a mask beside an image, which data do not have, and draws the image's latents anew at each call",
    ),
    Missing(
        "SDXL's refiner",
        ("StableDiffusionXLImg2ImgPipeline",),
        "it starts from another model's image; a student of the base alone needs no refiner",
    ),
    Missing(
        "CogVideoX, image to video",
        ("CogVideoXImageToVideoPipeline",),
        "its pipeline draws an image's latents from the autoencoder's posterior at each call, and data have one",
    ),
    Missing(
        "Kandinsky 5, text to image",
        ("Kandinsky5T2IPipeline",),
        "its pipeline draws at seven sizes of a megapixel alone, and a teacher's size is the user's; videos are read",
    ),
    Missing(
        "HiDream",
        ("HiDreamImagePipeline",),
        "its pipeline draws at one megapixel alone, and in the mode that draws its experts pass no gradient on",
    ),
    Missing(
        "Z-Image Omni",
        ("ZImageOmniPipeline",),
        "its pipeline gives images to its autoencoder in bfloat16 alone, so that in no other type it can be compared",
    ),
)
"""In the order in which `diffdistill families` says them."""


def reason_of(pipeline: str) -> str | None:
    """Why no family reads a pipeline of this class; None where nothing is known of it."""
    return next((entry.reason for entry in NOT_YET if pipeline in entry.pipelines), None)
