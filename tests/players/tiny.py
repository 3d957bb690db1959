"""The tiny pipelines, one for each family and more, and the prompts that are encoded with them."""

import inspect
from functools import partial
from typing import Any

import diffusers
import pytest

from tests import tiny_a, tiny_b

BUILDERS = {
    **tiny_a.PIPELINES,
    **tiny_b.PIPELINES,
    "sd_v": partial(tiny_a.stable_diffusion, prediction_type="v_prediction", zero_snr=True),
}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES, "sd_v": tiny_a.SIZES["stable_diffusion"]}
PROMPTS = ["a red square", "a blue circle on the left", "nothing much", "two dogs"]


def draw_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pipelines whose own sizes are those of the published models the sizes of the tiny ones."""
    for kind in (diffusers.FluxPipeline, diffusers.QwenImagePipeline):
        small = property(lambda pipeline: 8, lambda pipeline, value: None)
        monkeypatch.setattr(kind, "default_sample_size", small, raising=False)
    call: Any = inspect.unwrap(diffusers.SanaPipeline.__call__)
    monkeypatch.setattr(call, "__defaults__", tuple(SIZES["sana"] if v == 1024 else v for v in call.__defaults__))
