"""Discriminators on a denoiser's features, and the GAN losses of noised images.

On the fake score: Yin et al. 2024, arXiv:2405.14867, section 4.3. On layers of the frozen teacher: Sauer et al. 2024,
arXiv:2403.12015, section 3.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.losses import gan_discriminator_loss, gan_generator_loss, hinge_discriminator_loss
from diffdistill.core.prediction import diffuse, expand
from diffdistill.core.times import edm_log_normal, native_uniform
from diffdistill.errors import UserError
from diffdistill.options import HeadOptions, LatentAdversarialOptions
from diffdistill.players.discriminator import DiscriminatorHead, ImageDiscriminator
from diffdistill.players.teacher import Teacher, frozen
from diffdistill.scaffold.method import Batch, Method, Need, Outcome


class Adversary:
    """Images are noised to times that are uniform in the teacher's own; real ones have the classes of the batch.

    With `depths` there is a head on each of the layers there, and the loss is the mean over them, as LADD's.
    """

    def __init__(self, fake_score: Denoiser, teacher: Teacher, depths: Sequence[float] | None = None):
        self.fake_score = fake_score
        self.layers = None if depths is None else (teacher.start or teacher.denoiser).layers_at(depths)
        self.head: Any = _head(fake_score, teacher, self.layers)

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(B,) the discriminator's logits of x (B, ...) noised to the angles t (B,) with eps (B, ...).

        (heads, B) of several layers.
        """
        if self.layers is None:
            return self.head(self.fake_score.features(diffuse(x, t, eps), t, cond))
        x_t = diffuse(x, t, eps)
        return _of_each(self.head, self.fake_score.features_of(self.layers, x_t, t, cond))

    def _times(self, player: str, batch: Batch) -> Tensor:
        return batch.draw(f"{player}/gan t", lambda n, draw: native_uniform(self.fake_score.schedule, n, draw))

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


class FrozenHeads:
    """Heads on several layers of the frozen teacher, through which the student's gradient flows."""

    def __init__(self, teacher: Teacher, options: HeadOptions):
        self.teacher = frozen(teacher.start or teacher.denoiser)
        self.layers = self.teacher.layers_at(options.depths)
        if not self.layers:
            raise UserError("depths: this teacher's network has no layer for a discriminator")
        self.heads = nn.ModuleList(_heads(self.teacher, teacher, self.layers))  # of which none is in half precision

    def read(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(heads, B) logits of noised images x_t (B, ...) at the angles t (B,)."""
        return _of_each(self.heads, self.teacher.features_of(self.layers, x_t, t, cond))


class LatentAdversary(FrozenHeads):
    """Real and generated images share their times and their noise. The loss is the mean over the heads."""

    def __init__(self, teacher: Teacher, options: LatentAdversarialOptions):
        super().__init__(teacher, options)
        self.options = options
        self.samples: dict[int, Tensor] = {}  # of the student's turn, by their place in the step

    def logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(heads, B) logits of x (B, ...) noised to the angles t (B,) with eps (B, ...)."""
        return self.read(diffuse(x, t, eps), t, cond)

    def noise(self, stream: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """t (B,) and eps (B, ...) that images are noised with."""
        normal = self.options.gan_time_mean, self.options.gan_time_std
        t = batch.draw(f"{stream} t", lambda n, draw: edm_log_normal(self.teacher.schedule, n, draw, *normal))
        return t, batch.randn(f"{stream} eps")

    def student_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The student's samples x (B, ...) are to be taken for real; `turn` reads them too."""
        self.samples[batch.first] = x.detach()
        logits = self.logits(x, *self.noise("student/gan", batch), batch.cond)
        return -logits.mean() if self.options.gan_loss == "hinge" else gan_generator_loss(logits)

    def critic_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The heads are to tell the batch's images from the samples x (B, ...), and from those of other conditions."""
        noise = self.noise("discriminator/gan", batch)
        real, fake = self.logits(batch.images, *noise, batch.cond), self.logits(x, *noise, batch.cond)
        if self.options.misaligned and batch.size > 1:
            others = batch.images.roll(1, 0)
            other = self.logits(others, *self.noise("discriminator/misaligned", batch), batch.cond)
            fake = torch.cat([fake, other], 1)
        hinge = self.options.gan_loss == "hinge"
        return hinge_discriminator_loss(real, fake) if hinge else gan_discriminator_loss(real, fake)

    def turn(self, batch: Batch, x: Tensor | None = None) -> Outcome:
        """The heads' move, on samples x (B, ...) that have no gradient, or those of the student's turn.

        These are not kept any longer.
        """
        own = self.samples.pop(batch.first, None)
        x = own if x is None else x
        assert x is not None, "the student's turn comes first"
        gan = self.critic_loss(x, batch)
        return Outcome(gan, {"gan": gan})


class EdgeAdversary(FrozenHeads):
    """Tells two samples at one angle e apart: what a student jumps to, and its target, which counts as real.

    Both are noised further, to a level up to `top`, by noise of their own (Wang et al. 2024, arXiv:2405.18407).
    The loss is the hinge, the mean over the heads; the student's is a hinge too.
    """

    def __init__(self, teacher: Teacher, options: HeadOptions):
        super().__init__(teacher, options)
        self.ends: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, Cond]] = {}  # of the student's turn, by place

    def level(self, stream: str, e: Tensor, top: Tensor, batch: Batch) -> Tensor:
        """(B,) the angles that they are noised to, uniform in the schedule's own time between e and top (B,)."""
        schedule, u = self.teacher.schedule, batch.uniform(f"{stream} t")
        return schedule.at_fraction(torch.lerp(schedule.fraction(e), schedule.fraction(top), u))

    def logits(self, x: Tensor, e: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """(heads, B) logits of x (B, ...), which lies at the angles e (B,), noised to t (B,) with eps (B, ...)."""
        kept = torch.cos(t) / torch.cos(e)
        fresh = torch.sqrt((1 - kept**2).clamp_min(0))
        return self.read(expand(kept, x) * x + expand(fresh, x) * eps, t, cond)

    def student_loss(self, fake: Tensor, real: Tensor, e: Tensor, top: Tensor, batch: Batch) -> Tensor:
        """The jumps' ends, fake, are to be taken for their targets, real, both (B, ...); `turn` reads them too."""
        self.ends[batch.first] = (fake.detach(), real, e, top, batch.cond)
        stream = "student/gan"
        t = self.level(stream, e, top, batch)
        logits = self.logits(fake, e, t, batch.randn(stream + " eps"), batch.cond)
        return torch.relu(1 - logits).mean()

    def turn(self, batch: Batch) -> Outcome:
        """The heads' move, on what the student's turn left, which is not kept any longer."""
        fake, real, e, top, cond = self.ends.pop(batch.first)
        t, stream = self.level("discriminator/gan", e, top, batch), "discriminator/gan eps"
        of_real = self.logits(real, e, t, batch.randn(f"{stream} real"), cond)
        of_fake = self.logits(fake, e, t, batch.randn(f"{stream} fake"), cond)
        gan = hinge_discriminator_loss(of_real, of_fake)
        return Outcome(gan, {"gan": gan})


class PixelAdversary:
    """Tells real from generated images as they are, not noised, and without their conditions."""

    def __init__(self, teacher: Teacher, as_images: Callable[[Tensor], Tensor]):
        """`as_images`: samples (B, ...) of unit variance -> what is looked at, with a gradient."""
        self.as_images = as_images
        weight = next(itertools.chain(teacher.denoiser.parameters(), teacher.denoiser.buffers()))
        self.discriminator = ImageDiscriminator(teacher.shape, teacher.latent).to(weight.device)
        self.samples: dict[int, Tensor] = {}  # of the student's turn, by their place in the step

    def logits(self, x: Tensor) -> Tensor:
        """(B,) of samples x (B, ...) of unit variance."""
        return self.discriminator(self.as_images(x).to(next(self.discriminator.parameters()).dtype))

    def student_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The student's samples x (B, ...) are to be taken for real; `turn` reads them too."""
        self.samples[batch.first] = x.detach()
        return gan_generator_loss(self.logits(x))

    def turn(self, batch: Batch, draw: Callable[[], Tensor]) -> Outcome:
        """The discriminator's move, on the samples (B, ...) of the student's turn, or where it had none on new ones."""
        x = self.samples.pop(batch.first, None)
        if x is None:
            with torch.no_grad():
                x = draw()
        gan = gan_discriminator_loss(self.logits(batch.images), self.logits(x))
        return Outcome(gan, {"gan": gan})


class LatentAdversarialMethod(Method):
    """The game of the methods whose student a GAN alone trains. Players: student, and discriminator, the heads.

    A method says `turns` and `sampler`.
    """

    needs = frozenset({Need.IMAGES})

    def __init__(self, teacher: Teacher, config: LatentAdversarialOptions, *, student: Denoiser | None = None):
        super().__init__(teacher, config)
        self.student = student or teacher.player("student")
        self.adversary = LatentAdversary(teacher, config)
        self.players = {"student": self.student, "discriminator": self.adversary.heads}

    def judged(self, x: Tensor, batch: Batch) -> Outcome:
        """The student's move: its samples x (B, ...) are to be taken for real."""
        loss = self.adversary.student_loss(x, batch)
        return Outcome(loss, {"gan": loss})


def _of_each(heads: Iterable[nn.Module], features: Sequence[Tensor]) -> Tensor:
    """(heads, B) the logits of each head, of its layer's features (B, C, H, W)."""
    return torch.stack([head(each) for head, each in zip(heads, features, strict=True)])


def _head(fake_score: Denoiser, teacher: Teacher, layers: Sequence[str] | None) -> nn.Module:
    """The head on the bottleneck, or the list of those on the layers."""
    if fake_score.feature_layer is None:
        raise UserError("gan_weight: this teacher's network has no bottleneck for a discriminator; use 0")
    heads = _heads(fake_score, teacher, [fake_score.feature_layer] if layers is None else layers)
    return (heads[0] if layers is None else nn.ModuleList(heads)).to(next(fake_score.parameters()))


@torch.no_grad()
def _heads(denoiser: Denoiser, teacher: Teacher, layers: Sequence[str]) -> list[nn.Module]:
    """One for each layer, of the size of its features."""
    weight = next(itertools.chain(denoiser.parameters(), denoiser.buffers()))
    t = torch.ones(1, dtype=torch.float64, device=weight.device)
    x = torch.zeros(1, *teacher.shape).to(weight)
    if weight.is_meta:  # for a plan, in which the tables that some networks make in a call are to have values
        denoiser = copy.deepcopy(denoiser)
    maps = denoiser.features_of(layers, x, t, teacher.sample_cond(1))
    return [DiscriminatorHead(each.shape[1], min(each.shape[2:])).to(each) for each in maps]
