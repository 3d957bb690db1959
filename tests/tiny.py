"""All tiny pipelines, one for each family and more: how each is made, and its size in pixels."""

from collections.abc import Callable
from typing import Any

from tests import tiny_a, tiny_b, tiny_c, tiny_d, tiny_e

PIPELINES: dict[str, Callable[..., Any]] = {
    **tiny_a.PIPELINES,
    **tiny_b.PIPELINES,
    **tiny_c.PIPELINES,
    **tiny_d.PIPELINES,
    **tiny_e.PIPELINES,
}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES, **tiny_c.SIZES, **tiny_d.SIZES, **tiny_e.SIZES}
FRAMES = tiny_b.FRAMES
