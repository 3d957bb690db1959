"""Classifier-free guidance as a wrapper around a denoiser."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import NONE, Cond, Denoiser, Extra
from diffdistill.core.experts import experts_of
from diffdistill.core.prediction import Prediction, expand
from diffdistill.errors import UserError


def guide(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor, extra: Extra = NONE) -> Prediction:
    """y = y_null + scale (y_cond - y_null), in one batched call (Ho & Salimans 2022, arXiv:2207.12598).

    `scale` (B,) is Imagen's and diffusers' (1 is no guidance; w of the papers that write (1 + w) is scale - 1).
    Any output kind gives the same guidance, since all are affine in one another at a fixed x_t. What the family's
    pipeline does to a guided output (`rescale`) follows. The denoiser must have a null condition. Its `second_scale` is
    the scale of all samples whose times are the second of two networks'.
    """
    return guide_with_conditional(denoiser, x_t, t, cond, scale, extra)[0]


def guide_with_conditional(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor, extra: Extra = NONE
) -> tuple[Prediction, Prediction]:
    """`guide`, and the conditional prediction of the same call."""
    assert denoiser.null is not None
    null = denoiser.null(cond)
    both = {key: torch.cat([cond[key], null[key]]) for key in cond}
    pred = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, extra.twice())
    y_cond, y_null = pred.y.chunk(2)
    half = len(x_t)
    scale = denoiser.scales(x_t, t, scale)
    y = y_null + expand(scale, x_t) * (y_cond - y_null)
    if denoiser.rescale is not None:
        y = torch.where(expand(scale, x_t) == 1, y, denoiser.rescale(y, y_cond))
    conditional = Prediction(x_t, pred.t[:half], y_cond, pred.a[:half], pred.b[:half])
    return conditional.with_output(y), conditional


class Guided(nn.Module):
    """`guide` at one scale, as a denoiser.

    The scale applies at angles inside `interval` (Kynkaanniemi et al. 2024, arXiv:2404.07724) and is 1 outside.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__()
        if denoiser.null is None:
            raise UserError(
                f"guidance_scale: {scale} needs a teacher that was trained with a null condition, "
                "and this one has none; use guidance_scale 1"
            )
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.scale = scale
        self.interval = interval

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The guided prediction at x_t (B, ...) and the angles t (B,), as `Denoiser.forward`."""
        scale = torch.full_like(t, self.scale)
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((t >= low) & (t <= high), scale, torch.ones_like(t))
        return guide(self.denoiser, x_t, t, cond, scale)


def require_null(denoiser: Denoiser, what: str) -> None:
    """UserError for a denoiser without a null condition, which `what` needs."""
    if denoiser.null is None:
        raise UserError(f"teacher: {what} needs one that was trained with a null condition, and this one has none")


def with_second_scale(denoiser: Denoiser, scale: float, second: float | None) -> Denoiser:
    """The denoiser as it is guided by `scale` where the first of its two networks is asked, by `second` below.

    It shares all weights; None: by one scale, the denoiser itself. UserError for one network, or a `scale` that is off.
    """
    if second is None:
        return denoiser
    if experts_of(denoiser.network) is None:
        refuse_second_scale(second)
    check_second_scale(scale, second)
    denoiser = copy.copy(denoiser)
    denoiser.second_scale = second
    return denoiser


def refuse_second_scale(second: float | None, model: str = "this one") -> None:
    """UserError for the scale of the second network of a model that has one."""
    if second is not None:
        raise UserError(
            f"guidance_scale_2: {second:g} is for the second network of a model of two, such as Wan 2.2 A14B, and "
            f"{model} has one; leave it out"
        )


def check_second_scale(scale: float | None, second: float | None) -> None:
    """UserError for a second scale beside a first that guides nothing, with which stock pipelines leave out both."""
    if second is not None and (scale is None or scale <= 1):
        off = "there is none" if scale is None else f"it is {scale:g}"
        raise UserError(
            f"guidance_scale_2: {second:g} needs a guidance_scale above 1, and {off}; give --guidance-scale too"
        )


def guided(
    denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None, *, second: float | None = None
) -> nn.Module:
    """The denoiser itself at scale 1, which needs no second pass; else `Guided`. `second`: see `with_second_scale`."""
    denoiser = with_second_scale(denoiser, scale, second)
    return denoiser if scale == 1 else Guided(denoiser, scale, interval)
