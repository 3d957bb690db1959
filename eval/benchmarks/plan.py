"""Benchmark: what `diffdistill plan` says of memory, and what the training then takes.

    python -m diffdistill.eval.benchmarks.plan --json plan.json

Each training runs for four steps in a process of its own, on a UNet of text and a DiT of classes with random weights,
on a CPU. The peak is what the process holds resident above what it held once everything was imported, and above
what the same training of the embedded digits takes: packages that are imported late, and threads. The C library gives
back at once what is freed (MALLOC_MMAP_THRESHOLD_ of glibc), where by itself it keeps up to a fifth for later. A plan
counts tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffdistill.errors import UserError
from diffdistill.eval.benchmarks.memory import NETWORKS, in_a_process, measured, prepare
from diffdistill.eval.plan import plan_of
from diffdistill.eval.report import publish
from diffdistill.training.assemble import make_game

COLUMNS = ("training", "plan MB", "measured MB", "plan over measured")
LORA: dict[str, Any] = {"lora": "student,fake_score"}
SMALL: dict[str, Any] = {"method": "dmd2", "teacher": "digits", "update_ratio": 1, "batch_size": 1}
WITHOUT: dict[str, dict[str, Any]] = {"": SMALL, "lora": SMALL | LORA}  # what is not the network's
DIT: dict[str, Any] = {"batch_size": 16}
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet, DMD2": ("unet", {"batch_size": 4}),
    "UNet, DMD2, recomputed": ("unet", {"batch_size": 4, "gradient_checkpointing": True}),
    "UNet, DMD2, LoRA players": ("unet", {"batch_size": 4} | LORA),
    "DiT, DMD2": ("dit", DIT),
    "DiT, DMD2, in parts": ("dit", DIT | {"accumulate": 4}),
    "DiT, SiD": ("dit", DIT | {"method": "sid"}),
}
"""The network of each training, and its options."""


def prepare_dit(folder: Path) -> None:
    """A DiT pipeline of random weights, in `teacher`."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=8, attention_head_dim=48, in_channels=4, out_channels=4, num_layers=8, sample_size=16
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(network, vae, scheduler, id2label=None).save_pretrained(folder / "teacher")


def options_of(name: str, root: Path) -> dict[str, Any]:
    """The options of a training, whose network lies below `root`."""
    network, own = TRAININGS[name]
    prompts = {"prompts": str(root / network / "prompts")} if network == "unet" else {}
    shared = {"method": "dmd2", "teacher": str(root / network / "teacher"), "update_ratio": 1, "sample_every": 0}
    return {**shared, **prompts, **own}


def peak(name: str, root: Path, steps: int) -> float:
    """MB of a training in a process of its own."""
    arguments = ["--one", name, "--folder", str(root), "--steps", str(steps)]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc's
    return float(in_a_process("plan", arguments, name, **at_once))


def compare(steps: int) -> list[dict[str, Any]]:
    """A row for each training."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root / "unet", NETWORKS["mid"], 128, torch.float32)
        prepare_dit(root / "dit")
        before = {lora: peak(lora, root, steps) for lora in WITHOUT}
        for name, (_, own) in TRAININGS.items():
            planned = plan_of(make_game(options_of(name, root), weights=False)).peak / 2**20
            taken = peak(name, root, steps) - before["lora" if "lora" in own else ""]
            values = (name, planned, taken, planned / taken)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(*values, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4, help="training steps that are measured (default: 4)")
    parser.add_argument("--out", help="a file that the table is written into, as Markdown")
    parser.add_argument("--json", help="a file that the rows are written into, as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.one is not None:
            torch.set_num_threads(1)
            options = WITHOUT.get(args.one) or options_of(args.one, Path(args.folder))
            print(json.dumps(measured(options, Path(args.folder), args.steps, "cpu")["peak MB"]))
            return 0
        rows = compare(args.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    publish(rows, COLUMNS, args.out, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
