"""Losses that methods share, as pure functions; every tensor is (B, ...) unless said otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.core.prediction import Prediction, expand


def per_sample_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over all but the first dimension."""
    return x.flatten(1).mean(1)


def denoising_loss(pred: Prediction, x0: Tensor, eps: Tensor, kind: str = "v") -> Tensor:
    """Denoising score matching, the mean over batch and elements.

    kind 'v' is the squared error of v, which is EDM's weight (sigma^2 + sd^2)/(sigma sd)^2 on x0 (Karras et
    al. 2022, table 1) and SNR + 1 (Salimans & Ho 2022, section 4); 'epsilon' is DDPM's simple loss.
    """
    if kind == "v":
        cos, sin = expand(torch.cos(pred.t), x0), expand(torch.sin(pred.t), x0)
        return F.mse_loss(pred.v, cos * eps - sin * x0)
    if kind == "epsilon":
        return F.mse_loss(pred.eps, eps)
    raise ValueError(f"kind {kind!r} is not 'v' or 'epsilon'")


def gradient_injection(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is grad / x.numel(): 0.5 mean|x - sg[x - grad]|^2."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def l1_normaliser(x: Tensor, x0_teacher: Tensor) -> Tensor:
    """(B,) mean|x - D_teacher|, detached: DMD's weight makes the gradient's size independent of the level.

    Clamped at 1e-5, as SiD's and rCM's code does, so that a sample that equals its denoised self is no 0/0.
    """
    return per_sample_mean((x - x0_teacher).abs()).clamp_min(1e-5).detach()


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """(B,) sqrt(|x - y|^2 + c^2) - c, with the norm over the whole sample (Song & Dhariwal 2023, eq. 8)."""
    return torch.sqrt((x - y).flatten(1).square().sum(1) + c**2) - c


def sid_loss(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, alpha: float, normalise: bool) -> Tensor:
    """(B,) <Delta, (D_phi - x) - alpha Delta>/n, Delta = D_phi - D_psi, means of elements; all (B, ...), none detached.

    Score identity distillation (Zhou et al. 2024, arXiv:2404.04057). n = mean|x - D_phi| of each sample, detached; 1
    without the normaliser.
    """
    delta = x0_teacher - x0_fake
    products = per_sample_mean(delta * ((x0_teacher - x) - alpha * delta))
    return products / l1_normaliser(x, x0_teacher) if normalise else products


def reweighted_square(x: Tensor, y: Tensor, c: float) -> Tensor:
    """(B,) e^2/c with the weight ((e/c)^2 + 1)^(-1/2), which gets no gradient; e is the root mean square of x - y.

    Close to e where it is more than c (Barron 2019, arXiv:1701.03077, alpha = 1, as TwinFlow's code has it).
    """
    error = per_sample_mean((x - y).square())
    return error * ((error / (c**2 + 1e-8) + 1) ** -0.5).detach() / c


def gan_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Non-saturating logistic loss; real and fake are logits (Goodfellow et al. 2014)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The same by the hinge, max(0, 1 - real) + max(0, 1 + fake), averaged (Lim & Ye 2017, arXiv:1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def gan_generator_loss(fake: Tensor) -> Tensor:
    """-log sigmoid of the logits of generated samples, averaged."""
    return F.softplus(-fake).mean()


def gradient_ratio(first: Tensor, other: Tensor, network: nn.Module) -> Tensor:
    """|d first/dw| over |d other/dw|, without a gradient, for the last trained matrix w that the network lists.

    What brings two losses to one size (Esser et al. 2021, arXiv:2012.09841, eq. 7).
    """
    w = [p for p in network.parameters() if p.ndim > 1 and p.requires_grad][-1]
    one, two = (torch.autograd.grad(loss, w, retain_graph=True)[0].norm() for loss in (first, other))
    return one / (two + 1e-4)
