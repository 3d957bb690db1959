"""SiD: Score identity Distillation, Exponentially Fast Distillation of Pretrained Diffusion Models.

Zhou, Zheng, Wang, Yin, Huang, ICML 2024, arXiv:2404.04057 (code: mingyuanzhou/SiD); guidance from Zhou, Wang,
Zheng, Huang, ICLR 2025, arXiv:2406.01561 (code: mingyuanzhou/SiD-LSG).

The student x = G(z, c) minimises the Fisher divergence F = E|D_phi - D_psi|^2 between its noised samples and the
teacher's, where D_psi, the fake score, is trained on the student's samples. F itself would need the change of
D_psi with the student; score identities give a loss that does not: with Delta = D_phi - D_psi,
<Delta, (D_phi - x) - alpha Delta>. Its gradient flows through x and through the inputs of both networks, whose
parameters stay fixed: without those paths it is Diff-Instruct's, whatever alpha. The value of the loss says
nothing (its expectation is (1 - alpha) F); `gap` is F.

A student of several steps (few-step SiD, arXiv:2505.12674; SiD-DiT, arXiv:2509.25127) is trained at one of them, drawn
for the step, on the input that its own sampler makes. SiD-DiT's levels are `times: flow`: the flow time is
sigmoid(N(ln 2, 1.6^2)), and the loss has the weight 1 - t. With a discriminator (SiDA, arXiv:2410.14919), a head on the
fake score, the student also learns from images, and can surpass its teacher if they are better.

With guidance (SiD-LSG) the teacher is evaluated at scale kappa_4 (`guidance_scale`), the fake score at
kappa_2 = kappa_3 (`fake_score_guidance`), and the fake score is trained at kappa_1
(`fake_score_training_guidance`), each with one batched call; it then learns without a class too, from samples that
the student makes without it.

Deviations: losses are means over elements, where the authors' are sums times 100, which Adam does not see.
Samples with nan are not dropped and gradients not cleaned: the trainer refuses what is not finite. Both turns
of a step have the same conditions, where the authors draw new ones. No augmentation of what the fake score sees.
The student's input is what the stock scheduler draws: of standard deviation sqrt(sigma^2 + 1) for an
EDMEulerScheduler and 1 for a VP teacher, where the authors' have sigma and SiD-LSG's sigma_t. For a teacher that is
not EDM's the noise levels are those of EDM at the same angle; SiD-LSG's are `times: native`. SiD-LSG weights a fake
score that predicts v by SNR/(SNR + 1); that is `fake_score_loss: epsilon` here. The weights of the loss are the
code's; the paper's text was not compared. Of several steps both players' samples have the same noise, and SiD-DiT's
fake score has the error of the flow's velocity, (sin t + cos t)^2 times that of v. The discriminator and its noise are
DMD2's; SiDA divides both of its losses by the normalisers of the scores' and begins with it after some steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, choose
from diffdistill.core.guidance import guided
from diffdistill.core.losses import sid_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import logit_normal, native_uniform
from diffdistill.options import AdversarialOptions, FakeScoreGuidance, SiDOptions, SimulationOptions, option
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod, fake_score_loss
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Zhou et al. 2024, arXiv:2404.04057; guidance: arXiv:2406.01561",
    data="nothing; real images for its GAN, when gan_weight > 0",
    kind="distribution",
    equations={
        "the student's loss (the code's generator_loss)": "sid_loss, SiD.matching",
        "denoising loss of the fake score": "scaffold.matching.fake_score_loss, SiD.denoising",
        "noise levels of both losses": "core.times.edm_karras, core.times.edm_log_normal, SiD.times",
        "several steps (arXiv:2505.12674, arXiv:2509.25127)": (
            "scaffold.simulation.simulated_input, core.times.logit_normal"
        ),
        "discriminator (arXiv:2410.14919)": "scaffold.adversary.Adversary",
        "long and short guidance (arXiv:2406.01561)": "core.guidance.guided, SiD.fake_score_cond",
    },
)


@dataclass(frozen=True)
class Config(SiDOptions, FakeScoreGuidance, SimulationOptions, AdversarialOptions):
    """SiD's options; guidance_scale is kappa_4."""

    alpha: float = option(1.2, "weight of |Delta|^2 in the student's loss; the authors' 1.0 to 1.2")
    times: Literal["karras", "native", "flow"] = option(
        "karras",
        "levels of the losses; karras: EDM's grid and log-normal; native: uniform in the teacher's own time; flow: "
        "SiD-DiT's, whatever time_low and time_high, with its weight",
    )
    fake_score_guidance: float = option(
        1.0, "guidance of the fake score in the student's loss, kappa_2 = kappa_3", at_least=0
    )
    fake_score_training_guidance: float = option(1.0, "guidance of the fake score in its own loss, kappa_1", at_least=0)


class SiD(MatchingMethod):
    """The fake score moves first, and each player draws its own samples."""

    student_first = False
    shares_samples = False
    dropout = "mover"

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        self.evaluated = [guided(each, config.fake_score_guidance) for each in self.fake_scores]
        self.trained = [guided(each, config.fake_score_training_guidance) for each in self.fake_scores]

    def times(self, player: str, batch: Batch) -> Tensor:
        c, schedule = self.config, self.schedule
        if c.times == "karras":
            return super().times(player, batch)
        if c.times == "flow":
            t = batch.draw(f"{player}/t", lambda n, draw: logit_normal(schedule, n, draw, math.log(2), 1.6))
            return t.clamp(schedule.t_min, schedule.t_max)
        return batch.draw(f"{player}/t", lambda n, draw: native_uniform(schedule, n, draw, c.time_low, c.time_high))

    def fake_score_cond(self, batch: Batch) -> Cond:
        """Where the fake score is guided some are the null condition, with which its samples are made too."""
        if self.config.fake_score_guidance == 1 and self.config.fake_score_training_guidance == 1:
            return batch.cond
        assert self.fake_score.null is not None
        drop = batch.uniform("fake_score/labels", torch.get_default_dtype()) < self.config.label_dropout
        return choose(drop, self.fake_score.null(batch.cond), batch.cond)

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        return fake_score_loss(self.trained[self.place], x, t, eps, cond, kind=self.config.fake_score_loss)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """Both networks stay in the graph."""
        x_t = diffuse(x, t, eps)
        x0_teacher, x0_fake = self.teacher(x_t, t, cond).x0, self.evaluated[self.place](x_t, t, cond).x0
        losses = sid_loss(x, x0_teacher, x0_fake, self.config.alpha, self.config.normalise)
        if self.config.times == "flow":
            losses = losses / (1 + self.schedule.data_std * torch.tan(t))  # 1 - the flow time
        return Outcome(losses.mean(), {"gap": (x0_teacher - x0_fake).detach().square().mean()})


METHOD = SiD
