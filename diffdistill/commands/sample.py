"""`diffdistill sample`: images of a teacher or a student as one picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffdistill.config import SampleConfig
from diffdistill.environment import use_machine
from diffdistill.eval.models import ModelLike
from diffdistill.eval.sample import SampleRequest, Samples, draw_samples
from diffdistill.eval.videos import is_video
from diffdistill.options import build

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import SampleOptions


def sample(model: ModelLike, *, out: str | os.PathLike[str] | None = None, **options: Unpack[SampleOptions]) -> Samples:
    """Draw images (N, C, H, W) in [-1, 1] of a teacher or a student, and save them as one picture where `out` is given.

    Videos (N, F, C, H, W) are the result's `videos`, its images are their first frames, and `out` may be an .mp4 or
    .gif.

    `model` is a run, a model's folder or hub id, or a loaded teacher or student of pixels. The options are those of
    `diffdistill sample`, with underscores. Raises UserError for what the model does not take.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else "loaded"
    given = {} if out is None else {"out": os.fspath(out)}
    config = build(SampleConfig, {**options, "model": name, **given})
    samples = _draw(config, model, as_video=out is not None and is_video(config.out))
    if out is not None:
        samples.save(config.out, config.fps)
    return samples


def _draw(config: SampleConfig, model: ModelLike, as_video: bool) -> Samples:
    request = SampleRequest(
        prompts=config.prompt,
        images=config.image,
        images_per_prompt=config.images_per_prompt,
        count=config.count,
        classes=config.classes,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_scale_2=config.guidance_scale_2,
        negative_prompt=config.negative_prompt,
        resolution=config.resolution,
        frames=config.frames,
        seed=config.seed,
        attention=config.attention,
        trace=config.trace,
        as_video=as_video,
        device=use_machine(config.device, config.threads),
    )
    return draw_samples(model, request)


def run(config: SampleConfig) -> None:
    """The command: prints where the picture is."""
    print(_draw(config, config.model, is_video(config.out)).save(config.out, config.fps))
