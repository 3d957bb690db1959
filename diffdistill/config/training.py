"""The options of the commands that train, and the files of a run that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffdistill.config.machine import AttentionConfig, MachineConfig
from diffdistill.errors import UserError
from diffdistill.options import option, read_yaml


@dataclass(frozen=True)
class FitConfig(MachineConfig):
    """How long, how much at a time, and what is kept."""

    steps: int = option(1000, "training steps; the turns of all players together are one step", at_least=1)
    batch_size: int = option(64, "samples of a training step in each process", at_least=1)
    accumulate: int = option(
        1,
        "passes in which a process computes its batch, batch_size / accumulate samples in each, for less memory; their "
        "gradients are added up, so that the step is the same to rounding",
        at_least=1,
    )
    seed: int = option(
        0, "all randomness and the order of the data are functions of this seed and the step", at_least=0
    )
    ema: float = option(0.0, "decay of the moving average that is evaluated and exported; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(10.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly at the start", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option(
        "constant", "the learning rate after the warm-up; cosine: it falls to zero by the end"
    )
    mixed_precision: Literal["no", "bf16"] = option(
        "no", "type of autocast in the networks; trained weights stay float32"
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = option(
        "adamw",
        "adamw: torch's fused AdamW; adamw8bit: moments in 8 bits, by the package bitsandbytes; muon: torch's Muon for "
        "matrices and convolutions, at AdamW's rates, and AdamW for the rest",
    )
    offload: Literal["none", "optimizer", "model", "group"] = option(
        "none",
        "what lies in host memory while it is not used, for less memory of the device and more time, to the same bits; "
        "optimizer: moments and averages; model: networks too, of which one is on the device at a time; group: a block "
        "of one",
    )
    log_every: int = option(20, "steps between two lines of metrics.jsonl", at_least=1)
    sample_every: int = option(200, "steps between two sample grids; 0: none", at_least=0)
    checkpoint_every: int = option(500, "steps between two checkpoints; 0: only at the end", at_least=0)
    keep_checkpoints: int = option(2, "checkpoints kept; older ones are removed", at_least=1)
    max_hours: float = option(
        0.0,
        "hours of this process's training, after which it writes a checkpoint and ends with exit code 75, to be "
        "resumed; 0: no end",
        at_least=0,
    )
    skip_nonfinite: int = option(
        0,
        "updates of a run that are skipped, each with a warning, since their loss or gradient is not finite; with one "
        "more, or with 0 at the first, training stops",
        at_least=0,
    )
    skip_unreadable: int = option(
        0,
        "images of the data that are skipped, each named in a warning, since they cannot be read: the next one stands "
        "for each; with one more, or with 0 at the first, training stops",
        at_least=0,
    )
    tracker: Literal["none", "tensorboard", "wandb"] = option(
        "none", "a tracker that gets the metrics too, through accelerate"
    )


@dataclass(frozen=True)
class SavingConfig:
    """How the student is saved."""

    export: Literal["both", "lora", "merged"] = option(
        "both",
        "of a LoRA student: lora (the LoRA alone, for load_lora_weights on the teacher), merged (a whole pipeline), or "
        "both (the pipeline, with the LoRA in its sub-folder lora); other students are whole pipelines",
    )
    parts: Literal["copy", "link", "reference"] = option(
        "copy",
        "the teacher's text encoders, VAE and tokenizers in the student's folder; copy: copied; link: hard links to "
        "their weights, where the file system has them; reference: left out, and loaded from the teacher",
    )
    max_shard_size: str = option(
        "10GB", "the most bytes of a file of the network's weights, with KB, MB, GB or TB; larger ones are parted"
    )
    layout: Literal["diffusers", "comfyui"] = option(
        "diffusers",
        "comfyui: for ComfyUI too; of a LoRA student there is comfyui/lora.safetensors with its keys, of others the "
        "model card says how it reads the network's file",
    )
    push_to_hub: str | None = option(None, "OWNER/NAME of a repository of the Hugging Face hub to upload the folder to")
    hub_private: bool = option(True, "a repository that --push-to-hub makes is private")


SAVING = frozenset(SavingConfig.__dataclass_fields__)
"""Options that a training does not depend on: they are of the folder that it ends with."""


@dataclass(frozen=True)
class InTrainingConfig:
    """How the student is looked at and judged while it is trained."""

    figures_every: int | None = option(
        None,
        "steps between two lines of metrics.jsonl with figures of samples of always the same noise, from which early "
        "warnings come; 0: none; default: as many as keep them under 2% of the training",
        at_least=0,
    )
    judge_every: int = option(
        0, "steps between two judgings of the student as `diffdistill eval` judges it; 0: none", at_least=0
    )
    judge_protocol: str | None = option(
        None, "a protocol (see `diffdistill protocols`) or a .yaml file; default: the one that fits the student"
    )
    judge_count: int | None = option(
        None, "images of each judging, always of the same noise; default: the protocol's, at most 500", at_least=2
    )
    judge_by: str | None = option(
        None,
        "the metric by which one student is better than another; default: the protocol's first distance, or its first "
        "metric",
    )
    export_best: bool = option(
        True, "of a training that judges, export the student of the best checkpoint; false: of the last"
    )


@dataclass(frozen=True)
class TrainConfig(SavingConfig, InTrainingConfig, FitConfig, AttentionConfig):
    """Method, teacher, data and players."""

    method: str = option("dmd2", "a method's name (see `diffdistill methods`) or a file of your own, ./my_method.py")
    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    student: str | None = option(
        None,
        "what the student begins as, a network of the teacher's family of another size: a diffusers folder or hub id; "
        "default: the teacher",
    )
    teacher_lora: tuple[str, ...] = option(
        (),
        "FILE or FILE:SCALE, a LoRA merged into the teacher first, in a folder inside the run's; may be repeated",
        repeated=True,
    )
    start: str | None = option(
        None, "a student's folder that the student begins as, at its levels; default: the teacher, of the same family"
    )
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    data: str | None = option(
        None,
        "real images: digits, a folder, .npz, .npy, .safetensors, Hugging Face datasets; a method says if it needs any",
    )
    pairs: str | None = option(None, "a folder made by `diffdistill pairs`; a method says if it needs one")
    losers: str | None = option(
        None,
        "of pairs of which one is better, the worse, as --data or --prompts has the better: row i of both is a pair; a "
        "method says if it needs them",
    )
    teacher_data: str | None = option(
        None,
        "the samples of --data or --prompts once more, with the conditions that the teacher sees in place of the "
        "student's, less reduced images say: row i of both is one sample; a method says if it needs them",
    )
    reward: str | None = option(
        None,
        "FILE.py:FUNCTION, a function (images, conditions) -> a number for each image; or digits, shapes, "
        "shapes:ATTRIBUTE, for what is drawn here; a method says if it needs one",
    )
    prompts: str | None = option(
        None,
        "for a latent teacher: a folder made by `diffdistill encode`, or a .txt, .jsonl, .json, .csv, "
        "encoded at the start",
    )
    negative_prompt: str | None = option(
        None,
        "the prompt that guidance leads away from, which stands wherever there is no prompt; "
        "default: that of the folder of prompts, or what the family has",
    )
    resolution: int | str | None = option(
        None, "pixels a side, or HEIGHTxWIDTH such as 720x1280, of a latent teacher; default: its own", at_least=1
    )
    frames: int | None = option(None, "frames of a video; default: the teacher's own", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "type of the teacher's weights; weights that are trained are float32"
    )
    teacher_bits: Literal[4, 8] | None = option(
        None,
        "bits in which the teacher's linear layers are stored, under LoRA players too, by the package bitsandbytes; "
        "default: as teacher_dtype says",
    )
    lora: str | None = option(
        None,
        "roles that are LoRA on the teacher's weights, separated by commas: student, fake_score; "
        "default: none, or what the method says",
    )
    lora_rank: int = option(64, "rank of LoRA players", at_least=1)
    lora_alpha: float | None = option(None, "LoRA's scale times lora_rank; default: lora_rank, a scale of 1", above=0)
    lora_targets: str | None = option(
        None, "names of the layers with LoRA, separated by commas, or all; default: the family's usual ones"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    out: str = option("runs/train", "the run folder")


DERIVED = (
    *("batch_size", "ema", "lr_schedule", "warmup_steps", "student_output", "student_level", "time_high"),
    *("fake_score_loss", "solver", "ddim_steps", "grid", "grid_points", "update_ratio", "optimizer", "student_lr"),
    *("regression_weight", "fake_score_lr", "beta1", "discriminator_lr", "path_length", "record_every", "track_every"),
    *("tangent_warmup", "boundary_steps", "reflow_steps", "distill_steps", "anneal_steps", "ramp_steps", "stage_steps"),
    *("guidance_steps", "consistency_steps", "matching_steps", "renew_every"),
)
"""Options of a training without a preset that are derived from the teacher and the number of steps where there is a
rule (`training.derived`), the method's and these defaults where there is none."""


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """Network and data."""

    architecture: Literal["unet2d", "stable-diffusion", "instruct-pix2pix", "wan", "wan-i2v"] = option(
        "unet2d",
        "unet2d: a pixel model of classes; stable-diffusion: a latent model of captions, its autoencoder first; "
        "instruct-pix2pix: one that changes images, from data with condition images; wan, wan-i2v: one of videos with "
        "captions, or one that begins with an image",
    )
    steps: int = option(10000, "iterations", at_least=1)
    batch_size: int = option(128, "samples of a training step in each process", at_least=1)
    ema: float = option(0.999, "decay of the moving average that is saved; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(200, "steps over which the learning rate rises linearly at the start", at_least=0)
    checkpoint_every: int = option(2000, "steps between two checkpoints; 0: only at the end", at_least=0)
    sample_every: int = option(2000, "steps between two sample grids; 0: none", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option(
        "cosine", "the learning rate after the warm-up; cosine: it falls to zero by the end"
    )
    lr: float = option(1e-3, "AdamW's learning rate", above=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    data: str = option(
        "digits",
        "digits, shapes, a folder, .npz, .npy, .safetensors, a Hugging Face dataset id or folder; of videos a folder, "
        "or moving, which are drawn",
    )
    resolution: int | None = option(
        None, "resize images to this many pixels; default: as they are, of videos 32", at_least=1
    )
    frames: int = option(9, "wan: frames of a video, one more than a multiple of 4", at_least=1)
    channels: Literal[1, 3] | None = option(None, "1: grey, 3: colour; default: as the data are")
    parameterization: Literal["vp", "flow", "edm"] = option(
        "vp",
        "vp: cosine schedule with zero terminal SNR and v; flow: linear flow matching; edm: Karras et al.",
    )
    label_dropout: float = option(0.1, "share of labels replaced by 'no class', for guidance", at_least=0, below=1)
    widths: str = option("32,64", "channels of the UNet's levels, separated by commas; of wan one number")
    layers: int = option(2, "residual blocks of a level; of wan its blocks", at_least=1)
    attention: str = option(
        "1", "levels with self-attention, from 0 (full resolution), separated by commas; '' for none"
    )
    dropout: float = option(0.0, "dropout of the UNet", at_least=0, below=1)
    vae_steps: int = option(1000, "of captions: training steps of the autoencoder", at_least=1)
    vae_batch_size: int = option(32, "of captions: images of a training step of the autoencoder", at_least=1)
    vae_widths: str = option("16,32,32", "of captions: channels of the autoencoder's levels")
    text_width: int = option(64, "of captions: width of the text encoder, a multiple of 16", at_least=16)
    out: str = option("runs/teacher", "the run folder; the diffusers folder is its sub-folder 'teacher'")


@dataclass(frozen=True)
class DecoderConfig(FitConfig):
    """For which model, from which latents, and how small."""

    teacher: str = option("", "the folder or hub id of a latent model, a teacher or a student")
    prompts: str = option("", "a folder of latents, made by `diffdistill encode --data` with that model")
    steps: int = option(4000, "iterations", at_least=1)
    batch_size: int = option(16, "images of a training step in each process", at_least=1)
    ema: float = option(0.999, "decay of the moving average that is saved; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(100, "steps over which the learning rate rises linearly at the start", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option(
        "cosine", "the learning rate after the warm-up; cosine: it falls to zero by the end"
    )
    lr: float = option(1e-3, "AdamW's learning rate for autoencoder and discriminator", above=0)
    width: int = option(64, "channels of every layer", at_least=8)
    blocks: int = option(3, "residual blocks at each size; at that of the image there is one", at_least=1)
    gan_weight: float = option(0.0, "weight of a GAN's loss beside the absolute error; 0: none", at_least=0)
    out: str = option("runs/decoder", "the run folder; the model's folder is its sub-folder 'model'")


INPUTS = "inputs.json"
"""The file of a run that says what it reads, and where its teacher is."""


def run_options(run: Path) -> dict[str, Any]:
    """The resolved options of a run folder; UserError if it is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {str(run)!r} is not a run folder; it has no config.yaml")
    return read_yaml(str(run / "config.yaml"))
