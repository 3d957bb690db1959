"""What the methods that match distributions share: the score gap, and the fake score's training."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import denoising_loss, l1_normaliser, per_sample_mean
from diffdistill.core.ode import Denoise
from diffdistill.core.prediction import diffuse, expand


def distribution_matching_gradient(
    x: Tensor, x_t: Tensor, t: Tensor, cond: Cond, teacher: Denoise, fake_score: Denoise, normalise: bool
) -> tuple[Tensor, Tensor]:
    """The direction (B, ...) in which x is pushed away, and its mean size (B,) relative to |x - D_teacher|.

    The score gap s_fake - s_teacher is cos(t)/sin(t)^2 (D_fake - D_teacher), and x enters x_t with cos(t);
    so the gradient of KL(q_t || p_t) is cot(t)^2 (D_fake - D_teacher). DMD replaces cot(t)^2 by
    1/mean|x - D_teacher|. No gradient passes through either network.
    """
    with torch.no_grad():
        x0_teacher, x0_fake = teacher(x_t, t, cond).x0, fake_score(x_t, t, cond).x0
        gap = x0_fake - x0_teacher
        normaliser = l1_normaliser(x, x0_teacher)
        relative = per_sample_mean(gap.abs()) / normaliser
        weight = 1 / normaliser if normalise else torch.tan(t) ** -2
        return expand(weight, gap) * gap, relative


def fake_score_loss(fake_score: Denoise, x: Tensor, t: Tensor, eps: Tensor, cond: Cond, kind: str = "v") -> Tensor:
    """Denoising score matching of the fake score on the student's samples x (B, ...), which get no gradient."""
    x = x.detach()
    return denoising_loss(fake_score(diffuse(x, t, eps), t, cond), x, eps, kind)
