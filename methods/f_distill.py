"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching.

Xu, Nie, Vahdat (NVIDIA) 2025, arXiv:2502.15681 (code: NVlabs/FastGen).

DMD's gradient is that of KL(q_t || p_t), the student's samples against the teacher's, which is content with one mode
of several. Any f-divergence D_f(p_t || q_t) = E_q f(r), r = p_t/q_t, has the same gradient but for a weight of each
sample, h(r) = r^2 f''(r), which is 1 for that KL divergence. Divergences that seek modes less have more weight where
the teacher's density is the greater. The ratio is exp(d) of a discriminator's logit d, and the game is DMD2's with its
discriminator, a head on the fake score, whose GAN loss is there too. As h > 0 the optimum is the same.

The ratio is kept within [`ratio_low`, `ratio_high`] and, in each of `ratio_bins` parts of the range of noise, divided
by its mean, which is 1 for the true one (E_q r = 1); the weights are divided by theirs.

Deviations:
- Both means are moving averages of the steps before (FastGen: of the step itself, of the whole batch of all
  processes; of the ratio an average with those before, if its rate says so), so that they do not depend on how
  a step is divided. The parts are of the angle, where FastGen's are of the teacher's own time.
- The discriminator is DMD2's head on the fake score with its weight in that network's loss, and its real and generated
  images have their own times; in FastGen heads read the frozen teacher, have an optimizer of their own, and the GAN
  loss shares the noise of the matching. A logit is asked for at the noise of the matching in both.
- With guidance p is the data still, as in FastGen: the ratio is not the guided teacher's.
- Students of several steps (`student_steps`) are additions, as DMD2's; each fake score has means of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond
from diffdistill.core.prediction import diffuse, expand
from diffdistill.options import DMD2Options, RatioOptions
from diffdistill.scaffold.matching import MatchingMethod, distribution_matching_gradient, injected
from diffdistill.scaffold.method import Need, Outcome

ABOUT = About(
    paper="Xu et al. 2025, arXiv:2502.15681",
    data="real images, for the ratio of the densities",
    kind="distribution",
    needs=("images",),
    equations={
        "gradient of an f-divergence (theorem 1)": (
            "FDistill.matching, scaffold.matching.distribution_matching_gradient"
        ),
        "weights h(r) = r^2 f''(r) (table 1)": "scaffold.ratio.WEIGHTS",
        "ratio by a discriminator, and its normalisation": "scaffold.ratio.RatioWeight, scaffold.adversary.Adversary",
    },
)


@dataclass(frozen=True)
class Config(DMD2Options, RatioOptions, gan_weight=0.003):
    """f-distill's options."""


class FDistill(MatchingMethod):
    """DMD2 with a weight for each sample; no network drops out."""

    needs = frozenset({Need.IMAGES})

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """h(r) (s_fake - s_teacher) is pushed into x (B, ...)."""
        networks, normalise = (self.teacher, self.fake_score), self.config.normalise
        gradient, gap = distribution_matching_gradient(x, diffuse(x, t, eps), t, cond, *networks, normalise)
        h = self.weights[self.place](self.ratio_logits(x, t, eps, cond), t)
        loss = injected(x, expand(h, x) * gradient, self.fake_score, normalise)
        return Outcome(loss, {"gap": gap.mean(), "weight": h.square().mean()})


METHOD = FDistill
