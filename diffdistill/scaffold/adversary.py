"""A discriminator on the fake score: a head on its features, and the GAN losses of noised images.

Yin et al. 2024, arXiv:2405.14867, section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import gan_discriminator_loss, gan_generator_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.times import native_uniform
from diffdistill.errors import UserError
from diffdistill.players.discriminator import DiscriminatorHead
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch


class Adversary:
    """Images are noised to times that are uniform in the teacher's own; real ones have the classes of the batch."""

    def __init__(self, fake_score: Denoiser, teacher: Teacher):
        self.fake_score = fake_score
        self.head = _head(fake_score, teacher)

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) the discriminator's logits of x (B, ...) noised to the angles t (B,) with eps (B, ...)."""
        return self.head(self.fake_score.features(diffuse(x, t, eps), t, cond))

    def _times(self, player: str, batch: Batch) -> Tensor:
        return native_uniform(self.fake_score.schedule, batch.size, batch.generator(f"{player}/gan t"))

    def student_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The student's samples x (B, ...) are to be taken for real."""
        t = self._times("student", batch)
        return gan_generator_loss(self.logits(x, t, batch.randn("student/gan eps"), batch.cond))

    def critic_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The head and the fake score under it are to tell the batch's images from the samples x (B, ...)."""
        t = self._times("fake_score", batch)
        real = self.logits(batch.images, t, batch.randn("fake_score/gan eps real"), batch.cond)
        fake = self.logits(x, t, batch.randn("fake_score/gan eps fake"), batch.cond)
        return gan_discriminator_loss(real, fake)


def _head(fake_score: Denoiser, teacher: Teacher) -> nn.Module:
    if fake_score.feature_layer is None:
        raise UserError("gan_weight: this teacher's network has no bottleneck for a discriminator; use 0")
    parameter = next(fake_score.parameters())
    with torch.no_grad():
        t = torch.ones(1, dtype=torch.float64, device=parameter.device)
        features = fake_score.features(torch.zeros(1, *teacher.shape).to(parameter), t, teacher.sample_cond(1))
    return DiscriminatorHead(features.shape[1], features.shape[2]).to(parameter)
