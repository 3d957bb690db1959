"""All tiny pipelines, one for each family and more: how each is made, and its size in pixels."""

from collections.abc import Callable
from typing import Any

from tests import tiny_a, tiny_b

PIPELINES: dict[str, Callable[..., Any]] = {**tiny_a.PIPELINES, **tiny_b.PIPELINES}
SIZES = {**tiny_a.SIZES, **tiny_b.SIZES}
FRAMES = tiny_b.FRAMES
