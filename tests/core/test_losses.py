"""Shared losses against explicit formulas, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from diffdistill.core.losses import (
    denoising_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    gradient_injection,
    l1_normaliser,
    per_sample_mean,
    pseudo_huber,
)
from diffdistill.core.prediction import Prediction


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: Tensor, want: Tensor | float) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), atol=1e-13, rtol=1e-12)


def noised() -> tuple[Prediction, Tensor, Tensor, Tensor, Tensor]:
    """A prediction of x0 that is off by an error (4, 2, 3) at four angles."""
    x0, eps, error = randn(3, 4, 2, 3)
    t = torch.tensor([0.3, 0.7, 1.1, 1.4], dtype=torch.float64)
    cos, sin = (f(t)[:, None, None] for f in (torch.cos, torch.sin))
    pred = Prediction(cos * x0 + sin * eps, t, x0 + error, torch.ones_like(t), torch.zeros_like(t))
    return pred, x0, eps, error, t


def test_denoising_loss_of_v_weighs_x0_with_snr_plus_one() -> None:
    pred, x0, eps, error, t = noised()
    close(denoising_loss(pred, x0, eps), (error.square().mean((1, 2)) * (1 + torch.tan(t) ** -2)).mean())
    close(denoising_loss(pred, x0, eps, "v"), denoising_loss(pred, x0, eps))


def test_denoising_loss_of_v_has_edms_weight() -> None:
    """(sigma^2 + sd^2)/(sigma sd)^2 |D - x0|^2 with D, x0 in the data's units of std sd."""
    pred, x0, eps, error, t = noised()
    sd = 0.5
    sigma = sd * torch.tan(t)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    close(denoising_loss(pred, x0, eps), (weight * (sd * error).square().mean((1, 2))).mean())


def test_denoising_loss_of_epsilon_weighs_x0_with_snr() -> None:
    pred, x0, eps, error, t = noised()
    close(denoising_loss(pred, x0, eps, "epsilon"), (error.square().mean((1, 2)) * torch.tan(t) ** -2).mean())


@pytest.mark.parametrize("kind", ["v", "epsilon"])
def test_denoising_loss_of_the_truth_is_zero(kind: str) -> None:
    pred, x0, eps, _, _ = noised()
    assert float(denoising_loss(pred.with_output(x0), x0, eps, kind)) < 1e-25


def test_an_unknown_denoising_loss_is_refused() -> None:
    pred, x0, eps, _, _ = noised()
    with pytest.raises(ValueError, match="sample"):
        denoising_loss(pred, x0, eps, "sample")


def test_gradient_injection() -> None:
    """Its gradient is grad / numel, whatever made grad; its value half the mean square."""
    x, grad = randn(3, 2, 4).requires_grad_(), randn(3, 2, 4).requires_grad_()
    loss = gradient_injection(x, grad * x)
    close(loss, 0.5 * (grad * x).square().mean())
    got = torch.autograd.grad(loss, (x, grad), allow_unused=True)
    close(got[0], grad * x / 24)
    assert got[1] is None


def test_per_sample_mean() -> None:
    x = randn(3, 2, 4, 5)
    close(per_sample_mean(x), x.mean((1, 2, 3)))


def test_l1_normaliser_is_clamped_and_detached() -> None:
    x = randn(3, 2, 4).requires_grad_()
    teacher = randn(3, 2, 4)
    got = l1_normaliser(x, teacher)
    assert not got.requires_grad
    close(got, (x - teacher).abs().mean((1, 2)).detach())
    least = torch.full((3,), 1e-5, dtype=torch.float64)
    close(l1_normaliser(x, x), least)
    close(l1_normaliser(x, x + 1e-6), least)
    close(l1_normaliser(x, x - 2e-5), 2 * least)


@pytest.mark.parametrize("c", [0.03, 2.0])
def test_pseudo_huber(c: float) -> None:
    """The norm is that of the whole sample, not of an element."""
    x, y = randn(3, 2, 4).requires_grad_(), randn(3, 2, 4)
    want = torch.stack([((a - b).norm() ** 2 + c**2).sqrt() - c for a, b in zip(x, y, strict=True)])
    got = pseudo_huber(x, y, c)
    close(got, want)
    assert got.shape == (3,)
    close(torch.autograd.grad(pseudo_huber(x, x.detach(), c).sum(), x)[0], torch.zeros(3, 2, 4))


def test_pseudo_huber_is_quadratic_when_small_and_linear_when_large() -> None:
    x = torch.full((1, 4), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(x, 0 * x, 1.0), torch.tensor([2e-8]).double(), rtol=1e-4, atol=0)
    close(pseudo_huber(3e4 * x, 0 * x, 0.0), 6.0 * torch.ones(1))


def test_gan_losses() -> None:
    real, fake = randn(5), 3 * randn(7)
    sigmoid = torch.sigmoid
    close(gan_discriminator_loss(real, fake), -sigmoid(real).log().mean() - (1 - sigmoid(fake)).log().mean())
    close(gan_generator_loss(fake), -sigmoid(fake).log().mean())
    close(gan_discriminator_loss(torch.zeros(3), torch.zeros(2)), 2 * math.log(2))
    assert float(gan_discriminator_loss(torch.tensor([50.0]), torch.tensor([-50.0]))) < 1e-6
    assert float(gan_discriminator_loss(torch.tensor([-500.0]), torch.tensor([500.0]))) == 1000
    assert float(gan_generator_loss(torch.tensor([-500.0]))) == 500
