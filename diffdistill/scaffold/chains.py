"""Guided sampling chains that training walks along: points of trajectories, without a stored data set."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser, choose
from diffdistill.core.guidance import guide
from diffdistill.core.prediction import Prediction
from diffdistill.core.schedule import sampling_grid
from diffdistill.errors import UserError
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch


class Points(NamedTuple):
    """Where the chains stand."""

    x_t: Tensor  #: (B, ...)
    t: Tensor  #: (B,) angles
    cond: Cond
    scale: Tensor  #: (B,) each chain's guidance scale


class GuidedChains(nn.Module):
    """B DDIM chains of the guided teacher, each with its own condition and scale, at staggered steps.

    Every batch so covers all times. A chain moves by the guided prediction that the caller computes at its
    present point anyway; one that has made its last step begins anew from noise. A checkpoint holds the
    chains of the main process; those of another rank begin anew on a resume.
    """

    x_t: Tensor
    step: Tensor
    scale: Tensor
    rank: Tensor
    grid: Tensor

    def __init__(self, teacher: Teacher, steps: int, low: float, high: float):
        super().__init__()
        if low > high:
            raise UserError(f"guidance_min: {low} must not be more than guidance_max ({high})")
        self.low, self.high = low, high
        schedule = teacher.denoiser.schedule
        grid = sampling_grid(schedule, steps)
        self.init_scale = schedule.init_scale(float(grid[0]))
        self.register_buffer("grid", grid, persistent=False)
        weight = next(v for v in teacher.denoiser.state_dict().values() if v.is_floating_point())
        wide = torch.promote_types(weight.dtype, torch.float32)
        cond = teacher.sample_cond(1)
        # Without chains until the first batch says how many.
        self.register_buffer("x_t", torch.empty(0, *teacher.shape, dtype=wide))
        self.register_buffer("step", torch.empty(0, dtype=torch.int64))
        self.register_buffer("scale", torch.empty(0, dtype=torch.float64))
        self.register_buffer("rank", torch.tensor(-1))
        self.keys = tuple(cond)
        for key in self.keys:
            self.register_buffer(f"cond_{key}", cond[key][:0])
        self.owner = -1  # `rank`, readable without waiting for the device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and f"{prefix}{name}" in state_dict:  # their number is the checkpoint's
                self._buffers[name] = buffer.new_empty(state_dict[f"{prefix}{name}"].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.owner = int(self.rank)

    @property
    def cond(self) -> Cond:
        """The condition of each chain."""
        return {key: getattr(self, f"cond_{key}") for key in self.keys}

    def points(self, batch: Batch, teacher: Denoiser) -> Points:
        """Where the chains stand; before the first step they are led to where they begin."""
        if len(self.step) != batch.size or self.owner != batch.key[2]:
            self._start(batch, teacher)
        return Points(self.x_t, self.grid[self.step], self.cond, self.scale)

    @torch.no_grad()
    def advance(self, batch: Batch, guided: Prediction) -> None:
        """One DDIM step each, by the guided prediction at `points`; chains at the end begin anew."""
        moved = guided.at(self.grid[self.step + 1])
        ended = self.step + 1 == len(self.grid) - 1
        x_t, cond, scale = self._fresh(batch, "chains")
        self.x_t = torch.where(ended.reshape(-1, *[1] * (moved.ndim - 1)), x_t, moved)
        self.step = torch.where(ended, 0, self.step + 1)
        self.scale = torch.where(ended, scale, self.scale)
        for key, value in choose(ended, cond, self.cond).items():
            setattr(self, f"cond_{key}", value)

    def _fresh(self, batch: Batch, purpose: str) -> tuple[Tensor, Cond, Tensor]:
        draw = batch.generator(f"{purpose}/scale")
        u = torch.rand(batch.size, generator=draw, device=draw.device, dtype=torch.float64)
        x_t = batch.randn(f"{purpose}/z").to(self.x_t) * self.init_scale
        return x_t, batch.cond, self.low + (self.high - self.low) * u

    @torch.no_grad()
    def _start(self, batch: Batch, teacher: Denoiser) -> None:
        """Chain i goes to step i n / B with as many guided steps: once in a training."""
        n, size = len(self.grid) - 1, batch.size
        starts = [i * n // size for i in range(size)]
        x_t, cond, scale = self._fresh(batch, "chains/start")
        for k in range(starts[-1]):
            first = next(i for i in range(size) if starts[i] > k)  # those before it have arrived
            t, s = (self.grid[j].expand(size - first) for j in (k, k + 1))
            rest = {key: value[first:] for key, value in cond.items()}
            moved = guide(teacher, x_t[first:], t, rest, scale[first:]).at(s)
            x_t = torch.cat([x_t[:first], moved])
        self.x_t, self.scale, self.owner = x_t, scale, batch.key[2]
        self.step = torch.tensor(starts, device=x_t.device)
        self.rank = torch.tensor(self.owner, device=x_t.device)
        for key in self.keys:
            setattr(self, f"cond_{key}", cond[key])
