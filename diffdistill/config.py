"""The options of every command; no torch is imported here."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.options import option, read_yaml


@dataclass(frozen=True)
class MachineConfig:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute; auto: a GPU if there is one")
    threads: int = option(0, "CPU threads of torch; 0: its own choice", at_least=0)


@dataclass(frozen=True)
class FitConfig(MachineConfig):
    """How long, how much at a time, and what is kept."""

    steps: int = option(1000, "iterations; a method's turns of one step count as one", at_least=1)
    batch_size: int = option(64, "samples in a step and process", at_least=1)
    seed: int = option(0, "all randomness and the order of the data are a function of it and the step", at_least=0)
    ema: float = option(0.0, "decay of the moving average that is evaluated and exported; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(10.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(0, "the learning rate rises linearly over so many steps", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option("constant", "cosine: it falls to zero by the end")
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast of the networks; weights stay float32")
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw: fused; adamw8bit: moments in 8 bits, by the package bitsandbytes"
    )
    log_every: int = option(20, "steps between two lines of metrics.jsonl", at_least=1)
    sample_every: int = option(200, "steps between two sample grids; 0: none", at_least=0)
    checkpoint_every: int = option(500, "steps between two checkpoints; 0: only at the end", at_least=0)
    keep_checkpoints: int = option(2, "checkpoints kept; older ones are removed", at_least=1)
    tracker: Literal["none", "tensorboard", "wandb"] = option("none", "also log there, through accelerate")


@dataclass(frozen=True)
class TrainConfig(FitConfig):
    """Method, teacher, data and players."""

    method: str = option("dmd2", "a method's name (see `diffdistill methods`) or a file of your own, ./my_method.py")
    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    data: str | None = option(
        None,
        "real images: digits, a folder, .npz, .safetensors, a Hugging Face dataset; a method says if it needs any",
    )
    pairs: str | None = option(None, "a folder made by `diffdistill pairs`; a method says if it needs one")
    prompts: str | None = option(
        None, "for a latent teacher: a folder made by `diffdistill encode`, or a .txt or .jsonl, encoded at the start"
    )
    resolution: int | None = option(None, "pixels a side, for a latent teacher; default: its own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the teacher's own", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "the teacher's weights; those that are trained are float32"
    )
    lora: str | None = option(
        None,
        "roles that are LoRA on the teacher's weights, separated by commas: student, fake_score; "
        "default: none, or what the method says",
    )
    lora_rank: int = option(64, "rank of LoRA players", at_least=1)
    lora_alpha: float | None = option(None, "LoRA's scale is lora_alpha / lora_rank; default: 1", above=0)
    lora_targets: str | None = option(
        None, "names of the layers with LoRA, separated by commas, or all; default: the family's usual ones"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    out: str = option("runs/train", "the run folder")


@dataclass(frozen=True)
class EncodeConfig(MachineConfig):
    """What is encoded: prompts, or images with captions, so that training loads neither text encoder nor VAE."""

    teacher: str = option("", "the folder or hub id of a latent diffusion pipeline")
    prompts: str | None = option(
        None,
        "a .txt with a prompt on each line; .jsonl, .parquet or a Hugging Face dataset with a prompt, caption or text",
    )
    data: str | None = option(
        None,
        "images with captions (or classes): a folder, .parquet, .tar shards or a pattern of them, "
        "a Hugging Face dataset, shapes",
    )
    resolution: int | None = option(None, "pixels a side; default: the model's own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the model's own", at_least=1)
    embedded_guidance: float = option(3.5, "what a network with an embedded guidance scale (Flux) is told", at_least=0)
    count: int | None = option(None, "only so many, from the first on; default: all", at_least=1)
    streaming: bool = option(
        False, "read a Hugging Face dataset or .parquet files row by row, in order: only what is encoded is on disk"
    )
    batch_size: int = option(16, "prompts encoded at a time", at_least=1)
    shard_size: int = option(1024, "prompts in a file; a stopped run goes on from the last whole file", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the text encoders and the autoencoder; what bfloat16 ones give is also stored in it"
    )
    out: str = option("runs/encoded", "the folder; the same command on an unfinished one goes on with it")


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """Network and data."""

    architecture: Literal["unet2d", "stable-diffusion"] = option(
        "unet2d", "unet2d: of pixels and classes; stable-diffusion: of captions, with an autoencoder trained first"
    )
    steps: int = option(10000, "iterations", at_least=1)
    batch_size: int = option(128, "samples in a step and process", at_least=1)
    ema: float = option(0.999, "decay of the moving average that is saved; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(200, "the learning rate rises linearly over so many steps", at_least=0)
    checkpoint_every: int = option(2000, "steps between two checkpoints; 0: only at the end", at_least=0)
    sample_every: int = option(2000, "steps between two sample grids; 0: none", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "cosine: it falls to zero by the end")
    lr: float = option(1e-3, "AdamW's learning rate", above=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    data: str = option("digits", "digits, shapes, a folder, .npz, .safetensors, a Hugging Face dataset id or folder")
    resolution: int | None = option(None, "resize images to this many pixels; default: as they are", at_least=1)
    channels: Literal[1, 3] | None = option(None, "1: grey, 3: colour; default: as the data are")
    parameterization: Literal["vp", "flow", "edm"] = option(
        "vp",
        "vp: cosine schedule with zero terminal SNR and v; flow: linear flow matching; edm: Karras et al.",
    )
    label_dropout: float = option(0.1, "share of labels replaced by 'no class', for guidance", at_least=0, below=1)
    widths: str = option("32,64", "channels of the UNet's levels, separated by commas")
    layers: int = option(2, "residual blocks of a level", at_least=1)
    attention: str = option(
        "1", "levels with self-attention, from 0 (full resolution), separated by commas; '' for none"
    )
    dropout: float = option(0.0, "dropout of the UNet", at_least=0, below=1)
    vae_steps: int = option(1000, "stable-diffusion: iterations of the autoencoder, before the UNet's", at_least=1)
    vae_batch_size: int = option(32, "stable-diffusion: images in one of them", at_least=1)
    vae_widths: str = option("16,32,32", "stable-diffusion: channels of the autoencoder's levels")
    text_width: int = option(64, "stable-diffusion: of the text encoder, a multiple of 16", at_least=16)
    out: str = option("runs/teacher", "the run folder; the diffusers folder is its sub-folder 'teacher'")


@dataclass(frozen=True)
class PairsConfig(MachineConfig):
    """Which pairs of noise and image, of which teacher."""

    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    prompts: str | None = option(None, "for a text-to-image teacher: a folder made by `diffdistill encode`")
    teacher_dtype: Literal["float32", "bfloat16"] = option("float32", "the teacher's weights, as in the training")
    count: int = option(2000, "pairs; all classes or prompts in turn", at_least=1)
    solver: Literal["ddim", "heun"] = option("ddim", "ddim: first order; heun: second, two network passes a step")
    sampling_steps: int = option(50, "the solver's steps, at the teacher's own times", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    seed: int = option(0, "pair i is a function of it and i, whatever the batch", at_least=0)
    batch_size: int = option(256, "pairs made at a time", at_least=1)
    shard_size: int = option(1024, "pairs in a file; a stopped run goes on from the last whole file", at_least=1)
    out: str = option("runs/pairs", "the folder; the same command on an unfinished one goes on with it")


@dataclass(frozen=True)
class ExportConfig:
    """Which student."""

    run: str = option(MISSING, "a run folder made by train")
    step: int | None = option(None, "the checkpoint's step; default: the last", at_least=0)
    out: str | None = option(None, "the folder to make; default: RUN/student")


@dataclass(frozen=True)
class DiversityConfig:
    """Which student, and how its teacher begins."""

    student: str = option(MISSING, "a run, or the folder of a Stable Diffusion student of two steps or more")
    teacher: str | None = option(None, "a diffusers folder or hub id; default: the one the student was distilled from")
    base_steps: int = option(20, "the teacher's steps from noise to image; 0: none", at_least=0)
    base_guidance: float = option(7.0, "the teacher's guidance scale", at_least=0)
    out: str = option("runs/diversity", "the folder to make")


@dataclass(frozen=True)
class MethodsConfig:
    """Which method."""

    method: str | None = option(None, "a method's name or file; default: list all of them")


@dataclass(frozen=True)
class VerifyConfig:
    """What is checked."""

    method: str | None = option(None, "a method's name or file")
    all: bool = option(False, "every method")
    exact: bool = option(False, "closed forms only, no training (seconds)")
    json: str | None = option(None, "also write the rows into this file")
    threads: int = option(0, "CPU threads of torch; 0: its own choice", at_least=0)


@dataclass(frozen=True)
class ListConfig:
    """A list has no options."""


def run_options(run: Path) -> dict[str, Any]:
    """The resolved options of a run folder; UserError if it is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {str(run)!r} is not a run folder; it has no config.yaml")
    return read_yaml(str(run / "config.yaml"))
