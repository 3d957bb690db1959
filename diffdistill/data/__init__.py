"""What a training reads: images, prompts, latents, noise-image pairs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffdistill.data.examples import Example, Examples
    from diffdistill.data.images import open_data

_MODULES = {"Example": "examples", "Examples": "examples", "open_data": "images"}

__all__ = ["Example", "Examples", "open_data"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
