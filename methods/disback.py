"""DisBack: Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion Distillation.

Zhang, Yang, Li, Zhao, Meng, Yang, Yang, Yang, Sun 2024, arXiv:2408.15991 (code: SYZhang0805/DisBack).

Matched with its teacher from the start, a student is told of a distribution that is far from its own first samples,
where the teacher's score says little. So the way there is recorded first, in the other direction:

1. Degradation: the fake score, which begins as the teacher, learns the samples of the student as it is at first, which
   rests. Every `record_every` steps a copy is kept, `path_length` of them; the last is the nearest to those samples.
2. Backtracking: the student is matched, as in DMD2, with these copies from the last but one to the first, each for
   `track_every` steps, and then with the teacher itself. The fake score goes on from where the degradation ended.

With `path_length: 0` it is DMD2 in one step.

Deviations:
- The authors' loop stops switching before the last of its targets where the path is short, and none of them is the
  teacher; here the teacher is the last, for as long as the training goes on, and a training that would not reach it is
  refused (`shortest`).
- Copies are guided by the teacher's scale, as with the authors, though the degradation learns with conditions alone.
- The host's game, normaliser and discriminator are DMD2's here (see `dmd2` for its deviations).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import guided
from diffdistill.options import AdversarialOptions, DMDOptions, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Zhang et al. 2024, arXiv:2408.15991",
    data="nothing; real images for its GAN, when gan_weight > 0",
    kind="distribution",
    equations={
        "degradation recording (eq. 7)": "DisBack.rests, DisBack.after_step, scaffold.matching.fake_score_loss",
        "distribution backtracking (eq. 8)": "DisBack.target, scaffold.matching.dmd_loss",
    },
)


@dataclass(frozen=True)
class Config(DMDOptions, AdversarialOptions, update_ratio=5):
    """DisBack's options."""

    path_length: int = option(5, "copies of the teacher on its way to the student's first samples; 0: none", at_least=0)
    record_every: int = option(
        100, "training steps from one of them to the next, in which the student rests", at_least=1
    )
    track_every: int = option(1000, "training steps in which each of them is the student's target", at_least=1)

    @property
    def recorded(self) -> int:
        """The training steps of the degradation."""
        return self.path_length * self.record_every


class DisBack(MatchingMethod):
    """`path` are the copies in the order in which they were made; the checkpoint has them."""

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        copies = [copy.deepcopy(self.fake_score).requires_grad_(False).eval() for _ in range(config.path_length)]
        self.path = nn.ModuleList(copies)
        scale, second = config.guidance_scale, config.guidance_scale_2
        self.targets = [*(guided(each, scale, second=second) for each in copies[-2::-1]), self.teacher]
        self.shortest = config.recorded + (len(self.targets) - 1) * config.track_every + 1
        if copies:
            self.state = {"path": self.path}

    def rests(self, step: int) -> bool:
        """The student, while the path is recorded."""
        return step < self.config.recorded

    def after_step(self, step: int) -> None:
        """Keep a copy of the fake score."""
        k, rest = divmod(step + 1, self.config.record_every)
        if not rest and k <= self.config.path_length:
            self.path[k - 1].load_state_dict(self.fake_score.state_dict())

    def target(self, step: int) -> nn.Module:
        """What the student is matched with at a training step."""
        return self.targets[min((step - self.config.recorded) // self.config.track_every, len(self.targets) - 1)]

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        self.teacher = self.target(batch.key[1])
        return super().student_loss(batch)


METHOD = DisBack
