"""The tiny pipelines, one for each family and more, and the prompts that are encoded with them."""

import inspect
from functools import partial
from typing import Any

import diffusers
import pytest

from tests import tiny, tiny_a

BUILDERS = {
    **tiny.PIPELINES,
    "sd_v": partial(tiny_a.stable_diffusion, prediction_type="v_prediction", zero_snr=True),
}
SIZES = {**tiny.SIZES, "sd_v": tiny_a.SIZES["stable_diffusion"]}
PROMPTS = ["a red square", "a blue circle on the left", "nothing much", "two dogs"]


def draw_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pipelines whose own sizes are those of the published models the sizes of the tiny ones."""
    kinds = ("Flux", "QwenImage", "Flux2Klein", "Flux2", "Chroma")
    for kind in (getattr(diffusers, f"{name}Pipeline") for name in kinds):
        small = property(lambda pipeline: 8, lambda pipeline, value: None)
        monkeypatch.setattr(kind, "default_sample_size", small, raising=False)
    for name, kind in (("sana", diffusers.SanaPipeline), ("krea2", diffusers.Krea2Pipeline)):
        call: Any = inspect.unwrap(kind.__call__)
        monkeypatch.setattr(call, "__defaults__", tuple(SIZES[name] if v == 1024 else v for v in call.__defaults__))
