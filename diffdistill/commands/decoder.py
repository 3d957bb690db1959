"""`diffdistill decoder`: a small autoencoder for a latent model, and the model with it in the place of its own.

A student of one or two steps spends much of its time in the decoder. SDXS (Song et al. 2024, arXiv:2403.16627) trains a
tiny one, with an absolute error and a GAN; this is that, for diffusers' AutoencoderTiny, with the decodings of the
model's own decoder as images. The encoder learns their latents, so that pipelines that read images work too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffdistill.config import DecoderConfig
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.losses import gan_discriminator_loss, gan_generator_loss
from diffdistill.core.prediction import OUTPUTS
from diffdistill.core.schedule import TrigFlow
from diffdistill.data.batches import batches
from diffdistill.data.encoded import Bucketed, Encoded, check_encoded, open_encoded
from diffdistill.environment import is_first_process
from diffdistill.errors import UserError, shown
from diffdistill.families import Family, family_of, load_pipeline, local_folder, part_config
from diffdistill.options import build
from diffdistill.pictures import image_grid, save_png
from diffdistill.pipelines.small_decoder import new_autoencoder, with_autoencoder
from diffdistill.players.discriminator import ImageDiscriminator
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for
from diffdistill.scaffold.method import Batch, Method, Need, Optimizer, Outcome, Turn
from diffdistill.training.folder import resumed_options, start_folder
from diffdistill.training.inputs import Allowed, check_inputs, inputs_of
from diffdistill.training.lock import only_trainer
from diffdistill.training.stopping import Interrupted
from diffdistill.training.trainer import Trainer, accelerator_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import DecoderOptions


class SmallAutoencoding(Method):
    """Absolute errors of the small decoder's images and of the small encoder's latents, and the GAN's loss.

    Players: the small autoencoder, and with a GAN the discriminator of its images, which takes the own decoder's for
    real.
    """

    needs = frozenset({Need.IMAGES})

    def __init__(self, small: Any, decode: Callable[[Tensor], Tensor], config: DecoderConfig):
        """`decode`: latents (B, C, h, w) -> images (B, 3, H, W) of the model's own autoencoder."""
        self.config, self.small, self.decode_by_own = config, small, decode
        self.players = {"autoencoder": small}
        self.state = {}
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}  # both decoders' images of a turn, by place
        if config.gan_weight:
            self.discriminator = ImageDiscriminator((3, 8, 8), latent=True)
            self.players["discriminator"] = self.discriminator

    def optimizer(self, player: str) -> Optimizer:
        """AdamW at one rate for both."""
        return Optimizer(self.config.lr, weight_decay=0.0)

    def turns(self, step: int) -> Sequence[Turn]:
        """The autoencoder's, and the discriminator's on the same images."""
        own = [Turn("autoencoder", self.loss)]
        return [*own, Turn("discriminator", self.judge)] if self.config.gan_weight else own

    def loss(self, batch: Batch) -> Outcome:
        """Of latents (B, C, h, w), which are the batch's images."""
        with torch.no_grad():
            images = self.decode_by_own(batch.images).clamp(-1, 1)
        decoded = self.small.decode(batch.images).sample
        terms = {
            "decoding": (decoded - images).abs().mean(),
            "encoding": (self.small.encode(images).latents - batch.images).abs().mean(),
        }
        loss = terms["decoding"] + terms["encoding"]
        if weight := self.config.gan_weight:
            self.drawn[batch.first] = images, decoded.detach()
            terms["gan"] = gan_generator_loss(self.discriminator(decoded))
            loss = loss + weight * terms["gan"]
        return Outcome(loss, terms)

    def judge(self, batch: Batch) -> Outcome:
        """The discriminator's move on the images of the autoencoder's."""
        images, decoded = self.drawn.pop(batch.first)
        gan = gan_discriminator_loss(self.discriminator(images), self.discriminator(decoded))
        return Outcome(gan, {"gan": gan})

    def sampler(self) -> Sampler:
        """Never called, since this training draws no samples; raises AssertionError."""
        raise AssertionError("an autoencoder makes no samples")


def train_decoder(
    *, resume: str | PathLike[str] | None = None, allow_change: Allowed = False, **options: Unpack[DecoderOptions]
) -> Path:
    """Train a small autoencoder; returns the folder of the model with it, `<out>/model`.

    Options are those of `diffdistill decoder`, with underscores; `resume` continues a run folder. Raises UserError for
    a model whose autoencoder is no AutoencoderKL of images, and for whatever cannot be used.
    """
    values = dict(options)
    if resume is not None:
        values = resumed_options(Path(resume), values, allow_change=allow_change)
    elif allow_change:
        raise UserError("allow_change: it is for a run that is resumed; give --resume RUN")
    config = build(DecoderConfig, values)
    with only_trainer(Path(config.out), "out" if resume is None else "resume"):
        return _train(config, resume is not None, allow_change)


def _train(config: DecoderConfig, resumed: bool, allow_change: Allowed) -> Path:
    out, accelerator = Path(config.out), accelerator_for(config, Path(config.out))
    folder, family, latents = _read(config)
    inputs = inputs_of(dataclasses.asdict(config), prompts=latents)
    note = check_inputs(out, inputs, allow_change) if resumed else None
    if note and accelerator.is_main_process:
        print(note, file=sys.stderr)
    vae = load_pipeline(folder, only=("vae",), device=accelerator.device).vae.requires_grad_(False)
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    small = new_autoencoder(part_config(folder / "vae"), config.width, config.blocks)
    assert family.autoencoder is not None
    decode = family.autoencoder.decode
    method = SmallAutoencoding(small, lambda z: decode(vae, z), config)
    stands_in = Teacher(Denoiser(torch.nn.Identity(), TrigFlow(), OUTPUTS["sample"]), tuple(latents.settings["shape"]))
    draw = batches(config, stands_in, latents, accelerator)

    @torch.no_grad()
    def grid(step: int) -> None:
        z = draw(0).images[:8]
        both = torch.cat([decode(vae, z), small.decode(z.to(next(small.parameters()))).sample]).clamp(-1, 1)
        save_png(image_grid(both.cpu(), len(z)), out / "samples" / f"step-{step:08d}.png")

    trainer = Trainer(method, draw, config, out, accelerator, grid)
    if resumed:
        trainer.resume(allow_change)
    size = sum(p.numel() * p.element_size() for p in small.parameters())
    start_folder(out, dataclasses.asdict(config), size, accelerator, inputs, resume=resumed)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.evaluating(), trainer.offload.on_host():
            counts = [sum(p.numel() for p in part.decoder.parameters()) for part in (small, vae)]
            with_autoencoder(folder, out / "model", small, counts)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out / "model"


def _read(config: DecoderConfig) -> tuple[Path, Family, Encoded]:
    """The model's folder, its family and the latents; UserError for those that it cannot be done with."""
    for name, said in (("teacher", config.teacher), ("prompts", config.prompts)):
        if not said:
            raise UserError(f"{name}: none is given; give the folder of a latent model and one of `encode --data`")
    folder = local_folder(config.teacher)
    family, _ = family_of(folder)
    own = None if family.autoencoder is None else part_config(folder / "vae").get("_class_name")
    if own != "AutoencoderKL":
        what = f"has the autoencoder {own}" if own else "has no autoencoder"
        raise UserError(f"teacher: {shown(config.teacher)} {what}, and a small one is for AutoencoderKL's latents")
    latents = open_encoded(config.prompts)
    if isinstance(latents, Bucketed) or not latents.has_images:
        what = "has buckets" if isinstance(latents, Bucketed) else "has no images"
        raise UserError(
            f"prompts: {shown(config.prompts)} {what}; give a folder made by `diffdistill encode --data` of one size"
        )
    check_encoded(latents, folder, family, latents.settings["shape"])
    return folder, family, latents


def run(values: dict[str, Any]) -> int:
    """The command; `values` are those of the command line and of a YAML file."""
    try:
        folder = train_decoder(**values)
    except Interrupted as stopped:
        if is_first_process():
            print(stopped.line("decoder"), file=sys.stderr)
        return stopped.code
    if is_first_process():
        print(f"saved {folder}")
    return 0
