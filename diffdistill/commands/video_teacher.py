"""A small teacher in the family of Wan, from videos with captions; one of image to video also reads their first frames.

It is trained as `text_teacher` trains one of images: autoencoder first, then the transformer with its text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.commands.text_teacher import TextTeacher
from diffdistill.config import TeacherConfig
from diffdistill.data.images import Data
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError
from diffdistill.families.wan import TOKENS
from diffdistill.families.wan_i2v import beside, first_and_grey
from diffdistill.pipelines.schedulers import teacher_scheduler
from diffdistill.pipelines.video_pipeline import HEAD, LATENT_CHANNELS, RATIO, new_video_pipeline

VIDEOS = ("wan", "wan-i2v")  # architectures
VIDEO_SIDE = 32  # pixels, where --resolution does not say


def open_training_videos(config: TeacherConfig) -> Data:
    """The videos, with their first frames as condition images where the architecture reads them."""
    side = config.resolution or VIDEO_SIDE
    conditioned = config.architecture == "wan-i2v"
    if config.channels == 1:
        raise UserError("channels: 1 is for images; videos are of 3")
    return open_videos(config.data, frames=config.frames, size=(side, side), conditioned=conditioned)


class TextAndTransformer(nn.Module):
    """Text encoder and transformer as one network of token numbers, which are 0 where there is no word."""

    def __init__(self, transformer: Any, text_encoder: Any):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, time: Tensor, input_ids: Tensor, image_latents: Tensor | None = None) -> Tensor:
        """The velocity (B, C, F, H, W) of samples of that shape at times (B,), from token numbers (B, L)."""
        words = (input_ids != 0).long()
        embeds = self.text_encoder(input_ids, words).last_hidden_state * words.unsqueeze(-1)
        cond = {"encoder_hidden_states": F.pad(embeds, (0, 0, 0, TOKENS - embeds.shape[1]))}
        if image_latents is not None:
            return beside(
                RATIO, ("encoder_hidden_states",), self.transformer, x, time, cond | {"image_latents": image_latents}
            )
        return self.transformer(x, timestep=time, return_dict=False, **cond)[0]


class VideoTeacher(TextTeacher):
    """The parts of such a training, as those of images."""

    parameterization = "flow"

    def _check_sizes(self, widths: tuple[int, ...], vae_widths: tuple[int, ...]) -> None:
        c, (_, frames, side, _) = self.config, self.data.shape
        for name in ("attention", "dropout"):
            if (given := getattr(c, name)) != getattr(TeacherConfig, name):
                raise UserError(f"{name}: {given!r} is of a UNet, and {c.architecture} has none; leave it out")
        if len(widths) != 1 or widths[0] % HEAD:
            raise UserError(f"widths: {c.widths!r} are of a UNet; {c.architecture} has one, a multiple of {HEAD}")
        if len(vae_widths) != 3 or any(w % vae_widths[0] for w in vae_widths):
            right = "three multiples of the first, such as 8,16,16"
            raise UserError(f"vae_widths: {c.vae_widths!r} do not go with videos; give {right}")
        if side % 16:
            raise UserError(f"resolution: {side} is not a multiple of 16, which {c.architecture} needs")
        if frames % RATIO != 1:
            raise UserError(f"frames: {frames} is not one more than a multiple of {RATIO}, such as 9")

    def _new_pipeline(
        self, words: Sequence[str], widths: tuple[int, ...], attention: tuple[int, ...], vae_widths: tuple[int, ...]
    ) -> Any:
        c = self.config
        return new_video_pipeline(
            words, teacher_scheduler(c.parameterization), width=widths[0], layers=c.layers, vae_widths=vae_widths,
            text_width=c.text_width, seed=c.seed, from_image=self.reads_image,
        )  # fmt: skip

    def _network(self) -> nn.Module:
        return TextAndTransformer(self.pipeline.transformer, self.pipeline.text_encoder)

    def _latent_shape(self) -> tuple[int, ...]:
        _, frames, side, _ = self.data.shape
        return LATENT_CHANNELS, (frames - 1) // RATIO + 1, side // RATIO, side // RATIO

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        settings = {"padding": "longest", "max_length": TOKENS, "truncation": True}
        return self.pipeline.tokenizer(list(texts), return_tensors="pt", **settings).input_ids

    def _measured(self, latents: Tensor) -> Tensor:
        moments = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        mean, std = ([round(float(v), 6) for v in each] for each in moments)
        self.pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
        view = (1, -1, 1, 1, 1)
        return latents.sub_(latents.new_tensor(mean).view(view)).div_(latents.new_tensor(std).view(view))

    def _image_latents(self, images: Tensor) -> Tensor:
        return first_and_grey(self.pipeline.vae, images, self.data.shape[1] - 1)
