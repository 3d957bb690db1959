"""YONOS-SR: You Only Need One Step: fast super-resolution with Stable Diffusion via scale distillation.

Noroozi, Hadji, Martinez, Bulat, Tzimiropoulos, 2024, arXiv:2401.17258.

A model of super-resolution reads the image that is to be enlarged. From one that was reduced less it says more of the
sample, at every noise. Scale distillation trains a student for images that were reduced twice as much, say 4 times, on
the predictions of a teacher for images that were reduced 2 times, from the same noised sample and the same noise:

    loss = |f_S(x_t, t, y_coarse) - sg f_T(x_t, t, y_fine)|^2.

Its minimum is the mean of the teacher's predictions given what the student sees, which is the denoiser for y_coarse
if the teacher's is that for y_fine (the tower property): the same as of learning from the images, at less variance.
From there a further student learns, for 8 times. Trained so, one DDIM step is near to many. Nothing here is about
scales: any condition that says less than the teacher's will do.

No training code is public. Deviations:
- The loss is the error in v, which is that of the paper's Stable Diffusion 2; a weight at each noise does not move the
  minimum.
- A training is of one doubling; the next begins from its student, as teacher and as `--start`.
- The second part of the paper, a decoder that is tuned on one-step latents, is not here; `diffdistill decoder` makes a
  small decoder of the images' latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.options import RestorationOptions, TeacherGuidance
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.rng import seed_for, seeded
from diffdistill.scaffold.method import Batch, Need, Outcome
from diffdistill.scaffold.solo import SoloMethod

ABOUT = About(
    paper="Noroozi et al. 2024, arXiv:2401.17258",
    data="images, and the conditions of each twice: what the student sees, and what the teacher sees",
    kind="restoration",
    needs=("images", "teacher_data"),
    equations={"scale distillation": "YONOS.student_turn", "one DDIM step": "YONOS.sampler, players.sampler.DDIM"},
)


@dataclass(frozen=True)
class Config(RestorationOptions, TeacherGuidance):
    """YONOS's options; times are uniform in the teacher's own."""


class YONOS(SoloMethod):
    """One player, the student."""

    needs = frozenset({Need.IMAGES, Need.TEACHER_DATA})
    trained_steps = range(1, 1001)

    def sampler(self) -> Sampler:
        """DDIM, one step or more."""
        return Sampler(self.student, self.levels_in(self.sampling_steps), DDIM())

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """|v_S(x_t, y_coarse) - v_T(x_t, y_fine)|^2, the mean over all elements."""
        x_t, t = self.noised_images(batch)
        target = self.teacher(x_t, t, batch.seen_by_teacher).v.detach()
        with seeded(seed_for(*batch.key, "student/dropout"), x_t.device):
            v = self.student(x_t, t, batch.cond).v
        loss = (v - target).square().mean()
        return Outcome(loss, {"scales": loss})


METHOD = YONOS
