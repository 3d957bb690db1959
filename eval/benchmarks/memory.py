"""Benchmark: the memory that DMD2 takes with LoRA players on one shared base, and with a fake score for each level.

    python -m diffdistill.eval.benchmarks.memory --out memory.md

Each kind trains for four steps in a process of its own: the same UNet of random weights through a diffusers folder,
batch 1, checkpointed activations, AdamW, student and a fake score both moving in every step. On a CPU the peak is what
the process holds resident above what it held once everything was imported; on a GPU what torch has allocated.
Weights are parameters by their storage, so that a shared base counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save
from torch import nn

from diffdistill.data.batches import batches
from diffdistill.data.encoded import KIND, fingerprint
from diffdistill.data.shards import make, start
from diffdistill.environment import peak_memory_mb, use_machine
from diffdistill.errors import UserError
from diffdistill.eval.report import publish
from diffdistill.families import FAMILIES, load_teacher
from diffdistill.files import atomic_write
from diffdistill.players.quantized import quantize
from diffdistill.training.assemble import data_for, make_game
from diffdistill.training.trainer import Trainer, accelerator_for

LORA: dict[str, Any] = {"lora": "student,fake_score"}
LEVELS: dict[str, Any] = {"student_steps": 4, "fake_scores": "per_level"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "full, four fake scores": LEVELS,
    "lora, four fake scores": LORA | LEVELS,
}
COLUMNS = ("players", "weights MB", "trained MB", "peak MB", "of full", "seconds a step")


@dataclasses.dataclass(frozen=True)
class Network:
    """A UNet, and what its prompts look like: shapes by name, without the batch."""

    family: str
    unet: dict[str, Any]
    cond: dict[str, tuple[int, ...]]
    vae_blocks: int  #: 2^(blocks - 1) pixels a latent pixel


NETWORKS = {
    "mid": Network(
        "stable_diffusion",
        {"sample_size": 16, "block_out_channels": (96, 192, 384, 384), "cross_attention_dim": 768},
        {"encoder_hidden_states": (77, 768)},
        4,
    ),
    "sdxl": Network(
        "sdxl",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        4,
    ),
}


def prepare(folder: Path, network: Network, resolution: int, dtype: torch.dtype) -> None:
    """A pipeline of random weights as far as training reads it, in `teacher`, and its prompts in `prompts`."""
    teacher, family = folder / "teacher", FAMILIES[network.family]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**network.unet)
    (unet if dtype == torch.float32 else unet.to(dtype)).save_pretrained(teacher / "unet")
    blocks = network.vae_blocks
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
    )
    vae.save_pretrained(teacher / "vae")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing").save_pretrained(teacher / "scheduler")
    index = {"_class_name": family.pipelines[0], "unet": ["diffusers", "UNet2DConditionModel"]}
    (teacher / "model_index.json").write_text(json.dumps(index))
    side = resolution // 2 ** (blocks - 1)
    settings = {
        "fingerprint": fingerprint(teacher, family),
        "family": family.name,
        "shape": [4, side, side],
        "resolution": resolution,
        "frames": None,
        "count": 4,
        "shard_size": 4,
    }
    made = start(KIND, folder / "prompts", settings, {"null": None})
    data = {name: torch.randn(4, *shape) for name, shape in network.cond.items()}
    make(
        KIND, folder / "prompts", made, 4, lambda indices: {name: value[list(indices)] for name, value in data.items()}
    )
    null = save({name: value[:1].clone() for name, value in data.items() if name != "time_ids"})
    atomic_write(folder / "prompts" / "null.safetensors", null)
    made["null"] = hashlib.sha256(null).hexdigest()
    atomic_write(folder / "prompts" / KIND.index, json.dumps(made))


def stored_mb(modules: Sequence[nn.Module], *, trained: bool = False) -> float:
    """The parameters of all of them in MB, each storage counted once."""
    storages = {
        p.untyped_storage().data_ptr(): p for m in modules for p in m.parameters() if p.requires_grad or not trained
    }
    return sum(p.untyped_storage().nbytes() for p in storages.values()) / 2**20


def resident_mb() -> float:
    """What this process holds now; 0 where the kernel does not say, so that a peak then counts the imports too."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(folder: Path, kind: str, dtype: str, steps: int, device: str) -> dict[str, Any]:
    """A few steps in this process, which has done nothing else."""
    torch.set_num_threads(1)
    half = dtype == "bf16"
    options = {
        "method": "dmd2", "teacher": str(folder / "teacher"), "prompts": str(folder / "prompts"),
        "update_ratio": 1, "gradient_checkpointing": True, "batch_size": 1, "steps": steps, "sample_every": 0,
        "device": device, **KINDS[kind],
        "teacher_dtype": "bfloat16" if half else "float32", "mixed_precision": "bf16" if half else "no",
    }  # fmt: skip
    return {"players": kind} | measured(options, folder, steps, device)


def measured(options: dict[str, Any], folder: Path, steps: int, device: str) -> dict[str, Any]:
    """Weights, peak and time a step of a few steps in this process; on a GPU without the memory, no peak.

    On a CPU what is offloaded is not counted, though it lies in the same memory.
    """
    on_gpu = use_machine(device).type == "cuda"
    load_teacher("digits")  # what is imported late
    before = 0.0 if on_gpu else resident_mb()
    game = make_game(options)
    accelerator = accelerator_for(game.config, folder)
    if game.config.teacher_bits:
        quantize(game.teacher.denoiser.network, game.config.teacher_bits, torch.float32)
    draw = batches(game.config, game.teacher, data_for(game), accelerator)
    parts = [game.teacher.denoiser, *game.method.players.values()]
    row: dict[str, Any] = {}
    try:
        trainer = Trainer(game.method, draw, game.config, folder, accelerator, beside=parts[:1])
        row |= {"weights MB": stored_mb(parts), "trained MB": stored_mb(parts, trained=True)}
        started = time.perf_counter()
        for _ in range(steps):
            trainer.iteration()
        if on_gpu:
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return row | {"peak MB": None, "seconds a step": None}
    taken = (time.perf_counter() - started) / steps
    host = 0.0 if on_gpu else trainer.offload.nbytes / 2**20
    return row | {"peak MB": peak_memory_mb() - before - host, "seconds a step": taken}


def in_a_process(benchmark: str, arguments: Sequence[str], what: str, **environment: str) -> Any:
    """What one of the benchmarks here prints last as JSON, in a process of its own; UserError of `what` if it fails."""
    command = [sys.executable, "-m", f"diffdistill.eval.benchmarks.{benchmark}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise UserError(f"{benchmark}: {what} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(network: str, resolution: int, dtype: str, steps: int, device: str) -> list[dict[str, Any]]:
    """A row for each kind of player; each is measured in its own process."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        run_settings = {"network": network, "resolution": resolution, "dtype": dtype, "steps": steps, "device": device}
        arguments = [text for name, value in run_settings.items() for text in (f"--{name}", str(value))]
        prepare(Path(folder), NETWORKS[network], resolution, torch.bfloat16 if dtype == "bf16" else torch.float32)
        for kind in KINDS:
            own = ["--one", kind, "--folder", folder, *arguments]
            rows.append(in_a_process("memory", own, f"the {kind} players"))
    whole = rows[0]["peak MB"]
    for row in rows:
        row["of full"] = row["peak MB"] / whole if whole and row["peak MB"] else None
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="mid",
        help="the network that is trained; sdxl: on a GPU only (default: mid)",
    )
    parser.add_argument("--resolution", type=int, default=128, help="pixels, eight a latent pixel (default: 128)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bf16"),
        default="float32",
        help="type of the teacher and of autocast (default: float32)",
    )
    parser.add_argument("--steps", type=int, default=4, help="training steps that are measured (default: 4)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    parser.add_argument("--out", help="a file that the table is written into, as Markdown")
    parser.add_argument("--json", help="a file that the rows are written into, as JSON")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.network == "sdxl" and (args.device == "cpu" or not torch.cuda.is_available()):
            raise UserError("network: sdxl takes a GPU with some 80 GB, and torch sees none here; use mid")
        if args.resolution < 64 or args.resolution % 64:
            raise UserError(f"resolution: {args.resolution} is not a multiple of 64; use 128")
        if args.one:
            print(json.dumps(measure(Path(args.folder), args.one, args.dtype, args.steps, args.device)))
            return 0
        rows = compare(args.network, args.resolution, args.dtype, args.steps, args.device)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    publish(rows, COLUMNS, args.out, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
