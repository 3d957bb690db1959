"""The tiny pipelines, one for each family and more, and the prompts that are encoded with them."""

from functools import partial

from tests import tiny_a, tiny_b

BUILDERS = {
    **tiny_a.PIPELINES,
    **tiny_b.PIPELINES,
    "sd_v": partial(tiny_a.stable_diffusion, prediction_type="v_prediction", zero_snr=True),
}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES, "sd_v": tiny_a.SIZES["stable_diffusion"]}
PROMPTS = ["a red square", "a blue circle on the left", "nothing much", "two dogs"]
