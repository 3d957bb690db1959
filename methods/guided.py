"""Guided distillation: On Distillation of Guided Diffusion Models.

Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, CVPR 2023, arXiv:2210.03142 (no code was published).

Stage one: a student that takes the guidance scale as an input learns to give in one pass what classifier-free
guidance gives in two. Stage two: progressive distillation (Salimans & Ho 2022) of that student halves its DDIM
steps again and again, with the scale drawn for each sample and given to both networks.

Guidance scales here are diffusers' a, 1 being none: a = 1 + w with the paper's w.

Deviations: from the formulas as they are known from the abstract and later papers; the paper's appendix was not at
hand, so there is no preset of the paper, and the default range of w, [0, 4] as for ImageNet, is from memory. The
scale enters beside the class embedding with frequencies of at most 2 (`players.scale_input.TakesScale`), not as
Fourier features beside the time. The grid of stage two is the teacher's own timesteps with trailing spacing. The
learning rate falls linearly to zero in stage one too, if stage two follows. The sampler is the deterministic one,
not the paper's stochastic variant. With guidance_min = guidance_max the student takes no scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, Extra
from diffdistill.core.guidance import guide, require_null
from diffdistill.core.ode import Denoise
from diffdistill.options import HalvingOptions, ScaleRange, option
from diffdistill.players.scale_input import scale_player, scale_taken
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.halving import HalvingMethod, weighted_x0_loss
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Meng et al. 2023, arXiv:2210.03142",
    data="real images, which are noised",
    kind="trajectory",
    needs=("images",),
    equations={
        "stage one: x_w = (1 + w) x_c - w x_u, loss max(1, SNR) |x - x_w|^2": (
            "GuidedDistillation.one_pass, core.guidance.guide"
        ),
        "w drawn uniformly for each sample, as an input": (
            "GuidedDistillation.extra, players.scale_input.guidance_input"
        ),
        "stage two: two DDIM steps of the last student in one": (
            "scaffold.halving.HalvingMethod.halve, scaffold.halving.two_step_target"
        ),
        "halving, optimizer restarted, learning rate to zero": "scaffold.halving.Halving",
    },
)


@dataclass(frozen=True)
class Config(HalvingOptions, ScaleRange):
    """Guided distillation's options; start_steps equal to final_steps leaves stage two out."""

    guidance_steps: int = option(1000, "training steps of stage one, before the halving", at_least=1)


class GuidedDistillation(HalvingMethod):
    """Stage one gives guidance in one pass; stage two halves that student's steps."""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        require_null(teacher.denoiser, "guided distillation")
        first_steps = config.guidance_steps
        super().__init__(teacher, config, student or scale_player(teacher, config), first_steps=first_steps)

    def scales(self, batch: Batch) -> Tensor:
        """(B,) guidance scales."""
        return self.config.drawn(batch.uniform("student/scale"))

    def extra(self, batch: Batch) -> Extra:
        return self.input_of(self.scales(batch))

    def input_of(self, scale: Tensor) -> Extra:
        """What the student and its former self take besides, for scales (B,)."""
        return scale_taken(self.config, scale)

    def first_turn(self, batch: Batch) -> Outcome:
        return self.one_pass(*self.noised_images(batch), batch.cond, self.scales(batch))

    def one_pass(self, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Outcome:
        """Stage one: the guided x0 at x_t (B, ...), with scales (B,), in one pass."""
        with torch.no_grad():
            target = guide(self.teacher, x_t, t, cond, scale).x0
        x0 = self.student(x_t, t, cond, self.input_of(scale)).x0
        loss = weighted_x0_loss(x0, target, t, self.config.weight)
        return Outcome(loss, {"x0_error": loss})

    def teacher_of(self, stage: int) -> Denoise:
        return self.previous


METHOD = GuidedDistillation
