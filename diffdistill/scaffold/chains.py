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
    present point anyway; one that has made its last step begins anew from noise. A process holds the chains of
    its own samples. A checkpoint holds those of the main process; those of another begin anew on a resume.
    """

    x_t: Tensor
    step: Tensor
    scale: Tensor
    first: Tensor
    grid: Tensor

    def __init__(self, teacher: Teacher, steps: int, low: float, high: float):
        super().__init__()
        if low > high:
            raise UserError(f"guidance_min: {low} must not be more than guidance_max ({high})")
        self.low, self.high = low, high
        schedule = teacher.denoiser.schedule
        grid = sampling_grid(schedule, steps, option="trajectory_steps")
        self.init_scale = schedule.init_scale(float(grid[0]))
        self.register_buffer("grid", grid, persistent=False)
        weight = next(v for v in teacher.denoiser.state_dict().values() if v.is_floating_point())
        wide = torch.promote_types(weight.dtype, torch.float32)
        cond = teacher.sample_cond(1)
        # Without chains until the first batch says how many.
        self.register_buffer("x_t", torch.empty(0, *teacher.shape, dtype=wide))
        self.register_buffer("step", torch.empty(0, dtype=torch.int64))
        self.register_buffer("scale", torch.empty(0, dtype=torch.float64))
        self.register_buffer("first", torch.tensor(-1))
        self.keys = tuple(cond)
        for key in self.keys:
            self.register_buffer(f"cond_{key}", cond[key][:0])
        self.begin = -1  # `first`, the place of the first chain in a step, readable without waiting for the device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and f"{prefix}{name}" in state_dict:  # their number is the checkpoint's
                self._buffers[name] = buffer.new_empty(state_dict[f"{prefix}{name}"].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.begin = int(self.first)

    @property
    def cond(self) -> Cond:
        """The condition of each chain."""
        return {key: getattr(self, f"cond_{key}") for key in self.keys}

    def points(self, batch: Batch, teacher: Denoiser) -> Points:
        """Where the chains stand; before the first step they are led to where they begin."""
        if not (0 <= self.begin <= batch.first and self._rows(batch).stop <= len(self.step)):
            self._start(batch, teacher)
        rows = self._rows(batch)
        cond = {key: value[rows] for key, value in self.cond.items()}
        return Points(self.x_t[rows], self.grid[self.step[rows]], cond, self.scale[rows])

    def _rows(self, batch: Batch) -> slice:
        first = batch.first - self.begin
        return slice(first, first + batch.size)

    @torch.no_grad()
    def advance(self, batch: Batch, guided: Prediction) -> None:
        """One DDIM step each, by the guided prediction at `points`; chains at the end begin anew."""
        rows = self._rows(batch)
        step = self.step[rows] + 1
        moved, ended = guided.at(self.grid[step]), step == len(self.grid) - 1
        x_t, cond, scale = self._fresh(batch, "chains")
        x_t = torch.where(ended.reshape(-1, *[1] * (moved.ndim - 1)), x_t, moved)
        before = {key: value[rows] for key, value in self.cond.items()}
        scale = torch.where(ended, scale, self.scale[rows])
        self._put(rows, x_t, torch.where(ended, 0, step), scale, choose(ended, cond, before))

    def _put(self, rows: slice, x_t: Tensor, step: Tensor, scale: Tensor, cond: Cond) -> None:
        """In place of those rows, or after the last; not in place in memory, where a graph may hold what is there."""
        new = {"x_t": x_t, "step": step, "scale": scale, **{f"cond_{key}": cond[key] for key in self.keys}}
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, torch.cat([old[: rows.start].to(value), value, old[rows.stop :].to(value)]))

    def _fresh(self, batch: Batch, purpose: str) -> tuple[Tensor, Cond, Tensor]:
        u = batch.uniform(f"{purpose}/scale")
        x_t = batch.randn(f"{purpose}/z").to(self.x_t) * self.init_scale
        return x_t, batch.cond, self.low + (self.high - self.low) * u

    @torch.no_grad()
    def _start(self, batch: Batch, teacher: Denoiser) -> None:
        """Chain i of the step's B goes to step i n / B with as many guided steps: once in a training."""
        n, size = len(self.grid) - 1, batch.size
        starts = [i * n // batch.whole for i in range(batch.first, batch.first + size)]
        x_t, cond, scale = self._fresh(batch, "chains/start")
        for k in range(starts[-1]):
            first = next(i for i in range(size) if starts[i] > k)  # those before it have arrived
            t, s = (self.grid[j].expand(size - first) for j in (k, k + 1))
            rest = {key: value[first:] for key, value in cond.items()}
            moved = guide(teacher, x_t[first:], t, rest, scale[first:]).at(s)
            x_t = torch.cat([x_t[:first], moved])
        held = len(self.step)
        if self.begin < 0 or self.begin + held != batch.first:  # those that are there are not of the samples before
            self.begin = batch.first
            for name in ("x_t", "step", "scale", *(f"cond_{key}" for key in self.keys)):
                setattr(self, name, getattr(self, name)[:0])
        self._put(slice(len(self.step), len(self.step)), x_t, torch.tensor(starts, device=x_t.device), scale, cond)
        self.first = torch.tensor(self.begin, device=x_t.device)
