"""The options of the commands that make what a training reads: encoded prompts and images, pairs of noise and image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffdistill.config.machine import AttentionConfig, MachineConfig
from diffdistill.options import option


@dataclass(frozen=True)
class EncodeConfig(MachineConfig):
    """What is encoded: prompts, or images with captions, so that training loads neither text encoder nor VAE."""

    teacher: str = option("", "the folder or hub id of a latent diffusion pipeline")
    prompts: str | None = option(
        None,
        "a .txt with a prompt on each line; .jsonl, .json, .csv, .tsv, .parquet or a Hugging Face dataset with a "
        "prompt, caption or text; of a teacher that reads images a .jsonl or .csv with a condition_image too",
    )
    data: str | None = option(
        None,
        "images with captions (or classes): a folder, .parquet, .tar shards or a pattern of them, "
        "a Hugging Face dataset, shapes; for a teacher of videos a folder of .mp4, .gif or folders of numbered images, "
        "or moving, whose first frames are those that one of image to video reads; "
        "for one that changes images each with a condition image (condition_image of a metadata.jsonl, or "
        "NAME.condition.png), or edits",
    )
    resolution: int | str | None = option(
        None, "pixels a side, or HEIGHTxWIDTH such as 720x1280; default: the model's own", at_least=1
    )
    frames: int | None = option(None, "frames of a video; default: the model's own", at_least=1)
    buckets: bool = option(
        False,
        "bring each image to the size nearest to its ratio, of about the area of --resolution, and not to that one; a "
        "training step then takes images of one size",
    )
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
    guidance_scale_2: float | None = option(
        None, "that of a teacher's second network, as of Wan 2.2 A14B; default: guidance_scale", at_least=0
    )
    seed: int = option(0, "pair i is a function of this seed and i, whatever the batch size", at_least=0)
    batch_size: int = option(256, "pairs made at a time", at_least=1)
    shard_size: int = option(1024, "pairs in a file; a stopped run goes on from the last whole file", at_least=1)
    out: str = option("runs/pairs", "the folder to make; one that is not finished is continued")


@dataclass(frozen=True)
class PruneConfig(MachineConfig):
    """Which teacher loses how many of its blocks."""

    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    keep: float = option(0.5, "the share of blocks that stay; of a UNet those in each level", above=0, below=1)
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    prompts: str | None = option(None, "for a text-to-image teacher: a folder made by `diffdistill encode`")
    count: int = option(8, "the teacher's own samples at whose states blocks are compared", at_least=1)
    sampling_steps: int = option(8, "DDIM steps of these samples", at_least=1)
    out: str = option("runs/pruned", "the folder to make")
