"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis.

Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman, NeurIPS 2024, arXiv:2405.14867 (code: tianweiy/DMD2).

The student x = G(z, c) follows the gradient of KL(q_t || p_t) between its own noised samples and the
teacher's, at all noise levels: the teacher's score minus that of a "fake score" network, which is trained on
the student's samples. The fake score takes `update_ratio` steps for each of the student's (two time-scale
update rule). A discriminator head on the fake score's bottleneck, which reads noised real and generated
images, adds a GAN loss. There is no regression on teacher pairs.

A student of several steps (`student_steps`) is trained on inputs that its own sampler makes (backward
simulation): a level is drawn, the sampler runs down to it without gradients, and that level's pass gives x. The levels
divide the way down from `student_level`, the noisiest unless given.

Deviations: the normaliser is clamped at 1e-5 where the authors replace nan by 0. The discriminator reads the middle
block (on EDM networks theirs stops at the encoder's end), and real and generated images share its times, and the
classes of the real ones. Times are continuous fractions of EDM's grid, where theirs are its 1000 points. "sdxl-4step"
holds the authors' settings for SDXL, which nobody has run here. `discriminator_depths`, heads on several layers with
the mean of their losses, is FastGen's. With `normalise: false` the gradient is the exact one of the KL divergence,
which `verify` compares with its closed form.

`reward_beta` is Re-DMD's (arXiv:2512.04678): the matching of each sample counts exp(reward/beta) times, its GAN once.
It does not move the optimum (`verify`).

`alignment` is SenseFlow's IDA (arXiv:2506.00523): the fake score's weights move a share of the way to the student's
after each of its steps. `verify` has its bias, 4 to 75% of what lies between the two.

`midpoint_weight` is its ISG: a step of the student is to come where the teacher's step to a point inside of it, and the
student's own from there, come to; `verify` has its bias, 11 to 24% of what one step of the teacher is off by. The step
begins where the student's own sampler does, with the authors half the time at noised images; guidance is one scale.
The distance is that of the normal form, theirs of a flow's own; their discriminator, on DINOv2, is not here.

`anchor_weight` is DP-DMD's (arXiv:2602.03139), for variety, which DMD loses in its first step: that step follows the
teacher's trajectory to the second level, the others are matched, and all are deterministic. The teacher's last step
ends at that level, where the authors' ends near it and the chord to there is followed.

`fake_scores: per_level` is ours. The authors' one fake score learns the samples of all levels together, so that their
mixture is matched: a level that is right by itself is pushed away, to make up for the others (`verify` shows it on
Gaussians). With a fake score for each level every level is matched by itself. The levels take turns, each for the
steps between two of the student's, so that a step costs what it did; the memory is that of the further networks or
LoRAs.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.options import DMD2Options
from diffdistill.scaffold.matching import MatchingMethod

ABOUT = About(
    paper="Yin et al. 2024, arXiv:2405.14867",
    data="nothing; real images for its GAN, when gan_weight > 0",
    kind="distribution",
    equations={
        "distribution matching gradient (section 3; DMD, arXiv:2311.18828)": (
            "scaffold.matching.distribution_matching_gradient"
        ),
        "denoising loss of the fake score (section 3)": "scaffold.matching.fake_score_loss",
        "two time-scale update rule (section 4.2)": "scaffold.matching.MatchingMethod.turns",
        "GAN loss on noised images, head on the fake score (section 4.3)": (
            "scaffold.adversary.Adversary, core.losses.gan_discriminator_loss, core.losses.gan_generator_loss"
        ),
        "implicit distribution alignment (SenseFlow, arXiv:2506.00523)": "scaffold.matching.align",
        "intra-segment guidance (SenseFlow)": "scaffold.matching.MatchingMethod.with_midpoint",
        "diversity anchor (DP-DMD, arXiv:2602.03139)": "scaffold.matching.MatchingMethod.with_anchor",
        "weights by a reward (Re-DMD, arXiv:2512.04678)": "scaffold.matching.MatchingMethod.by_reward",
        "multi-step student and backward simulation (sections 4.4, 4.5)": "scaffold.simulation.simulated_input",
    },
)


@dataclass(frozen=True)
class Config(DMD2Options):
    """DMD2's options; the student's times are fractions of the teacher's own."""


class DMD2(MatchingMethod):
    """DMD without its regression, with more steps of the fake score, a discriminator on it, and several steps.

    As with the authors, no network drops out: in one of the two it would be noise in their difference.
    """


METHOD = DMD2
