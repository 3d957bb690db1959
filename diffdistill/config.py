"""The options of every command but those that check; no torch is imported here."""

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
class AttentionConfig:
    """How attention is computed."""

    attention: Literal["auto", "sdpa", "xformers", "jvp", "math"] = option(
        "auto",
        "the kernels of attention; auto and sdpa: torch's, fused where they can be; xformers; jvp: ours, which alone "
        "has a derivative along a direction, and which all but math take for one; math: plain products",
    )


@dataclass(frozen=True)
class FitConfig(MachineConfig):
    """How long, how much at a time, and what is kept."""

    steps: int = option(1000, "training steps; the turns of all players together are one step", at_least=1)
    batch_size: int = option(64, "samples of a training step in each process", at_least=1)
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
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw: torch's fused AdamW; adamw8bit: moments in 8 bits, by the package bitsandbytes"
    )
    log_every: int = option(20, "steps between two lines of metrics.jsonl", at_least=1)
    sample_every: int = option(200, "steps between two sample grids; 0: none", at_least=0)
    checkpoint_every: int = option(500, "steps between two checkpoints; 0: only at the end", at_least=0)
    keep_checkpoints: int = option(2, "checkpoints kept; older ones are removed", at_least=1)
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
    push_to_hub: str | None = option(None, "OWNER/NAME of a repository of the Hugging Face hub to upload the folder to")
    hub_private: bool = option(True, "a repository that --push-to-hub makes is private")


SAVING = frozenset(SavingConfig.__dataclass_fields__)
"""Options that a training does not depend on: they are of the folder that it ends with."""


@dataclass(frozen=True)
class TrainConfig(SavingConfig, FitConfig, AttentionConfig):
    """Method, teacher, data and players."""

    method: str = option("dmd2", "a method's name (see `diffdistill methods`) or a file of your own, ./my_method.py")
    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    data: str | None = option(
        None,
        "real images: digits, a folder, .npz, .npy, .safetensors, Hugging Face datasets; a method says if it needs any",
    )
    pairs: str | None = option(None, "a folder made by `diffdistill pairs`; a method says if it needs one")
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
    resolution: int | None = option(None, "pixels a side, for a latent teacher; default: its own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the teacher's own", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "type of the teacher's weights; weights that are trained are float32"
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
    *("fake_score_loss", "ddim_steps", "grid", "grid_points", "update_ratio", "student_lr"),
    *("regression_weight", "fake_score_lr", "beta1"),
)
"""Options of a training without a preset that are derived from the teacher and the number of steps where there is a
rule (`training.derived`), the method's and these defaults where there is none."""


@dataclass(frozen=True)
class EncodeConfig(MachineConfig):
    """What is encoded: prompts, or images with captions, so that training loads neither text encoder nor VAE."""

    teacher: str = option("", "the folder or hub id of a latent diffusion pipeline")
    prompts: str | None = option(
        None,
        "a .txt with a prompt on each line; .jsonl, .json, .csv, .tsv, .parquet or a Hugging Face dataset with a "
        "prompt, caption or text",
    )
    data: str | None = option(
        None,
        "images with captions (or classes): a folder, .parquet, .tar shards or a pattern of them, "
        "a Hugging Face dataset, shapes",
    )
    resolution: int | None = option(None, "pixels a side; default: the model's own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the model's own", at_least=1)
    embedded_guidance: float = option(
        3.5, "guidance scale of a network that takes it as an input, such as Flux's", at_least=0
    )
    negative_prompt: str | None = option(
        None,
        "the prompt that guidance leads away from, which stands wherever there is no prompt; "
        "default: what the family has, a space for Qwen-Image and the pipeline's own for others",
    )
    count: int | None = option(
        None, "how many prompts or images are encoded, from the first on; default: all", at_least=1
    )
    streaming: bool = option(
        False, "read a Hugging Face dataset or .parquet files row by row, in order: only what is encoded is on disk"
    )
    batch_size: int = option(16, "prompts encoded at a time", at_least=1)
    shard_size: int = option(1024, "prompts in a file; a stopped run goes on from the last whole file", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "type of the text encoders and the autoencoder; bfloat16 is stored as such, the others as float32"
    )
    prompt_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "type in which encoded prompts are stored; default: as --teacher-dtype says"
    )
    out: str = option("runs/encoded", "the folder to make; one that is not finished is continued")


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """Network and data."""

    architecture: Literal["unet2d", "stable-diffusion"] = option(
        "unet2d",
        "unet2d: a pixel model of classes; stable-diffusion: a latent model of captions, its autoencoder trained first",
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
        "digits", "digits, shapes, a folder, .npz, .npy, .safetensors, a Hugging Face dataset id or folder"
    )
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
    vae_steps: int = option(1000, "stable-diffusion: training steps of the autoencoder", at_least=1)
    vae_batch_size: int = option(32, "stable-diffusion: images of a training step of the autoencoder", at_least=1)
    vae_widths: str = option("16,32,32", "stable-diffusion: channels of the autoencoder's levels")
    text_width: int = option(64, "stable-diffusion: width of the text encoder, a multiple of 16", at_least=16)
    out: str = option("runs/teacher", "the run folder; the diffusers folder is its sub-folder 'teacher'")


@dataclass(frozen=True)
class PairsConfig(MachineConfig, AttentionConfig):
    """Which pairs of noise and image, of which teacher."""

    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    prompts: str | None = option(None, "for a text-to-image teacher: a folder made by `diffdistill encode`")
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "type of the teacher's weights; the training needs pairs of its own type"
    )
    count: int = option(2000, "number of pairs; their classes or prompts go in turn", at_least=1)
    solver: Literal["ddim", "heun"] = option("ddim", "ddim: first order; heun: second, two network passes a step")
    sampling_steps: int = option(50, "the solver's steps, at the teacher's own times", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    seed: int = option(0, "pair i is a function of this seed and i, whatever the batch size", at_least=0)
    batch_size: int = option(256, "pairs made at a time", at_least=1)
    shard_size: int = option(1024, "pairs in a file; a stopped run goes on from the last whole file", at_least=1)
    out: str = option("runs/pairs", "the folder to make; one that is not finished is continued")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(MachineConfig, SavingConfig):
    """Which student."""

    run: str = option(MISSING, "a run folder made by train")
    step: int | None = option(None, "the checkpoint's step; default: the last", at_least=0)
    student_steps: int | None = option(
        None,
        "in how many steps it is sampled, if it is trained for any number; default: as many as in training",
        at_least=1,
    )
    out: str | None = option(None, "the folder to make; default: RUN/student")
    dtype: Literal["teacher", "float32", "bfloat16", "float16"] = option(
        "teacher", "the type of the network's weights in the folder; teacher: as in the teacher's own"
    )
    allow_change: bool = option(
        False, "go on although the teacher, options or method are not those that the run began with"
    )


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(MachineConfig):
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
class ListConfig:
    """A list has no options."""


@dataclass(frozen=True)
class DrawConfig(MachineConfig, AttentionConfig):
    """How models are drawn."""

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the models' weights")
    trust_remote_code: bool = option(False, "allow the Python code of a pipeline that a folder carries to run")


@dataclass(frozen=True)
class JudgeConfig(DrawConfig):
    """What is drawn, compared with what and measured how."""

    protocol: str | None = option(
        None, "a protocol (see `diffdistill protocols`) or a .yaml file; default: the one that fits the model"
    )
    count: int | None = option(None, "images of each model; default: the protocol's", at_least=2)
    seed: int | None = option(
        None, "image i is drawn from seed 1000000 * SEED + i; default: the protocol's, which is 0", at_least=0
    )
    steps: int | None = option(None, "sampling steps of a teacher; a student has its own", at_least=1)
    guidance_scale: float | None = option(
        None, "classifier-free guidance of a teacher, in its pipeline's units; default: off", at_least=0
    )
    batch_size: int | None = option(
        None, "images drawn together, on which the last bits depend; default: the protocol's", at_least=1
    )
    reference: str | None = option(
        None,
        "real images, or a file of their statistics; default: the protocol's, else those of the model's training, else "
        "its teacher's own samples",
    )
    prompts: str | None = option(
        None, "a file with a prompt on each line; default: the protocol's, else those of the model's training"
    )
    negative_prompt: str | None = option(
        None,
        "the prompt that a guided teacher is led away from; default: what its student was trained with, "
        "or what the family has",
    )
    weights: tuple[str, ...] = option(
        (), "KEY=PATH, a file, folder or hub id with a feature network's weights; may be repeated", repeated=True
    )
    bootstrap: int | None = option(
        None,
        "bootstrap replicates of each interval; 0: no intervals; default: 200, and 20 for wide features",
        at_least=0,
    )
    threads: int = option(1, "CPU threads of torch, on which the last bits depend; 0: its own choice", at_least=0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(JudgeConfig):
    """Which models."""

    model: str = option(MISSING, "a run, a folder of runs, a model's folder or hub id, or a folder of images")
    teacher: str | None = option(None, "a student's teacher; default: the one that it was distilled from")
    teacher_steps: tuple[int, ...] | None = option(
        None,
        "numbers of steps at which the teacher is judged too; default: 1,2,4,8,16,32 for a run or model without "
        "--protocol and --steps, else none",
        at_least=1,
    )
    data: str | None = option(
        None,
        "real images of an evaluation without --protocol, of any kind that train takes; default: those of the model's "
        "training, else its teacher's own samples",
    )
    save_reference: str | None = option(None, "a file that statistics of the real images are written into")
    out: str | None = option(
        None, "folder of table and pictures; default: RUN/eval of a student's run, else runs/eval/NAME"
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JudgeConfig):
    """Which models."""

    models: tuple[str, ...] = option(
        MISSING, "two or more: runs, models' folders or hub ids, folders of images", repeated=True
    )
    out: str = option("runs/compare", "folder of table, picture and grid")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(DrawConfig):
    """Which models, and how they are timed."""

    models: tuple[str, ...] = option(
        MISSING, "one or more: runs, a folder of runs, models' folders or hub ids, or 'digits'", repeated=True
    )
    teacher: str | None = option(None, "the teacher that models are timed against; default: each student's own teacher")
    teacher_steps: int | None = option(
        None, "steps of models without their own; default: their pipeline's, and 16 for pixel models", at_least=1
    )
    guidance_scale: float | None = option(
        None, "classifier-free guidance of teachers (1: none); default: what their student was trained with", at_least=0
    )
    batch_sizes: tuple[int, ...] = option(
        (1, 4), "numbers of images drawn together, each of which is timed", at_least=1
    )
    resolutions: tuple[int, ...] | None = option(None, "pixels a side; default: the models' own", at_least=1)
    compile: bool = option(False, "time the models also with their denoising network under torch.compile")
    repeats: int = option(20, "draws that are timed", at_least=1)
    seed: int = option(0, "image i is drawn from seed 1000000 * SEED + i", at_least=0)
    out: str = option("runs/speed", "folder of the table")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(MachineConfig, AttentionConfig):
    """What is drawn."""

    model: str = option(MISSING, "a run, a student's or teacher's folder or hub id, or 'digits'")
    prompt: tuple[str, ...] = option((), "a prompt for a text-to-image model; may be repeated", repeated=True)
    count: int | None = option(None, "number of images; default: 64, of latent models 4", at_least=1)
    classes: tuple[int, ...] = option(
        (), "class labels of the images, repeated as needed; default: all in turn", at_least=0
    )
    steps: int | None = option(
        None, "sampling steps of a teacher; a student has its own; default: 16, latent models 20", at_least=1
    )
    guidance_scale: float | None = option(None, "classifier-free guidance of a teacher; default: off", at_least=0)
    negative_prompt: str | None = option(
        None, "the prompt that a guided teacher is led away from; default: what the family has"
    )
    seed: int = option(0, "image i is drawn from seed 1000000 * SEED + i", at_least=0)
    trace: bool = option(False, "draw the image that a latent model expects after each step, a row for each image")
    out: str = option("samples.png", "the picture's file")


@dataclass(frozen=True)
class BenchConfig(MachineConfig, AttentionConfig):
    """What is trained and judged."""

    suite: str = option("digits", "digits, mnist, or a .yaml file with the same fields")
    methods: tuple[str, ...] | None = option(
        None, "methods to train, each METHOD or METHOD:PRESET; default: all of the suite"
    )
    seed: int | None = option(
        None, "a single seed of the trainings and of the noise that is judged, instead of --seeds", at_least=0
    )
    seeds: tuple[int, ...] | None = option(
        None, "seeds of the trainings and of the noise that is judged; default: 100,101,102", at_least=0
    )
    budget: int | None = option(
        None, "network passes over a batch that a training may take; default: the suite's", at_least=1
    )
    teacher: str | None = option(None, "a diffusers folder or hub id; default: the suite's")
    data: str | None = option(None, "the real images that students learn from; default: the suite's")
    reference: str | None = option(
        None, "held-out images, which samples are compared with; default: the suite's, or else those of data"
    )
    jobs: int | None = option(None, "trainings at a time; default: one a CPU core, or one on a GPU", at_least=1)
    threads: int = option(1, "CPU threads of each training and of the evaluation; 0: torch's own choice", at_least=0)
    out: str = option("runs/bench", "folder of the board; one that is not finished is continued")


INPUTS = "inputs.json"
"""The file of a run that says what it reads, and where its teacher is."""


def run_options(run: Path) -> dict[str, Any]:
    """The resolved options of a run folder; UserError if it is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {str(run)!r} is not a run folder; it has no config.yaml")
    return read_yaml(str(run / "config.yaml"))
