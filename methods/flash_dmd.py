"""Flash-DMD: Towards High-Fidelity Few-Step Image Generation.

Chen, Huang, Liu, Zhu, Qu, Chen, Cheng, Sun 2025, arXiv:2511.20549 ("... with Efficient Distillation and Joint
Reinforcement Learning"; no code: by others' summaries of its text, its equations and Algorithm 1).

DMD2 adds the gradients of matching and GAN at every step of its student, where they pull against each other, and its
fake score is a discriminator too, which is why it needs five turns for one of the student's. Here each does one thing:

- Steps at much noise, which decide what is where, are matched with the teacher, as in DMD, and with nothing else.
- Steps at little noise, which paint the details, are judged by a discriminator that looks at images, decoded ones of
  latents, and are not matched. Each turn of the student has one level of either kind:  L = L_DM + gan_weight L_GAN.
- The fake score learns the samples of the matched steps alone, in one or two turns for one of the student's.

`matched_steps` says how many of the steps are matched: of four the first two, 999 and 749. With one step both losses
meet in it.

Deviations:
- The authors' discriminator is heads on a frozen network (SAM's image encoder), of which there is none here: it is
  convolutions that learn from nothing, and it does not see conditions. Its loss is the logistic one, as in the paper's
  equations; its algorithm says hinge.
- What a step at little noise reads is what the student's sampler brings there. Theirs goes on to a clean image without
  gradients, and noises that anew.
- The fake score may be drawn along by the student (`alignment`), as with the authors, whose share is not known; it is
  off, since it has a bias where the fake score takes few turns (`verify dmd2`).
- `fake_scores: per_level` is the default, for the reason that `dmd2` says.
- The second stage, preference optimisation with a reward on noisy latents beside the distillation, is not here: `pso`
  tunes the student afterwards, and `reward_beta` weights the matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.options import AlignmentOptions, DMDOptions, SimulationOptions, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import PixelAdversary
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Need, Outcome, Turn
from diffdistill.scaffold.simulation import drawn_level

ABOUT = About(
    paper="Chen et al. 2025, arXiv:2511.20549",
    data="real images, for its discriminator",
    kind="distribution",
    needs=("images",),
    equations={
        "matching at much noise (eq. 4)": "FlashDMD.matched_levels, scaffold.matching.dmd_loss",
        "GAN on pixels at little noise (eq. 10)": (
            "FlashDMD.judged_levels, scaffold.adversary.PixelAdversary, players.discriminator.ImageDiscriminator"
        ),
        "fake score that is no discriminator, and drawn along (eq. 11)": (
            "scaffold.matching.fake_score_loss, scaffold.matching.align"
        ),
        "training procedure (Algorithm 1)": "FlashDMD.student_loss, scaffold.matching.MatchingMethod.turns",
    },
)


@dataclass(frozen=True)
class Config(DMDOptions, SimulationOptions, AlignmentOptions, student_steps=4, fake_scores="per_level", update_ratio=2):
    """Flash-DMD's options."""

    matched_steps: int | None = option(
        None, "the student's first so many steps are matched, the others judged; default: half of them", at_least=1
    )
    gan_weight: float = option(0.3, "weight of the discriminator in the student's loss", above=0)
    discriminator_lr: float = option(2e-4, "AdamW's learning rate for the discriminator", above=0)


class FlashDMD(MatchingMethod):
    """The discriminator is a player of its own, and moves in every step; no network drops out."""

    needs = frozenset({Need.IMAGES})

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        if self.matched_levels().stop > self.steps:
            raise UserError(f"matched_steps: {config.matched_steps} is more than the student's {self.steps} steps")
        self.needs = self.needs | ({Need.DECODER} if teacher.latent else set())
        self.adversary = PixelAdversary(teacher, self.as_images)
        self.players["discriminator"] = self.adversary.discriminator

    def matched_levels(self) -> range:
        return range(self.config.matched_steps or (self.steps + 1) // 2)

    def judged_levels(self) -> range:
        """Those of its levels whose samples the discriminator judges: the others, or the last."""
        return range(min(self.matched_levels().stop, self.steps - 1), self.steps)

    def judged(self, batch: Batch) -> Tensor:
        """Samples (B, ...) of the level that is judged in this step."""
        levels = self.judged_levels()
        return self.generate_at(levels[drawn_level(len(levels), batch, "student/judged level")], batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        x, outcome = super().student_loss(batch)
        gan = self.adversary.student_loss(x if self.steps == 1 else self.judged(batch), batch)
        return x, Outcome(outcome.loss + self.config.gan_weight * gan, {**outcome.shown, "gan": gan})

    def other_turns(self, step: int) -> Sequence[Turn]:
        return [Turn("discriminator", self.discriminator_turn)]

    def discriminator_turn(self, batch: Batch) -> Outcome:
        """Tells the batch's images from the judged samples of this step, or from new ones."""
        return self.adversary.turn(batch, partial(self.judged, batch))


METHOD = FlashDMD
