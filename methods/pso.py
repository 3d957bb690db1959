"""PSO: Pairwise Sample Optimization, Tuning Timestep-Distilled Diffusion Models.

Miao, Yang, Lin, Wang, Liu, Wang, Qiu 2024, arXiv:2410.03190 (code: ZichenMiao/Pairwise_Sample_Optimization).

A student of a few steps is tuned on preferences and keeps its steps, which tuning as a diffusion model would undo. It
is the `teacher` here: a folder of ours, which says its levels, or any distilled model with `--levels`. That is what the
student begins as, and the reference.

Each step of its sampler but the last is Gaussian, x_s ~ N(m(x_t), spread^2), with fresh noise on the predicted sample.
So every way that it takes has a likelihood, and of two of one condition, from different noise, the better is to become
likelier and the worse less, relative to the reference:

    L = -log sigmoid( beta (log clip(rho_w, 1 -+ eps) - log clip(rho_l, 1 -+ eps)) ),  rho = pi(x_s|x_t)/pi_ref(x_s|x_t)

with the mean over dimensions of the log likelihoods, and over the steps of the loss. The clip is what holds it to the
reference. Which is the better a reward says of the student's own samples (online), or files of pairs (offline), whose
images are noised to the student's levels.

Deviations:
- The last step, which has no noise, has no likelihood, with the authors too: so one step alone cannot be tuned so, nor
  steps without noise (`ddim`). Both are refused.
- An update is of the pairs of one batch, each used once, where the authors sample several batches first; all steps of
  both ways are in it, as with their accumulation.
- Pairs of equal reward have no part.
- Offline the two images of a pair share their noise, and the loss is the same as online. The authors' offline loss, for
  DreamBooth, is the difference of denoising losses with a term that holds the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import per_sample_mean
from diffdistill.core.prediction import Prediction, diffuse, expand
from diffdistill.errors import UserError
from diffdistill.options import PreferenceOptions, option
from diffdistill.players.sampler import DDIM, Sampler, step_named
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Need, Outcome
from diffdistill.scaffold.simulation import sampled_path
from diffdistill.scaffold.solo import SoloMethod

ABOUT = About(
    paper="Miao et al. 2024, arXiv:2410.03190",
    data="a reward of the student's own samples, or pairs of images of which one is better",
    kind="preference",
    needs=("reward",),
    equations={
        "likelihood of a step (code: distilled_step_with_logprob)": "PSO.log_ratio, players.sampler.Renoise.spread",
        "pairwise loss (code: train_online_pso_sdxl_dmd2)": "pso_loss, PSO.student_turn",
        "pairs of the student's samples (online)": "PSO.drawn, scaffold.simulation.sampled_path",
        "given pairs (offline)": "PSO.noised",
    },
)


@dataclass(frozen=True)
class Config(PreferenceOptions, weight_decay=1e-6):
    """PSO's options."""

    preferences: Literal["reward", "pairs"] = option(
        "reward",
        "reward: of two samples of the student, --reward says the better; pairs: --data and --losers hold them",
    )
    beta: float = option(50.0, "beta, how sharply the better of two is told from the worse", above=0)
    clip: float = option(
        0.1, "eps: a likelihood further than that from the reference's has no gradient", above=0, below=1
    )


class PSO(SoloMethod):
    """The student at `levels`, and the frozen reference."""

    needs = frozenset({Need.REWARD})

    def __init__(self, teacher: Teacher, config: Config, *, student: Denoiser | None = None):
        super().__init__(teacher, config, student=student)
        if config.preferences == "pairs":
            self.needs = frozenset({Need.IMAGES, Need.LOSERS})
        self.reference = frozen(teacher.denoiser)
        self.levels = self.levels_of(teacher)
        step = step_named(teacher.move)
        if len(self.levels) < 2 or step is None or isinstance(step, DDIM):
            what = "one step" if len(self.levels) < 2 else f"steps without fresh noise ({teacher.move})"
            raise UserError(
                f"teacher: a student of {what} has no likelihoods that pso could raise; tune it with distillation_dpo, "
                "or sample it with fresh noise in more steps, as --student-steps 2"
            )
        self.step = step

    def sampler(self) -> Sampler:
        """As the student that is tuned."""
        return Sampler(self.student, self.levels, self.step)

    def student_turn(self, step: int, batch: Batch) -> Outcome:
        """The loss of two ways (2B, ...) under each condition, and how many pairs count."""
        self.student.eval()  # likelihoods with dropout would be of many students
        path, better, shown = self.drawn(batch) if self.config.preferences == "reward" else self.noised(batch)
        cond = twice(batch.cond)
        ratios = torch.stack([self.log_ratio(path[k], path[k + 1], k, cond) for k in range(len(self.levels) - 1)])
        first, second = ratios.chunk(2, 1)
        loss = pso_loss(first, second, better, self.config.beta, self.config.clip)
        margin = (better * (first - second).detach().mean(0)).mean()
        return Outcome(loss, {"margin": margin, **shown})

    def drawn(self, batch: Batch) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Two ways of the student's sampler (2B, ...), and 1, -1 or 0 (B,): which of the two ends is the better."""
        sampler = self.sampler()
        both = [sampled_path(sampler, batch, name) for name in ("a", "b")]
        one, other = (self.scored(path[-1], batch) for path in both)
        path = [torch.cat(pair) for pair in zip(*both, strict=True)]
        shown = {"reward": (one + other).mean() / 2, "gap": (one - other).abs().mean()}
        return path, torch.sign(one - other), shown

    def noised(self, batch: Batch) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Given pairs (2B, ...) at all levels, with the same noise for both; the first is the better.

        From level to level by the sampler's own step, with the image for its prediction: what a step keeps of the noise
        is then no error of the student's.
        """
        x0, sampler = torch.cat([batch.images, batch.worse]), self.sampler()
        path, t = list[Tensor](), torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for k, level in enumerate(self.levels):
            s = self.schedule.angle(level).to(t).expand(len(x0))
            z = batch.randn(f"z {k}").repeat(2, *[1] * (x0.ndim - 1))
            if not k:
                path.append(diffuse(x0, s, z))
            else:
                exact = Prediction(path[-1], t, x0, torch.ones_like(t), torch.zeros_like(t))
                path.append(self.step(exact, sampler.leads(k - 1).to(t).expand(len(x0)), s, z.clone))
            t = s
        return path, torch.ones(batch.size, device=x0.device), {}

    def log_ratio(self, x_t: Tensor, x_s: Tensor, k: int, cond: Cond) -> Tensor:
        """(n,) log pi/pi_ref of the step from level k, x_t (n, ...), to x_s (n, ...), the mean over dimensions."""
        t, s = (self.schedule.angle(self.levels[j]).to(x_t.device).expand(len(x_t)) for j in (k, k + 1))
        r = self.sampler().leads(k).to(s).expand(len(s))
        with torch.no_grad():
            reference = (x_s - self.mean(self.reference, x_t, t, k, r, s, cond)).square()
        own = (x_s - self.mean(self.student, x_t, t, k, r, s, cond)).square()
        return per_sample_mean((reference - own) / expand(2 * self.step.spread(r, s) ** 2, x_s))

    def mean(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, k: int, r: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """m(x_t) (n, ...), the step without its noise."""
        predicted = Sampler(denoiser, self.levels, self.step).predict(x_t, t, k, cond)
        return self.step(predicted, r, s, lambda: torch.zeros_like(x_t))


def twice(cond: Cond) -> Cond:
    """Conditions (2B, ...) of two batches with the same."""
    return {name: torch.cat([value, value]) for name, value in cond.items()}


def pso_loss(first: Tensor, second: Tensor, better: Tensor, beta: float, clip: float) -> Tensor:
    """The mean of -log sigmoid(beta (log clip(rho_w) - log clip(rho_l))) for log rho (K, B) of both ways.

    better (B,): 1 where the first is, -1 where the second is, 0 where neither.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    return -F.logsigmoid(beta * better * (first.clamp(low, high) - second.clamp(low, high))).mean()


METHOD = PSO
