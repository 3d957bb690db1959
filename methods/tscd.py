"""TSCD: trajectory segmented consistency distillation, of Hyper-SD.

Ren, Xia, Lu, Zhang, Wu, Xie, Wang, Xiao 2024, arXiv:2404.13686. The authors published weights and inference alone.

Consistency along the whole trajectory is hard to come by at once. So the noise levels are cut into k segments, and
the student learns to jump from wherever it is to the lower end of its segment, as `pcm`; then segments are merged, 8,
4, 2 and 1 of them, each stage going on with the student of the one before. With one step of the guided teacher from
x_t to x_r and the DDIM step f to the segment's end,

    loss = w d(f(x_t, t), f-(x_r, r)) + lambda GAN,    f- the student's moving average;

where few steps are between the two, distance is the better measure, and where there are many, the GAN: w falls from
stage to stage, and lambda rises. After the last stage f is a consistency function to 0 from every noise level: one
network, or LoRA, that is sampled in any number of steps, with fresh noise between (`gamma`, TCDScheduler's eta, which
the authors lower where there are more steps).

Deviations:
- The paper has no formulas for the weights of the stages: here both are linear in the stage. Nor does it say which
  GAN; this one is PCM's, which tells f from its target at the segment's end, after noise.
- The N steps are those of the teacher's own sampler, and each k divides N.
- Human feedback is a term of the last stage, minus `reward_weight` times the mean reward of f, for any reward that has
  a gradient; the paper's rewards have margins, and train a LoRA of their own. Score distillation for one step does not
  follow: `dmd2` with the student's folder as its teacher is that.
- In a stage before the last, a grid of samples takes k deterministic steps. The optimizer goes on between stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.catalogue import About
from diffdistill.options import MergingOptions, option
from diffdistill.scaffold.segments import MergingMethod

ABOUT = About(
    paper="Ren et al. 2024, arXiv:2404.13686",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "segmented consistency": "scaffold.segments.SegmentMethod.following, scaffold.segments.SegmentMethod.jumped",
        "segments that merge": "scaffold.segments.MergingMethod.segments, scaffold.segments.MergingMethod.ends",
        "weights of the distance and the GAN by stage": "TSCD.weights",
        "guided step of the teacher": "scaffold.segments.SegmentMethod.less_noisy",
        "adversarial loss": "scaffold.adversary.EdgeAdversary",
        "human feedback": "scaffold.segments.MergingMethod.reward_weight, scaffold.reward.Judge",
        "unified sampling of 1 to 8 steps": "scaffold.segments.MergingMethod.sampler, players.sampler.Gamma",
    },
)


@dataclass(frozen=True)
class Config(MergingOptions, student_lr=1e-6):
    """TSCD's options."""

    last_distance: float = option(0.5, "weight of the distance in the last stage; it is 1 in the first", at_least=0)
    target_ema: float = option(0.95, "decay of the target, the student's moving average", at_least=0, below=1)


class TSCD(MergingMethod):
    """The target is a slow copy of the student, which lies in the checkpoint."""

    slow_target = True

    def weights(self, step: int) -> tuple[float, float]:
        """From 1 to last_distance, and from a part of gan_weight to all of it."""
        k, n = self.stage(step), len(self.config.stages)
        fallen = k / max(n - 1, 1) * (1 - self.config.last_distance)
        return 1 - fallen, self.config.gan_weight * (k + 1) / n


METHOD = TSCD
