"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation.

Nguyen, Tran, CVPR 2024, arXiv:2312.05239 (code: VinAIResearch/SwiftBrush).

Variational score distillation (Wang et al. 2023, arXiv:2305.16213) of a network instead of a 3D scene: the
student x = G(z, c) moves along the difference of two guided noise predictions of its noised samples, the
teacher's and that of a "LoRA teacher", which is the teacher with low-rank weights that learn the student's
distribution. Both are guided, so the LoRA teacher also learns without its condition. No images are needed.

Formulas and settings were read in the authors' code. Deviations: LoRA on all linear layers and convolutions,
where the authors adapt the queries and values of a text-to-image network's attention (`lora_targets` "to_q,to_v"
is theirs); the condition is dropped sample by sample, not for a whole batch. The teacher is a network of its
own, not the LoRA teacher with its adapters switched off. For schedules other than variance-preserving ones,
sigma_t and alpha_t are those of the normal form, sin t and cos t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Cond, Denoiser, choose
from diffdistill.core.guidance import guided
from diffdistill.core.losses import gradient_injection, per_sample_mean
from diffdistill.core.prediction import diffuse, expand
from diffdistill.options import FakeScoreGuidance, MatchingOptions, MatchingTimes, RewardOptions
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.matching import MatchingMethod
from diffdistill.scaffold.method import Batch, Outcome

ABOUT = About(
    paper="Nguyen & Tran 2024, arXiv:2312.05239",
    data="nothing",
    kind="distribution",
    equations={
        "variational score distillation loss of the student (section 3)": "SwiftBrush.matching",
        "denoising loss of the LoRA teacher (section 3)": "SwiftBrush.denoising",
        "guidance of both networks; conditions dropped for it": "core.guidance.guided, SwiftBrush.fake_score_cond",
        "one update each in turn (Algorithm 1)": "scaffold.matching.MatchingMethod.turns",
        "low-rank weights on the teacher": "players.lora.lora_view",
    },
    defaults={"lora": "fake_score", "lora_rank": 64, "lora_alpha": 108.0, "lora_targets": "all"},
)


@dataclass(frozen=True)
class Config(MatchingOptions, MatchingTimes, FakeScoreGuidance, RewardOptions, student_lr=1e-6, fake_score_lr=1e-3):
    """SwiftBrush's options; both the teacher and the fake score are guided."""


class SwiftBrush(MatchingMethod):
    """The fake score is the paper's LoRA teacher."""

    fake_score_stream = "lora"

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        self.guided_fake_score = guided(self.fake_score, config.guidance_scale, second=config.guidance_scale_2)

    def fake_score_cond(self, batch: Batch) -> Cond:
        return self.dropped(batch.cond, batch.uniform("lora/drop", torch.get_default_dtype()))

    def dropped(self, cond: Cond, u: Tensor) -> Cond:
        """The conditions, or the null ones where u (B,), uniform in [0, 1), is below `label_dropout`."""
        null = self.fake_score.null
        return cond if null is None else choose(u < self.config.label_dropout, null(cond), cond)

    def matching(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Outcome:
        """x (B, ...) is pushed along sigma_t^2 (eps_lora - eps_teacher), both guided, at angles t (B,).

        Since sigma_t (eps_lora - eps_teacher) is alpha_t (D_teacher - D_lora), that is the gradient of the
        KL divergence at t times sigma_t^3 / alpha_t, if nothing is guided.
        """
        with torch.no_grad():
            x_t = diffuse(x, t, eps)
            gap = self.teacher(x_t, t, cond).eps - self.guided_fake_score(x_t, t, cond).eps
            grad = expand(torch.sin(t) ** 2, gap) * gap
        return Outcome(gradient_injection(x, grad), {"gap": gap.square().mean()})

    def denoising(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """The mean of |alpha_t (eps_lora - eps)|^2 on the student's samples x (B, ...), which get no gradient."""
        x = x.detach()
        error = per_sample_mean((self.fake_score(diffuse(x, t, eps), t, cond).eps - eps).square())
        return (expand(torch.cos(t) ** 2, error) * error).mean()


METHOD = SwiftBrush
