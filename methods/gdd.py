"""GDD: Diffusion Models Are Innate One-Step Generators.

Zheng, Yang 2024, arXiv:2405.20750 (code: Zyriix/GDD).

A student that imitates its teacher image by image is held back by what the two cannot share. So a GAN alone trains a
one-step generator that begins as the diffusion model: the discriminator is small heads on several layers of a frozen
network, and no sample is compared with the teacher's. GDD-I freezes most of the generator too: the layers of a
diffusion model are active at other times than its first, and what has to change for one step is little. With d the
heads' logits and gamma = `r1_weight`,

    student: mean softplus(-d(G(z))),    discriminator: mean softplus(-d(x)) + softplus(d(G(z))) + gamma/2 |d'(x)|^2.

Deviations:
- The authors' frozen features are of classifiers of natural images (DeiT, EfficientNet, VGG) and read images as they
  are. Here they are the frozen teacher's, as LADD's, which reads noised images: every teacher has them, of pixels or
  latents, and no measure of quality has features in common with the discriminator. `gan_time_mean` says the noise.
- The gradient of the penalty is a difference, E_n (d(x + h n) - d(x))^2/h^2 = |d'(x)|^2 as h goes to 0 (as in
  NVlabs/FastGen), so that no attention needs a second derivative. Means over heads are sums with the authors.
- `freeze` is GDD-I's first list: convolutions in a UNet's blocks without those of shortcuts, and attention's output.
- Theirs begins at sigma = 80, ours at `student_level`. No augmentation of what the discriminator sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from diffdistill.catalogue import About
from diffdistill.core.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.options import LatentAdversarialOptions, StudentLevel, StudentOptions, option
from diffdistill.players.sampler import Sampler, one_step_sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.adversary import LatentAdversarialMethod
from diffdistill.scaffold.method import Batch, Outcome, Turn

ABOUT = About(
    paper="Zheng & Yang 2024, arXiv:2405.20750",
    data="real images",
    kind="distribution",
    needs=("images",),
    equations={
        "discriminator on layers of a frozen network": "scaffold.adversary.LatentAdversary.logits",
        "losses": (
            "GDD.student_turn, GDD.discriminator_turn, core.losses.gan_generator_loss, "
            "core.losses.gan_discriminator_loss"
        ),
        "gradient penalty R1": "GDD.penalty",
        "frozen layers (GDD-I)": "GDD.freeze",
    },
)


@dataclass(frozen=True)
class Config(
    StudentOptions, StudentLevel, LatentAdversarialOptions, beta1=0.0, gan_loss="logistic", gan_time_mean=-1.0
):
    """GDD's options."""

    freeze: Literal["auto", "none", "convolutions"] = option(
        "auto",
        "the student's layers that stay as they are; convolutions: those of a UNet's blocks, and attention's output; "
        "auto: these where the network has them and is no LoRA",
    )
    r1_weight: float = option(1e-4, "gamma of the penalty on the discriminator's gradient at real images", at_least=0)
    r1_every: int = option(16, "every so many steps that penalty is computed, and counts so many times", at_least=1)


class GDD(LatentAdversarialMethod):
    """The student moves first, and both in every step."""

    difference = 0.01  # the step h of the penalty's gradient

    def __init__(self, teacher: Teacher, config: Config, **players: Denoiser):
        super().__init__(teacher, config, **players)
        self.freeze(config.freeze, "student" in teacher.lora)

    def freeze(self, kind: str, lora: bool) -> None:
        """Take the layers of that kind out of what is trained."""
        layers = [] if lora or kind == "none" else frozen_layers(self.student.network)
        if kind == "convolutions" and not layers:
            what = (
                "a LoRA student trains no layer of its base" if lora else "this network has no convolutions in blocks"
            )
            raise UserError(f"freeze: {what}; use auto or none")
        for layer in layers:
            layer.requires_grad_(False)

    def sampler(self) -> Sampler:
        """One step from `student_level`."""
        return one_step_sampler(self.student, self.config.student_level)

    def turns(self, step: int) -> Sequence[Turn]:
        """Both in every step."""
        return [Turn("student", self.student_turn), Turn("discriminator", partial(self.discriminator_turn, step))]

    def student_turn(self, batch: Batch) -> Outcome:
        """The student's samples are to be taken for real."""
        return self.judged(self.sampler().one_step(batch.randn("z"), batch.cond), batch)

    def discriminator_turn(self, step: int, batch: Batch) -> Outcome:
        """The heads are to tell images from these samples, and every `r1_every` steps to be flat at images."""
        outcome, c = self.adversary.turn(batch), self.config
        if c.r1_weight == 0 or step % c.r1_every:
            return outcome
        penalty = self.penalty(batch)
        return Outcome(outcome.loss + c.r1_every * c.r1_weight / 2 * penalty, {**outcome.shown, "r1": penalty})

    def penalty(self, batch: Batch) -> Tensor:
        """E |grad d(x)|^2 of the mean logit d at the batch's images, by differences along standard normal noise."""
        x, h, noise = batch.images, self.difference, self.adversary.noise("discriminator/gan", batch)
        near = x + h * batch.randn("discriminator/r1")
        one, other = (self.adversary.logits(each, *noise, batch.cond).mean(0) for each in (near, x))
        return ((one - other) / h).square().mean()


def frozen_layers(network: nn.Module) -> list[nn.Module]:
    """GDD-I's: convolutions in the blocks of a UNet but those of shortcuts, and the output projections of attention."""
    layers = []
    for name, module in network.named_modules():
        inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and "shortcut" not in name
        if inside and (convolution or name.endswith("to_out.0")):
            layers.append(module)
    return layers


METHOD = GDD
