"""TSCD: trajectory segmented consistency distillation, of Hyper-SD.

Ren, Xia, Lu, Zhang, Wu, Xie, Wang, Xiao 2024, arXiv:2404.13686. The authors published weights and inference alone.

Consistency along the whole trajectory is hard to come by at once. So the noise levels are cut into k segments, and
the student learns to jump from wherever it is to the lower end of its segment, as `pcm`; then segments are merged, 8,
4, 2 and 1 of them, each stage going on with the student of the one before. With one step of the guided teacher from
x_t to x_r and the DDIM step f to the segment's end,

    loss = w d(f(x_t, t), sg f(x_r, r)) + lambda GAN;

where few steps are between the two, distance is the better measure, and where there are many, the GAN: w falls from
stage to stage, and lambda rises. After the last stage f is a consistency function to 0 from every noise level: one
network, or LoRA, that is sampled in any number of steps, with fresh noise between (`gamma` 1, TCDScheduler's eta).

Deviations:
- The paper has no formulas for the weights of the stages: here both are linear in the stage. Nor does it say which
  GAN; this one is PCM's, which tells f from its target at the segment's end, after noise.
- The N steps are those of the teacher's own sampler, and each k divides N.
- Neither human feedback nor score distillation for one step follow. `dmd2` with the student's folder as its teacher is
  the latter.
- In a stage before the last, a grid of samples takes k deterministic steps. The optimizer goes on between stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.options import SegmentOptions, StudentLevels, option
from diffdistill.players.sampler import DDIM, Sampler, gamma_step
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.halving import Stage
from diffdistill.scaffold.method import Batch
from diffdistill.scaffold.segments import SegmentMethod

ABOUT = About(
    paper="Ren et al. 2024, arXiv:2404.13686",
    data="real images, to place x_t where the trajectories pass",
    kind="trajectory",
    needs=("images",),
    equations={
        "segmented consistency": "scaffold.segments.SegmentMethod.following, scaffold.segments.SegmentMethod.jumped",
        "segments that merge": "TSCD.segments, TSCD.ends",
        "weights of the distance and the GAN by stage": "TSCD.weights",
        "guided step of the teacher": "scaffold.segments.SegmentMethod.less_noisy",
        "adversarial loss": "scaffold.adversary.EdgeAdversary",
        "unified sampling of 1 to 8 steps": "TSCD.sampler, players.sampler.Gamma",
    },
)


@dataclass(frozen=True)
class Config(SegmentOptions, StudentLevels, student_lr=1e-6):
    """TSCD's options; solver_steps is a multiple of each number of segments."""

    student_steps: int = option(1, "sampling steps after the last stage; its training is the same for any", at_least=1)
    stages: tuple[int, ...] = option((8, 4, 2, 1), "the segments of each stage, ending with 1", at_least=1)
    stage_steps: int = option(1000, "training steps of each stage", at_least=1)
    last_distance: float = option(0.5, "weight of the distance in the last stage; it is 1 in the first", at_least=0)
    gamma: float = option(1.0, "the share of fresh noise between sampling steps", at_least=0, at_most=1)

    def check(self) -> None:
        shown = ",".join(map(str, self.stages))
        if not self.stages or self.stages[-1] != 1:
            raise UserError(f"stages: {shown or 'nothing'} do not end with 1 segment; give them as 8,4,2,1")
        for number in self.stages:
            if self.solver_steps % number:
                raise UserError(f"stages: {number} segments do not divide solver_steps ({self.solver_steps})")


class TSCD(SegmentMethod):
    """The student is its own target."""

    trained_steps = range(1, 1001)

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student)
        self.state = {"stage": Stage(None)}
        self.whole = len(config.stages) * config.stage_steps

    def stage(self, step: int) -> int:
        """That of a training step; the last one goes on."""
        return min(step // self.config.stage_steps, len(self.config.stages) - 1)

    def stepped(self, step: int) -> None:
        self.state["stage"].done.fill_(step + 1)  # type: ignore[operator]

    def segments(self, step: int) -> int:
        """How many there are at a training step."""
        return int(self.config.stages[self.stage(step)])

    def sampler(self) -> Sampler:
        """Before training that of the last stage, at whose end it is exported."""
        done = int(self.state["stage"].done)  # type: ignore[arg-type]
        number = self.segments(done - 1) if done else 1
        if number == 1:
            return Sampler(self.student, self.levels_in(self.sampling_steps), gamma_step(self.config.gamma))
        return Sampler(self.student, self.levels[:: self.config.solver_steps // number], DDIM())

    def ends(self, step: int, i: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """A step that ends at a border belongs to the segment above it."""
        n = self.config.solver_steps // self.segments(step)
        grid, first = self.grid.to(i.device), i - i % n
        return grid[first], grid[first + n]

    def weights(self, step: int) -> tuple[float, float]:
        """From 1 to last_distance, and from a part of gan_weight to all of it."""
        k, n = self.stage(step), len(self.config.stages)
        fallen = k / max(n - 1, 1) * (1 - self.config.last_distance)
        return 1 - fallen, self.config.gan_weight * (k + 1) / n


METHOD = TSCD
