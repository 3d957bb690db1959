"""SnapFusion's step distillation: SnapFusion: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds.

Li, Wang, Jin, Hu, Chemerys, Fu, Wang, Tulyakov, Ren, NeurIPS 2023, arXiv:2306.00980 (no training code was published).

Progressive distillation of a student that goes on being guided: two DDIM steps of the teacher in one, compared for a
share of the samples between guided predictions, v~ = (1 + w) v_c - w v_u of teacher and of student, with w drawn for
each. The diffusion loss on the data is added, L = L_ori + gamma L_dstl, so that quality is not lost with the steps.

The student keeps both of its branches and is drawn guided, in two passes a step, as its teacher is: `sample` with
`--guidance-scale`, or the stock pipeline's own argument. What is drawn without it is the conditional branch alone.

Guidance scales here are diffusers' a, 1 being none: a = 1 + w with the paper's w.

Deviations: from the formulas as they are known from the abstract and later papers; the paper's appendix was not at
hand, so there is no preset of the paper, and 32 steps to 16 to 8, and the range [2, 14] of w, are from memory. The
share and gamma have defaults of ours. The choice is made for each sample, not for a batch; a sample that is not chosen
is compared at a = 1, where a guided prediction is the conditional one. L_ori has times of its own, uniform in the
schedule's own time. Grid, new optimizers and the refusal of teachers that predict the noise are progressive's. The
smaller network of the paper is another matter (`diffdistill prune`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guide
from diffdistill.core.ode import Denoise
from diffdistill.core.prediction import Prediction, diffuse
from diffdistill.errors import UserError
from diffdistill.options import HalvingOptions, option
from diffdistill.scaffold.halving import HalvingMethod, two_step_target, weighted_x0_loss
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Li et al. 2023, arXiv:2306.00980",
    data="real images, which are noised",
    kind="trajectory",
    needs=("images",),
    equations={
        "L = L_ori + gamma L_dstl": "SnapFusion.step_loss",
        "L_ori, the error in v on the data": "SnapFusion.diffusion_loss, scaffold.halving.weighted_x0_loss",
        "v~ = (1 + w) v_c - w v_u of both, w uniform, for a share of the samples": (
            "SnapFusion.distillation_loss, SnapFusion.scales, core.guidance.guide"
        ),
        "target of two DDIM steps, max(1, SNR)": "scaffold.halving.two_step_target, scaffold.halving.weighted_x0_loss",
        "32 steps to 16, 16 to 8": "scaffold.halving.Halving",
    },
)


@dataclass(frozen=True)
class Config(HalvingOptions, start_steps=32, final_steps=8):
    """SnapFusion's options."""

    guided_share: float = option(
        0.5,
        "share of the samples whose guided predictions are compared; those of the others are compared plain",
        at_least=0,
        at_most=1,
    )
    compared_min: float = option(
        3.0, "the lowest guidance scale of a comparison, drawn uniformly; 1 is none", at_least=0
    )
    compared_max: float = option(15.0, "the highest guidance scale of a comparison", at_least=0)
    distillation_weight: float = option(1.0, "gamma, the weight of the distillation beside the diffusion loss", above=0)

    def check(self) -> None:
        """UserError where no scale can be drawn."""
        if self.compared_min > self.compared_max:
            raise UserError(f"compared_min: {self.compared_min} must be at most compared_max ({self.compared_max})")


def at_scale(denoiser: Denoiser, scale: Tensor) -> Callable[[Tensor, Tensor, Cond], Prediction]:
    """The denoiser, guided by scales (B,)."""
    return lambda x_t, t, cond: guide(denoiser, x_t, t, cond, scale)


class SnapFusion(HalvingMethod):
    """Progressive distillation of guided predictions, beside the diffusion loss."""

    guides = "snap_fusion"

    def teacher_of(self, stage: int) -> Denoiser:
        return self.teacher if stage == 0 else self.previous

    def scales(self, batch: Batch) -> Tensor:
        """(B,) a = 1 + w for the samples that are compared guided, and 1 for the others."""
        c, u = self.config, batch.uniform("student/scale")
        drawn = c.compared_min + (c.compared_max - c.compared_min) * u
        return torch.where(batch.uniform("student/guided") < c.guided_share, drawn, torch.ones_like(drawn))

    def step_loss(self, teacher: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, batch: Batch) -> Outcome:
        assert isinstance(teacher, Denoiser)  # as `teacher_of` gives it
        distilled = self.distillation_loss(teacher, x_t, t, mid, s, batch.cond, self.scales(batch))
        plain = self.diffusion_loss(batch)
        loss = plain + self.config.distillation_weight * distilled
        return Outcome(loss, {"x0_error": distilled, "diffusion": plain})

    def distillation_loss(
        self, teacher: Denoiser, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond, scale: Tensor
    ) -> Tensor:
        """L_dstl at x_t (B, ...): the guided student's x0 against that of two guided steps, with scales (B,)."""
        target = two_step_target(at_scale(teacher, scale), x_t, t, mid, s, cond)
        return weighted_x0_loss(at_scale(self.student, scale)(x_t, t, cond).x0, target, t, self.config.weight)

    def diffusion_loss(self, batch: Batch) -> Tensor:
        """L_ori: |v - v_theta|^2 at times of its own."""
        t = self.uniform_times(batch, "student/diffusion t")
        x_t = diffuse(batch.images, t, batch.randn("student/diffusion eps"))
        return weighted_x0_loss(self.student(x_t, t, batch.cond).x0, batch.images, t, "snr_plus_one")


METHOD = SnapFusion
