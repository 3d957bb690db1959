"""Progressive distillation: Progressive Distillation for Fast Sampling of Diffusion Models.

Salimans & Ho, ICLR 2022, arXiv:2202.00512 (code: google-research/diffusion_distillation).

The student learns to land with one DDIM step where the teacher lands with two. Then it becomes the teacher of
the next stage, with half as many steps, until `final_steps` are left. Every stage has a new optimizer whose
learning rate falls linearly to zero, and starts from the weights of the stage before.

Deviations: the grid is the teacher's own timesteps with trailing spacing (`schedule.levels(start_steps)`, of which
every stage keeps every second), so that stock DDIM repeats the student; the authors use a continuous cosine
schedule, evenly spaced. x is not clipped. A guided teacher (`guidance_scale`) is guided in the first stage, which
its student then reproduces without guidance. The preset "cifar10" is the authors' configuration but for the
starting steps: 512 of a discrete schedule stand for their 8192. Their ImageNet and LSUN networks predict x and eps
together, which no diffusers scheduler knows, so there is no preset for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import Denoise
from diffdistill.options import HalvingOptions, TeacherGuidance
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.halving import HalvingMethod

ABOUT = About(
    paper="Salimans & Ho 2022, arXiv:2202.00512",
    data="real images, which are noised to where the steps begin",
    kind="trajectory",
    needs=("images",),
    equations={
        "target of two DDIM steps (Algorithm 2)": "scaffold.halving.two_step_target",
        "truncated SNR and SNR + 1 weights (section 4)": "scaffold.halving.weighted_x0_loss",
        "halving, optimizer restarted, learning rate to zero (Algorithm 2; authors' code)": "scaffold.halving.Halving",
        "DDIM sampler (section 2.1, eq. 8)": "core.ode.ddim_step, players.sampler.DDIM",
    },
)


@dataclass(frozen=True)
class Config(HalvingOptions, TeacherGuidance):
    """Progressive distillation's options."""


class Progressive(HalvingMethod):
    """The teacher of a stage is the student of the stage before."""

    stream = ""

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student or teacher.player("student"))
        self.first = guided(self.teacher, config.guidance_scale)

    def teacher_of(self, stage: int) -> Denoise:
        return self.first if stage == 0 else self.previous


METHOD = Progressive
