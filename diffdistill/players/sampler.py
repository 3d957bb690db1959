"""How a few-step student is sampled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.prediction import diffuse


class FewStepSampler:
    """How a few-step student is sampled: one denoising a level, from noise at the first level.

    After a level, `renoise` adds fresh noise up to the next one (Song et al. 2023, Algorithm 1; DMD2's
    sampler); otherwise the DDIM step goes there. A one-step student has one level, and both are the same.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float], *, renoise: bool = True):
        self.denoiser = denoiser
        self.levels = tuple(float(level) for level in levels)
        self.renoise = renoise

    def start(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) at the first level, for standard normal z (B, ...)."""
        t = self.denoiser.schedule.angle(self.levels[0])
        scale = self.denoiser.schedule.init_scale(float(t))
        return z * scale, t.to(z.device).expand(len(z))

    def input_at(self, k: int, z: Tensor, cond: Cond, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) that level k reads, after the levels before it; noise(j) (B, ...) is added for level j."""
        x, t = self.start(z)
        for j in range(1, k + 1):
            s = self.denoiser.schedule.angle(self.levels[j]).to(x.device).expand(len(x))
            pred = self.denoiser(x, t, cond)
            x = diffuse(pred.x0, s, noise(j)) if self.renoise else pred.at(s)
            t = s
        return x, t

    def one_step(self, z: Tensor, cond: Cond) -> Tensor:
        """x0 (B, ...) of unit variance after the first level; gradients flow."""
        x_t, t = self.start(z)
        return self.denoiser(x_t, t, cond).x0

    @torch.no_grad()
    def __call__(self, shape: Sequence[int], cond: Cond, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples (B, *shape) in the data's own units; sample i draws from generators[i] alone."""
        weight = next(itertools.chain(self.denoiser.parameters(), self.denoiser.buffers()))

        def noise(j: int) -> Tensor:
            drawn = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
            return torch.stack(drawn).to(weight)

        x, t = self.input_at(len(self.levels) - 1, noise(0), cond, noise)
        return self.denoiser(x, t, cond).x0 * self.denoiser.schedule.data_std


def one_step_sampler(student: Denoiser, level: float | None) -> FewStepSampler:
    """The sampler of a one-step student that reads pure noise at `level`; None: at its schedule's `init_level`."""
    return FewStepSampler(student, [student.schedule.init_level if level is None else level])
