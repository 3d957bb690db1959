"""A small teacher in the Stable Diffusion family, from images with captions: autoencoder, text encoder and UNet.

That of InstructPix2Pix learns from images, what each was made from, and what was to be changed.

The autoencoder is trained first, in the run folder's `vae`, and its `scaling_factor` measured so that latents have unit
variance. Then the UNet and the text encoder are trained together, as one player, on the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import TeacherConfig
from diffdistill.core.denoiser import Cond, Denoiser
from diffdistill.core.guidance import guided
from diffdistill.core.ode import ddim_step, sample_ode
from diffdistill.data.batches import batch_indices, batches
from diffdistill.data.examples import Example
from diffdistill.data.images import Data
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, TeacherRecord, schedule_of, with_null
from diffdistill.pipelines.export import pipeline_folder
from diffdistill.pipelines.schedulers import scheduler_config, teacher_scheduler
from diffdistill.pipelines.text_pipeline import LATENT_CHANNELS, new_text_pipeline
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import image_generators
from diffdistill.scaffold.method import Batch, Method, Need, Optimizer, Outcome, Turn
from diffdistill.training.inputs import Allowed
from diffdistill.training.stopping import Interrupted
from diffdistill.training.trainer import Accelerator, Trainer
from diffdistill.training.unread import Unread

FAMILIES_OF = {
    "stable-diffusion": "stable_diffusion",
    "instruct-pix2pix": "instruct_pix2pix",
    "wan": "wan",
    "wan-i2v": "wan_i2v",
}
KL_WEIGHT = 1e-6
VAE_LR = 4e-3
SHOWN_STEPS, SHOWN_GUIDANCE = 16, 2.0


class Autoencoding(Method):
    """A method with one player: squared and a little absolute error of D(E(x)), and less KL divergence of the latents.

    The other way round, mostly absolute error, the background is learned first and small shapes much later.
    """

    needs = frozenset({Need.IMAGES})

    def __init__(self, vae: Any):
        self.vae = vae
        self.players = {"vae": vae}
        self.state = {}

    def optimizer(self, player: str) -> Optimizer:
        """AdamW with the autoencoder's own learning rate, `VAE_LR`."""
        return Optimizer(VAE_LR)

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn a step: the autoencoder's loss."""
        return [Turn("vae", self.loss)]

    def loss(self, batch: Batch) -> Outcome:
        """Squared and absolute error of the reconstructed images plus the KL term, a scalar; both parts are logged."""
        posterior = self.vae.encode(batch.images).latent_dist
        shape = posterior.mean.shape[1:]
        noise = batch.draw("vae/global", lambda n, g: torch.randn(n, *shape, generator=g, device=g.device))
        z = posterior.mean + posterior.std * noise.to(posterior.mean)
        error = self.vae.decode(z).sample - batch.images
        reconstruction = 5 * error.square().mean() + 0.3 * error.abs().mean()
        kl = posterior.kl()  # of videos a sum for each column of pixels
        kl = kl.mean() / (posterior.mean[0].numel() / kl[0].numel())
        return Outcome(reconstruction + KL_WEIGHT * kl, {"reconstruction": reconstruction, "kl": kl})

    def sampler(self) -> Sampler:
        """Never called, since this training draws no samples; raises AssertionError."""
        raise AssertionError("an autoencoder makes no samples")


class TextAndUNet(nn.Module):
    """Both as one network of token numbers."""

    def __init__(self, unet: Any, text_encoder: Any):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, time: Tensor, input_ids: Tensor, image_latents: Tensor | None = None) -> Tensor:
        """The UNet's output (B, C, H, W) for samples of that shape, its times (B,) and token numbers (B, L).

        `image_latents` (B, C, H, W) are those of the images to be changed.
        """
        x = x if image_latents is None else torch.cat([x, image_latents], 1)
        embeds = self.text_encoder(input_ids).last_hidden_state
        return self.unet(x, time, encoder_hidden_states=embeds, return_dict=False)[0]


class TextTeacher:
    """The parts of such a training; once `prepare` has trained the autoencoder, these are examples of latents."""

    parameterization = "vp"

    def __init__(
        self,
        config: TeacherConfig,
        data: Data,
        widths: tuple[int, ...],
        attention: tuple[int, ...],
        vae_widths: tuple[int, ...],
    ):
        self.config, self.data, self.family = config, data, FAMILIES_OF[config.architecture]
        kind = config.architecture
        if config.parameterization != self.parameterization:
            given, right = config.parameterization, self.parameterization
            raise UserError(f"parameterization: {given} is not for {kind}; give {right}")
        if not vae_widths or any(w < 8 or w % 8 for w in vae_widths):
            raise UserError(f"vae_widths: {config.vae_widths!r} must be multiples of 8, separated by commas")
        if config.text_width % 16:
            raise UserError(f"text_width: {config.text_width} is not a multiple of 16")
        self._check_sizes(widths, vae_widths)
        captions = data.get(torch.arange(len(data))).captions
        if captions is None:
            raise UserError(f"data: {data.name!r} has no captions, which {kind} is trained on; use unet2d")
        words = {word for text in captions for word in text.lower().split() if word.isascii() and word.isalnum()}
        self.pipeline = self._new_pipeline(sorted(words), widths, attention, vae_widths)
        tokens = self._tokens([*captions, ""])
        self.ids, self.null = tokens[:-1], tokens[-1:]
        settings = scheduler_config(self.pipeline.scheduler)
        denoiser = Denoiser(self._network(), *schedule_of(settings)).train()
        with_null(denoiser, {"input_ids": self.null})
        self.teacher = Teacher(denoiser, self._latent_shape(), None, self.family, "", settings)
        self.latents = self.conditions = torch.empty(0)

    @property
    def reads_image(self) -> bool:
        """Whether it learns to change images."""
        return FAMILIES[self.family].reads_image

    def _check_sizes(self, widths: tuple[int, ...], vae_widths: tuple[int, ...]) -> None:
        """UserError for images, or a network, of a size that does not go."""
        shape, least = self.data.shape, max(8, 2 ** (len(widths) + len(vae_widths) - 2))
        if shape[0] != 3 or shape[1] != shape[2] or shape[1] % least:
            right = f"3 channels and squares of a multiple of {least} pixels"
            raise UserError(f"resolution: the images are {tuple(shape)}; {self.config.architecture} needs {right}")

    def _new_pipeline(
        self, words: Sequence[str], widths: tuple[int, ...], attention: tuple[int, ...], vae_widths: tuple[int, ...]
    ) -> Any:
        c = self.config
        return new_text_pipeline(
            words,
            teacher_scheduler(c.parameterization),
            pixels=self.data.shape[1],
            widths=widths,
            layers=c.layers,
            attention=attention,
            dropout=c.dropout,
            vae_widths=vae_widths,
            text_width=c.text_width,
            seed=c.seed,
            edits=self.reads_image,
        )

    def _network(self) -> nn.Module:
        return TextAndUNet(self.pipeline.unet, self.pipeline.text_encoder)

    def _latent_shape(self) -> tuple[int, ...]:
        side = self.pipeline.unet.config.sample_size
        return LATENT_CHANNELS, side, side

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        return tokenizer(list(texts), return_tensors="pt", **settings).input_ids

    def _measured(self, latents: Tensor) -> Tensor:
        """The latents with unit variance; the autoencoder's config keeps what that takes."""
        factor = round(1 / float(latents.std()), 6)
        self.pipeline.vae.register_to_config(scaling_factor=factor)
        return latents.mul_(factor)

    def _image_latents(self, images: Tensor) -> Tensor:
        """What the network reads of condition images (B, 3, H, W), which this pipeline does not scale."""
        return self.pipeline.vae.encode(images).latent_dist.mode()

    def prepare(self, out: Path, accelerator: Accelerator, allow_change: Allowed, began: float) -> None:
        """Train the autoencoder, or what is left of it, and encode all images.

        `allow_change` is `resume`'s, and `began` from where `max_hours` count.
        """
        c, vae, data = self.config, self.pipeline.vae, self.data
        fit = dataclasses.replace(
            c, steps=c.vae_steps, batch_size=c.vae_batch_size, ema=0.99, sample_every=0, offload="none"
        )
        draw = batches(fit, dataclasses.replace(self.teacher, shape=data.shape), data, accelerator)
        out.mkdir(exist_ok=True)
        trainer = Trainer(Autoencoding(vae.train()), draw, fit, out, accelerator)
        trainer.began = began
        trainer.resume(allow_change)
        try:
            if trainer.step < fit.steps:
                trainer.fit()
        except Interrupted as stopped:
            raise stopped.of(out.parent) from None  # the run to resume
        except Unread as error:
            raise error.of(out.parent) from None
        if trainer.average:
            vae.load_state_dict(vae.state_dict() | trainer.average.state())
        vae.requires_grad_(False).eval()
        with torch.no_grad():
            parts = torch.arange(len(data)).split(128)
            latents = [vae.encode(data.get(part).images.to(accelerator.device)).latent_dist.mode() for part in parts]
            self.latents = self._measured(torch.cat(latents))
            if self.reads_image:
                images = (data.get(part).conditions for part in parts)
                self.conditions = torch.cat(
                    [self._image_latents(i.to(accelerator.device)) for i in images if i is not None]
                )

    def __len__(self) -> int:
        return len(self.data)

    def get(self, indices: Tensor) -> Example:
        """Latents (B, ...) and token numbers (B, L) of the images at int64 indices (B,)."""
        return Example(self.latents[indices.to(self.latents.device)], self._cond(indices))

    def _cond(self, indices: Tensor) -> Cond:
        at = indices.to(self.latents.device)
        return {"input_ids": self.ids[indices]} | ({"image_latents": self.conditions[at]} if self.reads_image else {})

    def batches(self, accelerator: Accelerator) -> Callable[[int], Batch]:
        """step -> Batch of latents and token numbers; a share of the captions is dropped for guidance."""
        c, rank, world = self.config, accelerator.process_index, accelerator.num_processes
        # Refused now, not when the autoencoder is trained.
        batch_indices(len(self), c.vae_batch_size, 0, seed=c.seed, rank=rank, world_size=world)
        return batches(c, self.teacher, self, accelerator, c.label_dropout)

    def grid_writer(self, out: Path) -> Callable[[int], None]:
        """step -> writes <out>/samples/step-<step>.png of the first captions, guided."""
        from diffdistill.pictures import image_grid, save_png, stills

        denoiser, vae = self.teacher.denoiser, self.pipeline.vae

        @torch.no_grad()
        def write(step: int) -> None:
            noise = [torch.randn(self.teacher.shape, generator=g) for g in image_generators(0, range(24))]
            z = torch.stack(noise).to(self.latents)
            cond = {name: value.to(z.device) for name, value in self._cond(torch.arange(24) % len(self.ids)).items()}
            x0 = sample_ode(ddim_step, guided(denoiser, SHOWN_GUIDANCE), denoiser.schedule, z, SHOWN_STEPS, cond)
            autoencoder = FAMILIES[self.family].autoencoder
            assert autoencoder is not None
            images, columns = stills(autoencoder.decode(vae, x0).clamp(-1, 1).cpu(), 8)
            save_png(
                image_grid(images, columns, scale=max(1, 64 // images.shape[-1])),
                out / "samples" / f"step-{step:08d}.png",
            )

        return write

    def save(self, folder: Path, record: TeacherRecord, card: str) -> Path:
        """The whole pipeline as a diffusers folder, or nothing."""
        with pipeline_folder(folder, record, card) as partial:
            self.pipeline.text_encoder.eval()
            self.pipeline.save_pretrained(partial, safe_serialization=True)
        return folder
