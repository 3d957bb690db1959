"""Training a teacher from data: denoising score matching with one player, saved as a diffusers folder."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffdistill.commands.text_teacher import TextTeacher
from diffdistill.commands.video_teacher import VIDEOS, VideoTeacher, open_training_videos
from diffdistill.config import TeacherConfig
from diffdistill.core.losses import denoising_loss
from diffdistill.core.prediction import diffuse
from diffdistill.core.schedule import EDM, LinearFlow
from diffdistill.core.times import log_normal, logit_normal, native_uniform
from diffdistill.data.batches import batches
from diffdistill.data.images import Data, open_data, open_pairs
from diffdistill.data.unreadable import skipping
from diffdistill.environment import environment, is_first_process
from diffdistill.errors import UserError
from diffdistill.families import TeacherRecord, new_unet2d
from diffdistill.options import build
from diffdistill.pipelines.export import save_pipeline
from diffdistill.pipelines.origin import public_options
from diffdistill.pipelines.schedulers import scheduler_config, teacher_scheduler
from diffdistill.players.sampler import DDIM, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for
from diffdistill.scaffold.method import Batch, Method, Need, Optimizer, Outcome, Turn
from diffdistill.training.folder import resumed_options, start_folder
from diffdistill.training.grids import grid_writer
from diffdistill.training.inputs import Allowed, check_inputs, inputs_of
from diffdistill.training.lock import only_trainer
from diffdistill.training.stopping import Interrupted
from diffdistill.training.trainer import Trainer, accelerator_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import TeacherOptions


class Denoising(Method):
    """A method with one player: E |v_theta(x_t, t) - v|^2 over the parameterisation's own times."""

    needs = frozenset({Need.IMAGES})

    def __init__(self, teacher: Teacher, config: TeacherConfig):
        super().__init__(teacher, config)
        self.denoiser = teacher.denoiser
        self.players = {"teacher": teacher.denoiser}

    def optimizer(self, player: str) -> Optimizer:
        """AdamW with the configured learning rate and weight decay."""
        return Optimizer(self.config.lr, weight_decay=self.config.weight_decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn a step: the teacher's denoising loss."""
        return [Turn("teacher", self.loss)]

    def loss(self, batch: Batch) -> Outcome:
        """The denoising loss of a batch, a scalar, at one random angle an image."""
        t = self._times(batch)
        eps = batch.randn("eps")
        x_t = diffuse(batch.images, t, eps)
        return Outcome(denoising_loss(self.denoiser(x_t, t, batch.cond), batch.images, eps))

    def _times(self, batch: Batch) -> Tensor:
        schedule = self.denoiser.schedule
        if isinstance(schedule, EDM):
            return batch.draw("t", lambda n, draw: log_normal(schedule, n, draw, -1.2, 1.2))
        if isinstance(schedule, LinearFlow):
            return batch.draw("t", lambda n, draw: logit_normal(schedule, n, draw, 0.0, 1.0))
        return batch.draw("t", lambda n, draw: native_uniform(schedule, n, draw))

    def sampler(self) -> Sampler:
        """The teacher with 16 DDIM steps, for the sample grids."""
        return Sampler(self.denoiser, self.denoiser.schedule.levels(16).tolist(), DDIM())


def new_teacher(config: TeacherConfig, data: Data) -> Teacher:
    """An untrained UNet2DModel for the data; its weights are a function of the seed."""
    if data.shape[1] != data.shape[2]:
        raise UserError(f"resolution: samples of shape {tuple(data.shape)} are not square; give --resolution")
    widths, attention = _levels(config, data.shape[1])
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    teacher = new_unet2d(
        data.shape,
        data.num_classes,
        scheduler_config(teacher_scheduler(config.parameterization)),
        widths=widths,
        layers=config.layers,
        attention=attention,
        dropout=config.dropout,
    )
    teacher.denoiser.train()
    return teacher


def train_teacher(
    *, resume: str | PathLike[str] | None = None, allow_change: Allowed = False, **options: Unpack[TeacherOptions]
) -> Path:
    """Train and save a teacher; returns its diffusers folder, `<out>/teacher`.

    Options are those of `diffdistill teacher`, with underscores; `resume` continues a run folder,
    with `allow_change` also where its config.yaml or data are not those that it began with. Raises UserError for
    whatever cannot be used.
    """
    values = dict(options)
    if resume is not None:
        values = resumed_options(Path(resume), values, allow_change=allow_change)
    elif allow_change:
        raise UserError("allow_change: it is for a run that is resumed; give --resume RUN")
    config = build(TeacherConfig, values)
    with only_trainer(Path(config.out), "out" if resume is None else "resume"):
        return _train(config, resume is not None, allow_change)


def _train(config: TeacherConfig, resumed: bool, allow_change: Allowed) -> Path:
    out = Path(config.out)
    accelerator = accelerator_for(config, out)
    data = skipping(_opened(config), config.skip_unreadable)
    inputs = inputs_of(dataclasses.asdict(config), data=data)
    note = check_inputs(out, inputs, allow_change) if resumed else None
    if note and accelerator.is_main_process:
        print(note, file=sys.stderr)
    text = _text_teacher(config, data) if config.architecture != "unet2d" else None
    teacher = text.teacher if text else new_teacher(config, data)
    method = Denoising(teacher, config)
    grids: Callable[[int], None] | None
    if text:
        draw, grids = text.batches(accelerator), text.grid_writer(out)
    else:
        draw = batches(config, teacher, data, accelerator, config.label_dropout)
        grids = grid_writer(out, method.sampler, teacher)
    trainer = Trainer(method, draw, config, out, accelerator, grids)
    if resumed:
        trainer.resume(allow_change)
    parameter_bytes = sum(p.numel() * p.element_size() for p in teacher.denoiser.parameters())
    start_folder(out, dataclasses.asdict(config), parameter_bytes, accelerator, inputs, resume=resumed)
    if text:
        text.prepare(out / "vae", accelerator, allow_change, trainer.began)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.evaluating(), trainer.offload.on_host():
            scheduler = teacher_scheduler(config.parameterization)
            recipe = public_options({**dataclasses.asdict(config), "data_fingerprint": data.fingerprint})
            size = {"resolution": data.shape[-1], "frames": data.shape[1]} if config.architecture in VIDEOS else {}
            record = TeacherRecord(None if text else data.num_classes, recipe, environment(), **size)
            card = _card(config, data)
            if text:
                text.save(out / "teacher", record, card)
            else:
                save_pipeline(out / "teacher", "unet2d", teacher.denoiser.network, scheduler, record, card)
    accelerator.wait_for_everyone()  # the teacher is there, in all processes
    accelerator.end_training()
    return out / "teacher"


def _opened(config: TeacherConfig) -> Data:
    if config.architecture in VIDEOS:
        return open_training_videos(config)
    if config.frames != TeacherConfig.frames:
        raise UserError(f"frames: {config.frames} is of videos, and {config.architecture} makes none; leave it out")
    opening = open_pairs if config.architecture == "instruct-pix2pix" else open_data
    return opening(config.data, resolution=config.resolution, channels=config.channels)


def run(values: dict[str, Any]) -> int:
    """The command; `values` are those of the command line and of a YAML file."""
    try:
        folder = train_teacher(**values)
    except Interrupted as stopped:
        if is_first_process():
            print(stopped.line("teacher"), file=sys.stderr)
        return stopped.code
    if is_first_process():
        print(f"saved {folder}")
    return 0


def _levels(config: TeacherConfig, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The UNet's widths, and its levels with attention, for samples of so many pixels."""
    widths = _whole_numbers("widths", config.widths)
    attention = _whole_numbers("attention", config.attention)
    if not widths or size % 2 ** (len(widths) - 1) or any(w < 8 or w % 8 for w in widths):
        raise UserError(
            f"widths: {config.widths!r} does not fit; give multiples of 8, whose levels halve {size} pixels evenly"
        )
    if any(level not in range(len(widths)) for level in attention):
        raise UserError(f"attention: {config.attention!r} names a level that is not among 0 to {len(widths) - 1}")
    return widths, attention


def _text_teacher(config: TeacherConfig, data: Data) -> TextTeacher:
    vae_widths = _whole_numbers("vae_widths", config.vae_widths)
    if config.architecture in VIDEOS:
        return VideoTeacher(config, data, _whole_numbers("widths", config.widths), (), vae_widths)
    latent = data.shape[1] // 2 ** (len(vae_widths) - 1) if vae_widths else 1
    return TextTeacher(config, data, *_levels(config, latent), vae_widths)


def _card(config: TeacherConfig, data: Data) -> str:
    public = public_options(dataclasses.asdict(config))
    options = " ".join(
        f"--{f.name.replace('_', '-')} {shlex.quote(str(public[f.name]))}"
        for f in dataclasses.fields(config)
        if f.name in public and getattr(config, f.name) != f.default
    )
    return f"""---
library_name: diffusers
tags: [diffusion, diffdistill]
---
# A diffusion model of {data.name!r}

Trained by diffdistill on {len(data)} samples of shape {tuple(data.shape)} ({config.parameterization}
parameterisation, {config.steps} steps, batch {config.batch_size}, seed {config.seed}):

    diffdistill teacher {options} --out runs/teacher

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
{_arguments(config, data)}
```
"""


def _arguments(config: TeacherConfig, data: Data) -> str:
    if config.architecture == "unet2d":
        classes = "" if data.num_classes is None else "class_labels=[3], "
        return f"image = pipeline({classes}num_inference_steps=16).images[0]"
    first = data.get(torch.arange(1))
    text = (first.captions or [""])[0]
    image = "" if first.conditions is None else "image=image, "
    if config.architecture in VIDEOS:
        _, frames, height, width = data.shape
        size = f"height={height}, width={width}, num_frames={frames}"
        return f"video = pipeline({image}prompt={text!r}, {size}, guidance_scale=2.0, num_inference_steps=16).frames[0]"
    return f"image = pipeline({text!r}, {image}guidance_scale=2.0, num_inference_steps=16).images[0]"


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{name}: {text!r} is not a list of whole numbers such as 32,64") from None
