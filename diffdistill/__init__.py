"""Distill a pretrained diffusion model into a generator that needs one to four steps.

    import diffdistill

    folder = diffdistill.distill(method="dmd2", preset="digits", out="runs/digits")

Heavy modules are imported on first use, so that `import diffdistill` and `diffdistill --help` are quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffdistill.errors import UserError
from diffdistill.version import __version__

_WHERE = {
    "distill": "commands.distill",
    "load_student": "families",
    "load_teacher": "families",
    "train_teacher": "commands.teacher",
    "open_data": "data.images",
    "Denoiser": "core.denoiser",
    "guided": "core.guidance",
}

__all__ = ["UserError", "__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
