"""LADD: Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation.

Sauer, Boesel, Dockhorn, Blattmann, Esser, Rombach 2024, arXiv:2403.12015 (no training code by the authors; read in
NVlabs/FastGen).

The student is trained by a GAN alone. Its discriminator is small heads on several layers of the frozen teacher, which
reads images that are noised again: noise says on which scale real and generated images are told apart, and the teacher
brings its features at every scale. A gradient reaches the student through the teacher, whose weights stay. With h_l the
features of layer l at the time tau and d_l its head,

    discriminator: mean_l [max(0, 1 - d_l(real)) + max(0, 1 + d_l(fake))],    student: -mean_l d_l(fake).

If the noised distributions agree at one tau, the clean ones do: any distribution of tau has the same optimum, which is
that of the images which count as real. In the paper these are samples of the guided teacher (`--data` is then a folder
of them), and guidance enters by the data alone.

The student reads noise, or with several steps noised images at the level of one of them; `noisiest_share` of them start
at the noisiest.

Deviations:
- The heads are those of this package's other discriminator: convolutions, without a projection on time and conditions,
  which they see through the teacher.
- Real and generated images share times and noise, as in FastGen. Levels are evenly spaced in the teacher's own times,
  as the paper's 1, 0.75, 0.5 and 0.25 are. The paper's share of the noisiest level rises after 500 steps.
- The discriminator moves in every step, on the student's samples of that step where both move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.prediction import diffuse, expand
from diffdistill.options import LatentAdversarialOptions, StudentLevels, StudentOptions, option
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import LatentAdversarialMethod
from diffdistill.scaffold.method import Batch, Outcome, Turn

ABOUT = About(
    paper="Sauer et al. 2024, arXiv:2403.12015",
    data="real images, or the guided teacher's samples",
    kind="distribution",
    needs=("images",),
    equations={
        "discriminator on layers of the frozen teacher (section 3)": "scaffold.adversary.LatentAdversary.logits",
        "hinge losses": (
            "core.losses.hinge_discriminator_loss, scaffold.adversary.LatentAdversary.student_loss, "
            "scaffold.adversary.LatentAdversary.critic_loss"
        ),
        "noise of the discriminator": "core.times.edm_log_normal",
        "the student's levels": "LADD.read, scaffold.method.Method.levels_in",
    },
)


@dataclass(frozen=True)
class Config(StudentOptions, StudentLevels, LatentAdversarialOptions, beta1=0.0):
    """LADD's options."""

    student_steps: int = option(1, "the student's sampling steps, from student_level down", at_least=1)
    noisiest_share: float | None = option(
        None, "share of samples that start at the noisiest level; none: as many as at each other", at_least=0, at_most=1
    )
    update_ratio: int = option(1, "steps of the discriminator for one of the student", at_least=1)


class LADD(LatentAdversarialMethod):
    """The student moves in every so manieth step, the discriminator in each."""

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        self.levels = torch.tensor(self.levels_in(), dtype=torch.float64)

    def sampler(self) -> Sampler:
        """`student_steps` from `student_level` down, with fresh noise between."""
        return Sampler(self.student, self.levels.tolist())

    def turns(self, step: int) -> Sequence[Turn]:
        """The student in every `update_ratio`-th step, and then the discriminator."""
        drawn: dict[int, Tensor] = {}
        student = Turn("student", partial(self.student_turn, drawn))
        discriminator = Turn("discriminator", partial(self.discriminator_turn, drawn))
        return [discriminator] if step % self.config.update_ratio else [student, discriminator]

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t (B, ...) and t (B,) that the student denoises: noise, or a noised image at a level of its sampler."""
        z, share = batch.randn("z"), self.config.noisiest_share
        k = batch.integers(len(self.levels), "student/level")
        if share is not None and len(self.levels) > 1:
            first = batch.uniform("student/first") < share
            k = torch.where(first, 0, 1 + batch.integers(len(self.levels) - 1, "student/level"))
        noise, _ = self.sampler().start(z)
        t = self.schedule.angle(self.levels).to(k.device)[k]
        return torch.where(expand(k == 0, z) > 0, noise, diffuse(batch.images, t, z)), t

    def student_turn(self, drawn: dict[int, Tensor], batch: Batch) -> Outcome:
        """The student's samples, which `drawn` keeps, are to be taken for real."""
        x = self.student(*self.read(batch), batch.cond).x0
        drawn[batch.first] = x.detach()
        return self.judged(x, batch)

    def discriminator_turn(self, drawn: dict[int, Tensor], batch: Batch) -> Outcome:
        """The discriminator on the samples that `drawn` holds, or on new ones."""
        with torch.no_grad():
            x = drawn[batch.first] if drawn else self.student(*self.read(batch), batch.cond).x0
        return self.adversary.turn(batch, x)


METHOD = LADD
