"""The options of the Python functions as keyword arguments, for editors and type checkers.

They repeat the dataclasses of config, field by field, since no type checker derives one from the other; a test holds
them equal. A path may be given wherever a text names a file or folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from diffdistill.options import Size


class MachineOptions(TypedDict, total=False):
    """The options of `MachineConfig`."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int


class AttentionOptions(TypedDict, total=False):
    """The options of `AttentionConfig`."""

    attention: Literal["auto", "sdpa", "xformers", "jvp", "math"]


class FitOptions(MachineOptions, total=False):
    """The options of `FitConfig`."""

    steps: int
    batch_size: int
    accumulate: int
    seed: int
    ema: float
    max_grad_norm: float
    warmup_steps: int
    lr_schedule: Literal["constant", "cosine"]
    mixed_precision: Literal["no", "bf16"]
    optimizer: Literal["adamw", "adamw8bit", "muon"]
    offload: Literal["none", "optimizer", "model", "group"]
    log_every: int
    sample_every: int
    checkpoint_every: int
    keep_checkpoints: int
    max_hours: float
    skip_nonfinite: int
    skip_unreadable: int
    tracker: Literal["none", "tensorboard", "wandb"]


class SavingOptions(TypedDict, total=False):
    """The options of `SavingConfig`."""

    export: Literal["both", "lora", "merged"]
    parts: Literal["copy", "link", "reference"]
    max_shard_size: str
    layout: Literal["diffusers", "comfyui"]
    push_to_hub: str | None
    hub_private: bool


class TrainOptions(SavingOptions, FitOptions, AttentionOptions, total=False):
    """Those of `TrainConfig` but for the method and what objects may stand for, which `distill` takes by themselves."""

    figures_every: int | None
    judge_every: int
    judge_protocol: str | Path | None
    judge_count: int | None
    judge_by: str | None
    export_best: bool

    student: str | Path | None
    teacher_lora: Sequence[str]
    start: str | Path | None
    null_class: int | None
    prompts: str | Path | None
    negative_prompt: str | None
    resolution: Size | None
    frames: int | None
    teacher_dtype: Literal["float32", "bfloat16"]
    teacher_bits: Literal[4, 8] | None
    lora: str | None
    lora_rank: int
    lora_alpha: float | None
    lora_targets: str | None
    gradient_checkpointing: bool
    out: str | Path


class TeacherOptions(FitOptions, total=False):
    """The options of `TeacherConfig`."""

    architecture: Literal["unet2d", "stable-diffusion", "instruct-pix2pix", "wan", "wan-i2v"]
    lr: float
    weight_decay: float
    data: str | Path
    resolution: int | None
    frames: int
    channels: Literal[1, 3] | None
    parameterization: Literal["vp", "flow", "edm"]
    label_dropout: float
    widths: str
    layers: int
    attention: str
    dropout: float
    vae_steps: int
    vae_batch_size: int
    vae_widths: str
    text_width: int
    out: str | Path


class DecoderOptions(FitOptions, total=False):
    """The options of `DecoderConfig`."""

    teacher: str | Path
    prompts: str | Path
    lr: float
    width: int
    blocks: int
    gan_weight: float
    out: str | Path


class EncodeOptions(MachineOptions, total=False):
    """The options of `EncodeConfig` but for the teacher, which `encode` takes by itself."""

    prompts: str | Path | None
    data: str | Path | None
    resolution: Size | None
    frames: int | None
    buckets: bool
    embedded_guidance: float
    negative_prompt: str | None
    count: int | None
    streaming: bool
    batch_size: int
    shard_size: int
    teacher_dtype: Literal["float32", "bfloat16", "float16"]
    prompt_dtype: Literal["float32", "bfloat16", "float16"] | None
    out: str | Path


class PairsOptions(MachineOptions, AttentionOptions, total=False):
    """The options of `PairsConfig` but for the teacher, which `make_pairs` takes by itself."""

    null_class: int | None
    prompts: str | Path | None
    teacher_dtype: Literal["float32", "bfloat16"]
    count: int
    solver: Literal["ddim", "heun"]
    sampling_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    seed: int
    batch_size: int
    shard_size: int
    out: str | Path


class PruneOptions(MachineOptions, total=False):
    """The options of `PruneConfig` but for the teacher, which `prune` takes by itself."""

    keep: float
    null_class: int | None
    prompts: str | Path | None
    count: int
    sampling_steps: int
    out: str | Path


class DrawOptions(MachineOptions, AttentionOptions, total=False):
    """The options of `DrawConfig`."""

    dtype: Literal["float32", "bfloat16", "float16"]
    trust_remote_code: bool


class JudgeOptions(DrawOptions, total=False):
    """The options of `JudgeConfig`."""

    protocol: str | Path | None
    count: int | None
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    batch_size: int | None
    reference: str | Path | None
    prompts: str | Path | None
    negative_prompt: str | None
    weights: Sequence[str]
    bootstrap: int | None


class EvalOptions(JudgeOptions, total=False):
    """The options of `EvalConfig` but for model and teacher, which `evaluate` takes by themselves."""

    teacher_steps: Sequence[int] | None
    data: str | None
    save_reference: str | Path | None
    out: str | Path | None


class CompareOptions(JudgeOptions, total=False):
    """The options of `CompareConfig` but for the models."""

    out: str | Path


class SpeedOptions(DrawOptions, total=False):
    """The options of `SpeedConfig` but for the models."""

    teacher: str | Path | None
    teacher_steps: int | None
    guidance_scale: float | None
    batch_sizes: Sequence[int]
    resolutions: Sequence[Size] | None
    compile: bool
    repeats: int
    seed: int
    out: str | Path


class SampleOptions(MachineOptions, AttentionOptions, total=False):
    """The options of `SampleConfig` but for model and out, which `sample` takes by themselves."""

    prompt: str | Sequence[str]
    image: str | Sequence[str]
    images_per_prompt: int
    count: int | None
    classes: Sequence[int]
    steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    negative_prompt: str | None
    resolution: Size | None
    frames: int | None
    seed: int
    trace: bool
    fps: int


class BenchOptions(MachineOptions, AttentionOptions, total=False):
    """The options of `BenchConfig` but for the suite."""

    methods: Sequence[str] | None
    seed: int | None
    seeds: Sequence[int] | None
    budget: int | None
    teacher: str | Path | None
    data: str | Path | None
    reference: str | Path | None
    jobs: int | None
    out: str | Path
