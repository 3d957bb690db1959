"""f-divergences of teacher and student, by the ratio of their densities that a discriminator tells.

Xu, Nie, Vahdat 2025, arXiv:2502.15681. D_f(p || q) = E_q f(r) with r = p/q, and its gradient weights the gap of the
two scores by h(r) = r^2 f''(r). A discriminator that is trained by the logistic loss, with as many real as generated
images, has the logits log r.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.options import RatioOptions

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "chi_square": lambda r: 2 * r**2,
    "neyman": lambda r: 2 / r,
}
"""h(r) of each divergence. Their f are -log r; (1 + r) log((1 + r)/r); r log r - (1 + r) log((1 + r)/2); 1 - sqrt(r);
r log r; (r - 1) log r; (r - 1)^2; (1 - r)^2/r."""

PATHS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: (1 + 2 * r) / (1 + r) ** 2,
    "jensen_shannon": lambda r: (r / (1 + r)) ** 2,
    "squared_hellinger": lambda r: r.sqrt() / 8,
    "forward_kl": torch.zeros_like,
    "jeffreys": torch.ones_like,
    "chi_square": lambda r: -2 * r**2,
    "neyman": lambda r: 4 / r,
}
"""h(r) - r h'(r) of each: by how much more of the student's density adds to E_q[h(r)] there."""


class RatioWeight(nn.Module):
    """h(r) of samples, relative to its mean, with r relative to its mean at about the same noise.

    Both means are moving averages of the steps before, which `update` takes in, so that they do not depend on how a
    step is divided over passes and processes. They are what a checkpoint keeps.
    """

    ratio: Tensor
    weight: Tensor
    sums: Tensor

    def __init__(self, options: RatioOptions):
        super().__init__()
        self.options, self.h, self.path = options, WEIGHTS[options.divergence], PATHS[options.divergence]
        bins = max(1, options.ratio_bins)
        self.register_buffer("ratio", torch.ones(bins))
        self.register_buffer("weight", self.h(torch.ones(1)))
        self.register_buffer("sums", torch.zeros(2, bins + 1), persistent=False)  # and counts, of this step

    def forward(self, logits: Tensor, t: Tensor) -> Tensor:
        """(B,) without a gradient, for logits (B,) or (heads, B), of which the mean counts, at the angles t (B,)."""
        return self.both(self.of(logits, t))[0]

    def both(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """h(r) and h(r) - r h'(r), both (B,), relative to the mean of h; gradients pass to r (B,)."""
        h, path = self.h(r), self.path(r)
        if not self.options.ratio_bins:
            return h, path
        self.sums[:, -1] += torch.stack([h.detach().sum(), h.new_tensor(len(h))]).to(self.sums)
        mean = self.weight.to(h)
        return h / mean, path / mean

    def of(self, logits: Tensor, t: Tensor) -> Tensor:
        """(B,) the ratios r that the weights are of, of the same."""
        c = self.options
        logits = logits.detach().reshape(-1, len(t)).mean(0)
        r = logits.to(torch.promote_types(logits.dtype, torch.float32)).exp().clamp(c.ratio_low, c.ratio_high)
        if not c.ratio_bins:
            return r
        bins = len(self.ratio)
        part = F.one_hot((t / (math.pi / 2) * bins).long().clamp(0, bins - 1), bins).to(r)
        self.sums[:, :-1] += torch.stack([r @ part, part.sum(0)]).to(self.sums)
        return r / (part @ self.ratio.to(r))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the samples of a step, of all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        total, count = self.sums
        means = torch.cat([self.ratio, self.weight])
        moved = torch.lerp(total / count.clamp_min(1), means, self.options.ratio_ema)
        means = torch.where((count > 0) & total.isfinite(), moved, means)
        self.ratio.copy_(means[:-1])
        self.weight.copy_(means[-1:])
        self.sums.zero_()
