"""Teachers whose every quantity is known: a Gaussian and a mixture of Gaussians, in any dimension.

A new method is verified on them before it is trained on anything. They are ordinary denoisers, over a
network that computes the exact velocity, so guidance, samplers, losses and methods take them unchanged.
With data N(m, s^2 I), x_t = cos(t) x0 + sin(t) eps is N(cos(t) m, cos(t)^2 s^2 + sin(t)^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.errors import UserError
from diffdistill.players.teacher import Teacher


class GaussianMixture(nn.Module):
    """p(x0) = sum_k weights_k N(means_k, Q_k diag(stds_k^2) Q_k^T) in d dimensions, float64.

    means (K, d), stds (K, d) or broadcastable to it, weights (K,), rotations (K, d, d) orthogonal or None for
    the identity. `labels` (K,) gives each component a class; conditioning on a class keeps its components,
    and the label `num_classes` means no class. `forward` is the exact velocity v(x_t, t).
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    rotations: Tensor
    labels: Tensor

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float] | float,
        weights: Tensor | None = None,
        *,
        rotations: Tensor | None = None,
        labels: Sequence[int] | None = None,
    ):
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 2:
            raise UserError(f"means: shape {tuple(means.shape)} is not (components, dimensions)")
        count, d = means.shape
        stds = torch.as_tensor(stds, dtype=torch.float64)
        stds = (stds[:, None] if stds.ndim == 1 and len(stds) == count != d else stds).expand(count, d)
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if bool((stds < 0).any()) or bool((weights <= 0).any()) or weights.shape != (count,):
            raise UserError("stds must not be negative, and weights must be positive, one for each component")
        self.register_buffer("means", means.clone())  # float64 input, a parameter say, would be shared
        self.register_buffer("stds", stds.clone())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        eye = torch.eye(d, dtype=torch.float64).expand(count, d, d)
        self.register_buffer("rotations", eye.clone() if rotations is None else rotations.double())
        self.register_buffer("labels", torch.tensor(labels if labels is not None else [0] * count))
        self.num_classes = None if labels is None else int(max(labels)) + 1
        self._turned = rotations is not None

    def _components(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities' logits (B, K), residuals x_t - cos(t) m in each component's axes and their
        variances, both (B, K, d)."""
        cos, sin = torch.cos(t)[:, None, None], torch.sin(t)[:, None, None]
        residual = x_t[:, None] - cos * self.means
        if self._turned:
            residual = torch.einsum("bkd,kde->bke", residual, self.rotations)
        variance = cos**2 * self.stds**2 + sin**2
        log_density = -0.5 * (residual**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        logits = self.log_weights + log_density
        if labels is not None:
            other = (labels[:, None] != self.labels) & (labels[:, None] != self.num_classes)
            logits = logits.masked_fill(other, -math.inf)
            share = self.log_weights.expand_as(logits).masked_fill(other, -math.inf).logsumexp(1, keepdim=True)
            logits = logits - share
        return logits, residual, variance

    def _turned_back(self, residual: Tensor) -> Tensor:
        """(B, K, d) from each component's axes to the usual ones."""
        return torch.einsum("bke,kde->bkd", residual, self.rotations) if self._turned else residual

    def log_density(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B,) log q_t(x_t)."""
        return self._components(x_t, t, class_labels)[0].logsumexp(1)

    def score(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, d) grad log q_t(x_t)."""
        logits, residual, variance = self._components(x_t, t, class_labels)
        pull = self._turned_back(-residual / variance)
        return (logits.softmax(1)[..., None] * pull).sum(1)

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, d) v = cos(t) eps - sin(t) x0 from the posterior mean; finite at both ends of [0, pi/2].

        For one component, with variance V: x0 = m + cos s^2 r / V, eps = sin r / V, r = x_t - cos m.
        """
        logits, residual, variance = self._components(x_t, t, class_labels)
        cos, sin = torch.cos(t)[:, None, None], torch.sin(t)[:, None, None]
        slope = cos * sin * (1 - self.stds**2) / variance
        v = self._turned_back(slope * residual) - sin * self.means
        return (logits.softmax(1)[..., None] * v).sum(1)

    def sample(self, n: int, generator: torch.Generator, class_labels: Tensor | None = None) -> Tensor:
        """(n, d) exact samples of p(x0)."""
        logits = self.log_weights.expand(n, -1)
        if class_labels is not None:
            other = (class_labels[:, None] != self.labels) & (class_labels[:, None] != self.num_classes)
            logits = logits.masked_fill(other, -math.inf)
        k = torch.multinomial(logits.exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + torch.einsum("be,bde->bd", self.stds[k] * noise, self.rotations[k])

    def denoiser(self) -> Denoiser:
        """This density as a denoiser in the normal form; the null condition is the label num_classes."""
        no_class = self.num_classes

        def null(cond: Cond) -> Cond:
            return {"class_labels": torch.full_like(cond["class_labels"], no_class or 0)}

        return Denoiser(self, TrigFlow(), OUTPUTS["v_prediction"], null=None if no_class is None else null)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, d) the exact probability-flow map from the angle t to s (both (B,)).

        One component: affine in closed form. One dimension: the quantile map CDF_s^-1(CDF_t(x)), by
        bisection. Else the Runge-Kutta method of fourth order with 400 steps: v has no pole, and the
        error is about 1e-9 for components as narrow as 0.2.
        """
        if len(self.means) == 1:
            _, residual, variance = self._components(x_t, t, None)
            end = torch.cos(s)[:, None] ** 2 * self.stds[0] ** 2 + torch.sin(s)[:, None] ** 2
            moved = (residual * torch.sqrt(end[:, None] / variance))[:, 0]
            return torch.cos(s)[:, None] * self.means[0] + moved @ self.rotations[0].T
        if self.means.shape[1] == 1:
            return self._quantile_map(x_t, t, s, class_labels)
        x, h = x_t, (s - t) / 400
        step = h[:, None]
        for i in range(400):
            now = t + i * h
            k1 = self(x, now, class_labels)
            k2 = self(x + step / 2 * k1, now + h / 2, class_labels)
            k3 = self(x + step / 2 * k2, now + h / 2, class_labels)
            k4 = self(x + step * k3, now + h, class_labels)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def _cdf(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B,) the CDF and its complement, each exact in its own tail."""
        logits, residual, variance = self._components(x, t, labels)
        weights = torch.where(logits > -math.inf, self.log_weights.exp(), 0.0)
        weights = weights / weights.sum(1, keepdim=True)
        z = (residual / variance.sqrt())[..., 0] / math.sqrt(2)
        return (weights * torch.erfc(-z) / 2).sum(1), (weights * torch.erfc(z) / 2).sum(1)

    def _quantile_map(self, x_t: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        below, above = self._cdf(x_t, t, labels)
        reach = float(self.means.abs().max() + 40 * self.stds.max().clamp_min(1))
        low, high = torch.full_like(x_t, -reach), torch.full_like(x_t, reach)
        for _ in range(80):  # halves the bracket to below one ulp
            middle = (low + high) / 2
            lower, upper = self._cdf(middle, s, labels)
            too_low = torch.where(below < 0.5, lower < below, upper > above)[:, None]
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return (low + high) / 2


def mixture_teacher(
    means: Tensor | Sequence[Sequence[float]],
    stds: Tensor | Sequence[float] | float,
    weights: Tensor | None = None,
    *,
    rotations: Tensor | None = None,
    labels: Sequence[int] | None = None,
) -> Teacher:
    """An exact teacher of a Gaussian mixture; the arguments are GaussianMixture's."""
    network = GaussianMixture(means, stds, weights, rotations=rotations, labels=labels)
    return Teacher(network.denoiser(), (network.means.shape[1],), network.num_classes, "analytic", "mixture")


def gaussian_teacher(mean: Sequence[float], std: Tensor | float, rotation: Tensor | None = None) -> Teacher:
    """An exact teacher of N(mean, Q diag(std^2) Q^T)."""
    rotations = None if rotation is None else rotation[None]
    stds = torch.as_tensor(std, dtype=torch.float64).expand(1, len(mean))
    return mixture_teacher([list(mean)], stds, rotations=rotations)


class ClassGaussians(nn.Module):
    """N(means[k], std^2) for each label k of a class-conditional network, the last label meaning no class.

    "No class" is a Gaussian of its own here, not the mixture of the others, so guidance stays affine: with a
    scale a the guided network is that of N(mu_none + a (mu_k - mu_none), std^2). means (K + 1, d), std (d,).
    """

    def __init__(self, means: Tensor, std: Tensor):
        super().__init__()
        self.means = nn.Parameter(means.double().clone())
        self.std = nn.Parameter(std.double().clone())

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(B, d) the velocity, as GaussianMixture's."""
        cos, sin, mean = torch.cos(t)[:, None], torch.sin(t)[:, None], self.means[class_labels]
        slope = cos * sin * (1 - self.std**2) / (cos**2 * self.std**2 + sin**2)
        return slope * (x_t - cos * mean) - sin * mean

    def denoiser(self) -> Denoiser:
        """These Gaussians as a denoiser in the normal form; the null condition is the last label."""

        def null(cond: Cond) -> Cond:
            return {"class_labels": torch.full_like(cond["class_labels"], len(self.means) - 1)}

        return Denoiser(self, TrigFlow(), OUTPUTS["v_prediction"], null=null)


def class_gaussians_teacher(means: Tensor, std: Tensor) -> Teacher:
    """An exact teacher with K classes and a null condition; the arguments are ClassGaussians'."""
    return Teacher(ClassGaussians(means, std).denoiser(), (means.shape[1],), len(means) - 1, "analytic", "classes")


class LearnedGaussian(nn.Module):
    """The velocity of N(mean, exp(log_std)^2) for TrigFlow with both learned: an affine student's fake score."""

    def __init__(self, d: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d))
        self.log_std = nn.Parameter(torch.zeros(d))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, d) the velocity at x_t (B, d) and the angles t (B,)."""
        cos, sin, variance = torch.cos(t)[:, None], torch.sin(t)[:, None], torch.exp(2 * self.log_std)
        slope = cos * sin * (1 - variance) / (cos**2 * variance + sin**2)
        return slope * (x_t - cos * self.mean) - sin * self.mean


class FlowToData(nn.Module):
    """The velocity of the exact map of N(mean, std^2) from t to 0, per dimension, with both learned, for TrigFlow.

    At t = pi/2 it is the affine generator mean + std z; with -std the same distribution, of mirrored trajectories.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.mean = nn.Parameter(mean.double().clone())
        self.std = nn.Parameter(std.double().clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, d) (cos(t) x_t - f)/sin(t) with f = mean + std (x_t - cos(t) mean)/sqrt(V), V the variance at t."""
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        f = self.mean + self.std * (x_t - cos * self.mean) / torch.sqrt(cos**2 * self.std**2 + sin**2)
        return (cos * x_t - f) / sin


class AffineGenerator(nn.Module):
    """A student x0 = m + b z per dimension, as a network for TrigFlow: its velocity at t = pi/2 is -x0.

    The exact fake score of this generator is the Gaussian N(m, b^2), so no critic needs training.
    """

    def __init__(self, mean: Tensor, scale: Tensor):
        super().__init__()
        self.mean = nn.Parameter(mean.double().clone())
        self.scale = nn.Parameter(scale.double().clone())

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, d) the velocity at t = pi/2, minus x0; t and the labels change nothing."""
        return -(self.mean + self.scale * x_t)

    def exact_score(self) -> GaussianMixture:
        """The distribution that the generator has now; no gradient reaches (m, b)."""
        return GaussianMixture(self.mean.detach()[None], self.scale.detach().abs()[None])


class AffinePerAngle(nn.Module):
    """An x0 that is affine in x_t, slope x_t + offset per dimension, with its own pair at each angle of a list.

    As a network of `OUTPUTS["sample"]` it can follow any map that is affine at each of these angles. An angle in
    between takes the nearest one's.
    """

    angles: Tensor

    def __init__(self, angles: Tensor, d: int):
        super().__init__()
        self.register_buffer("angles", angles.double())
        self.slope = nn.Parameter(torch.zeros(len(angles), d, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(len(angles), d, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, d) the predicted x0 at x_t (B, d), by the pair of the angle that is nearest to t (B,)."""
        node = (t[:, None] - self.angles).abs().argmin(1)
        return self.slope[node] * x_t + self.offset[node]

    @torch.no_grad()
    def fit(self, node: int, x_t: Tensor, x0: Tensor) -> None:
        """Least squares of x0 (B, d) on x_t (B, d) at that angle."""
        centred = x_t - x_t.mean(0)
        self.slope[node] = (centred * (x0 - x0.mean(0))).mean(0) / centred.square().mean(0)
        self.offset[node] = x0.mean(0) - self.slope[node] * x_t.mean(0)


class GaussianJumps(nn.Module):
    """F of the exact map of N(mean, std^2) from t to r, per dimension, as a network of two angles for TrigFlow."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.mean, self.std = mean.double(), std.double()

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """(B, d) (cos(t - r) x_t - x_r)/sin(t - r), and the velocity at r = t."""
        cos, sin, gap = torch.cos(t)[:, None], torch.sin(t)[:, None], (t - r)[:, None]
        start, end = (torch.cos(a)[:, None] ** 2 * self.std**2 + torch.sin(a)[:, None] ** 2 for a in (t, r))
        x_r = torch.cos(r)[:, None] * self.mean + (x_t - cos * self.mean) * torch.sqrt(end / start)
        still = gap == 0
        jump = (torch.cos(gap) * x_t - x_r) / torch.sin(torch.where(still, 1.0, gap))
        velocity = cos * sin * (1 - self.std**2) / start * (x_t - cos * self.mean) - sin * self.mean
        return torch.where(still, velocity, jump)
