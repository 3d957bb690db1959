"""Classifier-free guidance as a wrapper around a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .errors import UserError
from .prediction import Prediction, expand


class Guided(nn.Module):
    """y = y_null + scale (y_cond - y_null), in one batched call (Ho & Salimans 2022, arXiv:2207.12598).

    `scale` is Imagen's and diffusers' (1 is no guidance). It applies at angles inside `interval`
    (Kynkaanniemi et al. 2024, arXiv:2404.07724) and is 1 outside. Any output kind gives the same guidance,
    since all are affine in one another at a fixed x_t.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__()
        if denoiser.null is None:
            raise UserError(
                f"guidance_scale: {scale} needs a teacher that was trained with a null condition, "
                "and this one has none; use guidance_scale 1"
            )
        self.denoiser = denoiser
        self.null = denoiser.null
        self.schedule = denoiser.schedule
        self.scale = scale
        self.interval = interval

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        null = self.null(cond)
        both = {key: torch.cat([cond[key], null[key]]) for key in cond}
        pred = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        y_cond, y_null = pred.y.chunk(2)
        scale = torch.full_like(t, self.scale)
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((t >= low) & (t <= high), scale, torch.ones_like(t))
        half = len(x_t)
        y = y_null + expand(scale, x_t) * (y_cond - y_null)
        return Prediction(x_t, pred.t[:half], y, pred.a[:half], pred.b[:half])


def guided(denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None) -> nn.Module:
    """The denoiser itself at scale 1, which needs no second pass; else `Guided`."""
    return denoiser if scale == 1 else Guided(denoiser, scale, interval)
