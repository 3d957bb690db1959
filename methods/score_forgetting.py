"""SFD: Score Forgetting Distillation, A Swift, Data-Free Method for Machine Unlearning in Diffusion Models.

Chen, Zhang, Zhou, ICLR 2025, arXiv:2409.11219 (code: tqch/score-forgetting-distillation, DDPM).

A one-step student learns all classes of its teacher but some, by SiD, and in the place of those it learns another:

    L = SiD(c kept) + forget_weight SiD(c forgotten),

where in the second term the teacher alone is asked for the class that stands in, while student and fake score have the
forgotten label. So G(.|forgotten) becomes p(.|stand-in), and nothing else changes. No data are needed.

Deviations:
- One batch has both: classes are uniform, as everywhere here, and a forgotten sample's gradient counts forget_weight
  times the number of kept classes over that of forgotten ones, which gives the two terms the authors' ratio. They draw
  a batch for each.
- The fake score's loss counts all samples alike. Theirs has the same weight as the student's there, which for classes
  apart only says how fast each is learned.
- Stand-in: one class, or for each sample any kept one (`label_to_override`). Other terms of their code (a classifier,
  a warm-up, the second stage that needs data) are not here. Classes alone: no prompts.
- Levels, dropout, order of turns and the student's input are those of `sid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import sid_loss
from diffdistill.core.prediction import diffuse
from diffdistill.errors import UserError
from diffdistill.options import SiDOptions, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome
from diffdistill.scaffold.reward import weighted_gradient

ABOUT = About(
    paper="Chen et al. 2025, arXiv:2409.11219",
    data="nothing",
    kind="distribution",
    equations={
        "SiD of the kept classes and of the forgotten (code: train_forget's g_remain_loss, g_forget_loss)": (
            "ScoreForgetting.matching, core.losses.sid_loss"
        ),
        "the class that stands in, for the teacher alone (code: override_c)": "ScoreForgetting.asked",
    },
)


@dataclass(frozen=True)
class Config(SiDOptions):
    """SFD's options."""

    alpha: float = option(1.2, "weight of |Delta|^2 in the student's loss; the authors' 1.2")
    forget: tuple[int, ...] = option((), "the class labels that are forgotten, separated by commas", at_least=0)
    stand_in: int | None = option(
        None, "the class label that the student makes in their place; none: for each sample any of those that are kept",
        at_least=0,
    )  # fmt: skip
    forget_weight: float = option(0.01, "weight of the forgotten classes' loss", above=0)


class ScoreForgetting(MatchingMethod):
    """`swapped` are the stand-ins' labels of the turn's batch."""

    student_first, shares_samples, dropout = False, False, "mover"  # as SiD's

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        classes = teacher.num_classes
        if classes is None:
            raise UserError(
                "teacher: score_forgetting forgets classes, and this teacher has none; give one with classes"
            )
        for name, labels in (("forget", config.forget), ("stand_in", (config.stand_in or 0,))):
            if unknown := [label for label in labels if label >= classes]:
                known = f"the teacher has the classes 0 to {classes - 1}"
                raise UserError(f"{name}: {known}, and {unknown[0]} is none of them")
        self.kept = [label for label in range(classes) if label not in config.forget]
        if not config.forget or not self.kept or config.stand_in in config.forget:
            what = "nothing is forgotten" if not config.forget else "no other class stands in for what is forgotten"
            raise UserError(f"forget: {what}; give some of the teacher's classes, and another as stand_in")

    def asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The labels (B,) that the teacher is asked for, and how much each sample's gradient counts (B,)."""
        c, labels = self.config, batch.cond["class_labels"]
        forgotten = torch.isin(labels, torch.tensor(c.forget, device=labels.device))
        if c.stand_in is None:
            others = torch.tensor(self.kept, device=labels.device)[batch.integers(len(self.kept), "student/stand-in")]
        else:
            others = torch.full_like(labels, c.stand_in)
        weight = c.forget_weight * len(self.kept) / len(set(c.forget))
        return torch.where(forgotten, others, labels), torch.where(forgotten, weight, 1.0)

    def student_loss(self, batch: Batch) -> tuple[Tensor, Outcome]:
        """The teacher's labels are others; samples, fake score and noise are as in SiD."""
        x = self.generate(batch, "student")
        labels, weights = self.asked(batch)
        theirs = batch.cond | {"class_labels": labels}
        t, eps = self.times("student", batch), batch.randn("student/eps")
        return x, self.matched(weighted_gradient(x, weights), t, eps, theirs, batch.cond)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """SiD's loss, where nothing is forgotten."""
        return self.matched(x, t, eps, cond, cond)

    def matched(self, x: Tensor, t: Tensor, eps: Tensor, theirs: Cond, cond: Cond) -> Outcome:
        """The same with conditions of the teacher's own; both networks stay in the graph."""
        x_t, c = diffuse(x, t, eps), self.config
        x0_teacher, x0_fake = self.teacher(x_t, t, theirs).x0, self.fake_score(x_t, t, cond).x0
        losses = sid_loss(x, x0_teacher, x0_fake, c.alpha, c.normalise)
        return Outcome(losses.mean(), {"gap": (x0_teacher - x0_fake).detach().square().mean()})


METHOD = ScoreForgetting
