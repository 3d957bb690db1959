"""Progressive distillation's parts (Salimans & Ho 2022, arXiv:2202.00512), for the methods that halve their steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.core.denoiser import Cond
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.ode import Denoise, ddim_step, inverse_ddim
from diffdistill.errors import UserError


@dataclass(frozen=True)
class Halving:
    """Stages of `stage_steps` training steps each; stage k trains a student of `start_steps` / 2^(k+1) steps."""

    start_steps: int
    final_steps: int
    stage_steps: int

    def __post_init__(self) -> None:
        ratio, rest = divmod(self.start_steps, self.final_steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise UserError(
                f"start_steps: {self.start_steps} is not final_steps ({self.final_steps}) times 2, 4, 8, ..."
            )

    @property
    def stages(self) -> int:
        return (self.start_steps // self.final_steps).bit_length() - 1

    @property
    def whole(self) -> int:
        """Training steps of all stages."""
        return self.stages * self.stage_steps

    def stage(self, step: int) -> int:
        """The stage of a training step; after `whole` steps still the last one, whose learning rate is zero then."""
        return min(step // self.stage_steps, self.stages - 1)

    def student_steps(self, step: int) -> int:
        return self.start_steps >> (self.stage(step) + 1)

    def starts(self, step: int) -> bool:
        """Whether a stage after the first begins at this step."""
        return step > 0 and step % self.stage_steps == 0 and step // self.stage_steps < self.stages

    def lr_factor(self, step: int) -> float:
        """Linear to zero within a stage, as in the authors' configuration."""
        return max(0.0, 1 - (step - self.stage(step) * self.stage_steps) / self.stage_steps)


def two_step_target(teacher: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """(B, ...) the x0 whose one DDIM step from t to s lands where two teacher steps land (Algorithm 2).

    No gradient passes.
    """
    with torch.no_grad():
        x_s = ddim_step(teacher, ddim_step(teacher, x_t, t, mid, cond), mid, s, cond)
        return inverse_ddim(x_s, x_t, t, s)


def weighted_x0_loss(x0: Tensor, target: Tensor, t: Tensor, weight: str) -> Tensor:
    """The mean of w(t) |x0 - target|^2, w = max(1, SNR) ('truncated_snr') or SNR + 1 ('snr_plus_one'), section 4."""
    snr = torch.tan(t) ** -2
    w = {"truncated_snr": snr.clamp_min(1), "snr_plus_one": 1 + snr}[weight]
    return (w.to(x0) * per_sample_mean((x0 - target.to(x0)).square())).mean()
