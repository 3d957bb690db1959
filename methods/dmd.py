"""DMD: One-step Diffusion with Distribution Matching Distillation.

Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, CVPR 2024, arXiv:2311.18828. There is no code of the
authors'; that of DMD2 (tianweiy/DMD2) continues it. Formulas and settings are those of the paper's text.

The student x = G(z, c) follows the gradient of KL(q_t || p_t) between its own noised samples and the teacher's,
at all noise levels: the teacher's score minus that of a "fake score" network, which takes one step on the
student's samples for each of the student's own. That divergence is content with one mode of several, and
training with it alone drifts. So a regression loss holds the student to the teacher's deterministic sampler on
noise-image pairs that were made beforehand (`diffdistill pairs`), which keeps all modes.

Deviations: the normaliser is clamped at 1e-5. The gradient is Algorithm 2's, which leaves out the factor alpha_t of
eq. 7 and 8 (for EDM it is 1). With `normalise: false` the gradient is the exact one of the KL
divergence, which `verify` compares with its closed form. The student keeps its time input, at a fixed level.
LPIPS is the `lpips` package's, the paper has PIQ's; the default, l2, needs neither. The regression has as many
samples a step as the matching, and they are not matched too (the paper does both differently for LAION alone).
Mixed precision, which the paper has for ImageNet, is left to `mixed_precision`. The presets' batch sizes are those
of one of the paper's seven processes; "digits" is ours, and its pairs are given with --pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.options import DMDOptions, ImageDistance, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod, dmd_loss
from diffdistill.scaffold.method import Batch, Need, Outcome

ABOUT = About(
    paper="Yin et al. 2023, arXiv:2311.18828",
    data="noise-image pairs of the teacher, when regression_weight > 0",
    kind="distribution",
    equations={
        "one-step generator (section 3.1)": "players.sampler.Sampler.one_step",
        "distribution matching gradient (eq. 7, its weight eq. 8; Algorithm 2)": (
            "scaffold.matching.distribution_matching_gradient"
        ),
        "denoising loss of the fake score (eq. 6; Algorithm 3)": "scaffold.matching.fake_score_loss",
        "regression loss on noise-image pairs (eq. 9)": "DMD.regression, data.pairs.make_pairs",
        "guidance of the real score alone (section 3.4)": "core.guidance.guided",
        "training procedure (Algorithm 1)": "scaffold.matching.MatchingMethod.turns, DMD.student_loss",
    },
)


@dataclass(frozen=True)
class Config(DMDOptions, ImageDistance, distance="l2"):
    """DMD's options; the distance is the regression's, and the pairs have the teacher's guidance scale and level."""

    regression_weight: float = option(0.25, "weight of the regression on pairs; 0: none, and no pairs", at_least=0)


class DMD(MatchingMethod):
    """One pass of the student serves the fresh noise and that of the pairs; no network drops out (appendix B)."""

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        if config.regression_weight > 0:
            self.needs = self.needs | {Need.PAIRS}

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        pair = batch.pair if Need.PAIRS in self.needs else None
        x, x_ref = self.beside(batch, pair)
        weighted, shown = self.by_reward(x, batch)
        outcome = self.matching(weighted, self.times("student", batch), batch.randn("student/eps"), batch.cond)
        shown = {**outcome.shown, **shown}
        if pair is None:
            return x, Outcome(outcome.loss, shown)
        regression = self.regression(x_ref, pair.x0)
        loss = outcome.loss + self.config.regression_weight * regression
        return x, Outcome(loss, {**shown, "regression": regression})

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        return dmd_loss(x, t, eps, cond, self.teacher, self.fake_score, normalise=self.config.normalise)

    def regression(self, x_ref: Tensor, y_ref: Tensor) -> Tensor:
        """The mean distance of G(z_ref) from what the teacher's sampler makes of z_ref, both (B, ...)."""
        return self.image_distance(x_ref, y_ref).mean()


METHOD = DMD
