"""`make bench`: runs the benchmarks that fit this machine and writes docs/performance.md from what they measured.

    python -m diffdistill.eval.benchmarks.performance --out docs/performance.md

Each benchmark is a process of its own and keeps its rows in runs/performance, with commit, versions and hardware. A
benchmark that is not run now keeps the section of its last run there, or else the one that the page has; one that never
ran has a line that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.eval.report import markdown_table, write_text
from diffdistill.files import atomic_write


@dataclass(frozen=True)
class Benchmark:
    """A script that writes {"rows", "columns", "environment"}, and "summary" if it has one, to the file it is given."""

    name: str
    title: str
    arguments: tuple[str, ...]  #: after `python -m`
    about: str
    gpu: bool = False  #: takes one
    cpu: bool = False  #: uses none

    @property
    def command(self) -> str:
        """As one types it."""
        module, *rest = self.arguments
        return " ".join(["diffdistill" if module == "diffdistill.commands.cli" else f"python -m {module}", *rest])


BENCHMARKS = (
    Benchmark(
        "memory", "Memory of LoRA players", ("diffdistill.eval.benchmarks.memory",),
        "DMD2 on a UNet of Stable Diffusion's shape (81M parameters, random weights, 16x16 latents, batch 1, float32, "
        "AdamW, activations checkpointed), one thread. Student and fake score are full copies of the teacher, or LoRA "
        "of rank 64 on the teacher's own weights. With four fake scores the student takes four steps, and each level "
        "has a fake score of its own. Each row in a process of its own; the peak is what it "
        "held resident beyond the imports.",
    ),
    Benchmark(
        "memory-sdxl", "Memory of LoRA players, SDXL at 1024x1024 in bf16",
        ("diffdistill.eval.benchmarks.memory", "--network", "sdxl", "--resolution", "1024", "--dtype", "bf16"),
        "The same with SDXL's shape and random weights, on a GPU.", gpu=True,
    ),
    Benchmark(
        "switches", "Switches that take less memory", ("diffdistill.eval.benchmarks.switches",),
        "DMD2 on the same UNet (81M parameters, random weights, 16x16 latents, batch 2, float32, AdamW, student and "
        "fake score moving in every step), one thread, each row in a process of its own, as ratios to the row without. "
        "The peak is what a process held resident beyond what one of the embedded digits does, and beyond what is "
        "offloaded: on a CPU that lies in the same memory and is copied within it, and layers of few bits have no fast "
        "kernels, so that times are not those of a GPU; what of the teacher's mapped file was read to be packed into "
        "few bits may count too. plan is what `diffdistill plan` says; the last three rows took 80 to 130 MB more.",
        cpu=True,
    ),
    Benchmark(
        "overhead", "What the trainer costs", ("diffdistill.eval.benchmarks.overhead",),
        "A cycle of training over its bare network passes, backward passes, optimizer and average, one thread, "
        "interleaved in one run; the middle half of the pairs beside it.", cpu=True,
    ),
    Benchmark(
        "overhead-jvp", "What the trainer costs where a derivative or a jump along a path is learned",
        ("diffdistill.eval.benchmarks.overhead", "--methods", "scm,mean_flow,flow_map,tbcm,rcm,sana_sprint,ctm,ladd",
         "--cycles", "7"),
        "The same of methods that need a product with the Jacobian, which is computed exactly and counted as a bare "
        "pass of its own cost, and of two with a discriminator on features.", cpu=True,
    ),
    Benchmark(
        "running", "What a run takes beside its training", ("diffdistill.eval.benchmarks.running",),
        "Figures as often as by default, over the steps between two of them; a checkpoint, with its checksums, over "
        "the five minutes between two of them; and samples a second of two processes of one thread over those of one, "
        "whose steps have half as many. A network of 128 and 256 channels on 8x8 images; medians.", cpu=True,
    ),
    Benchmark(
        "attention", "Attention with a forward derivative", ("diffdistill.eval.benchmarks.attention",),
        "Output and tangent of attention (batch 1, a head of 64, float32, seed 0) by ours and by torch's plain "
        "products (MATH), one thread, interleaved in one run; with gradients those of output and tangent, by ours. MB "
        "are the most that torch held at once beyond the inputs, counted exactly from its every allocation; times are "
        "medians, with the middle half of the ratios. On a CPU: CUDA is not measured.", cpu=True,
    ),
    Benchmark(
        "attention-gpu", "Attention with a forward derivative on a GPU",
        ("diffdistill.eval.benchmarks.attention_gpu",),
        "Output and tangent of attention in bf16 (batch 1, 16 heads, seed 0) by our kernel over the plain pass of "
        "torch's own, and an iteration of sCM on a network of DiT-XL/2's shape.", gpu=True,
    ),
    Benchmark(
        "throughput", "Evaluation throughput", ("diffdistill.eval.benchmarks.throughput",),
        "Against torchmetrics' FrechetInceptionDistance with the same network (random weights), interleaved in one "
        "run: images through the feature network, and two sets of 50,000 x 2048 features, in batches of 64, up to the "
        "distance.", cpu=True,
    ),
    Benchmark(
        "plan", "Plans against what trainings take", ("diffdistill.eval.benchmarks.plan",),
        "What `diffdistill plan` says of memory, and the most that the training then held resident, less what the "
        "same training of the embedded digits holds: a UNet of 81 million parameters at 16x16 latents in batches of 4, "
        "a DiT of 27 million at 16x16 in batches of 16, random weights, four steps. The C library gives back at once "
        "what is freed; by itself it kept up to a fifth of it. A plan counts tensors: an allocator that keeps "
        "what is freed, as that of a GPU does, holds more.", cpu=True,
    ),
    Benchmark(
        "speed", "Speed of a student", ("diffdistill.commands.cli", "speed", "runs/demo", "--batch-sizes", "1,64"),
        "The digits student of `make demo` against its teacher, end to end.",
    ),
    Benchmark(
        "speed-text", "Speed of text-to-image students",
        ("diffdistill.commands.cli", "speed", "runs/shapes/dmd2-1", "runs/shapes/dmd2-4", "--batch-sizes", "1,8"),
        "Students of `make demo-text` against their teacher, text encoding and decoding included.",
    ),
    Benchmark(
        "board", "The scoreboard", ("diffdistill.commands.cli", "bench", "--suite", "digits"),
        "Every method on the same teacher, budget, seeds and evaluation; an hour on two cores. docs/results.md has it.",
    ),
)  # fmt: skip


FOLDERS = {"speed": "speed.json", "bench": "board.json"}
"""Commands that make a folder, and the file in it that has the rows."""


def unfit(benchmark: Benchmark) -> str | None:
    """Why it cannot be run here, or None."""
    if benchmark.gpu and not torch.cuda.is_available():
        return "it takes a GPU, and none was at hand"
    for word in benchmark.arguments:
        if word.startswith("runs/") and not Path(word).is_dir():
            return f"it takes {word}, which `make demo` or `make demo-text` makes"
    return None


def run(benchmark: Benchmark, folder: Path) -> str | None:
    """None if it ran and its rows are kept; else why not."""
    if (reason := unfit(benchmark)) is not None:
        return reason
    out = folder / f"{benchmark.name}.json"
    print(f"{benchmark.name}: {benchmark.command}", flush=True)
    made = next((name for word, name in FOLDERS.items() if word in benchmark.arguments), None)
    where = ["--json", str(out)] if made is None else ["--out", str(out.with_suffix(""))]
    done = subprocess.run([sys.executable, "-m", *benchmark.arguments, *where])
    if done.returncode:
        return f"it failed with exit code {done.returncode}"
    if made is not None:
        atomic_write(out, (out.with_suffix("") / made).read_bytes())
    return None


def section(benchmark: Benchmark, folder: Path, reason: str | None, page: str = "") -> str:
    """Markdown of what was measured last, as kept or as `page` has it, or why nothing was."""
    text = f"## {benchmark.title}\n\n{benchmark.about}\n\n"
    file = folder / f"{benchmark.name}.json"
    if not file.is_file():
        before = next((part for part in page.split("\n## ") if part.startswith(benchmark.title + "\n")), "")
        if "\n| ---" in before:
            return f"## {before.strip()}\n"
        return (
            text + f"`{benchmark.command}` was not measured here: {reason or unfit(benchmark) or 'it was left out'}.\n"
        )
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    made = kept["environment"]
    where = (
        not benchmark.cpu and made["gpu"]
    ) or f"{made['platform']}, {made['cpu_threads']} CPU thread{'s' * (made['cpu_threads'] != 1)}"
    commit = (made["commit"] or "unknown")[:10] + "+" * (made["commit"] or "").endswith("+")
    versions = f"torch {made['torch']}, diffusers {made['diffusers']}, commit {commit}"
    summary = f"{kept['summary']}\n\n" if kept.get("summary") else ""
    table = markdown_table(kept["rows"], kept["columns"])
    return text + f"{table}\n{summary}`{benchmark.command}` ({where}; {versions})\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ",".join(benchmark.name for benchmark in BENCHMARKS)
    parser.add_argument("--only", default=names, help=f"benchmarks to run, separated by commas (default: {names})")
    parser.add_argument("--folder", default="runs/performance", help="folder of the rows (default: runs/performance)")
    parser.add_argument("--out", default="docs/performance.md", help="the page to write (default: docs/performance.md)")
    args = parser.parse_args(argv)
    chosen, folder = args.only.split(",") if args.only else [], Path(args.folder)
    try:
        for name in chosen:
            if name not in names.split(","):
                raise UserError(f"only: {name!r} is no benchmark; they are {names}")
        folder.mkdir(parents=True, exist_ok=True)
        reasons = {b.name: run(b, folder) for b in BENCHMARKS if b.name in chosen}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: not measured, {reason}", file=sys.stderr)
    head = (
        "# Performance\n\nWritten by `make bench`; each section says the command, the machine and the commit. "
        "[results.md](results.md) has a scoreboard of all methods too, with what it shows.\n\n"
    )
    page = Path(args.out).read_text(encoding="utf-8") if Path(args.out).is_file() else ""
    write_text(head + "\n".join(section(b, folder, reasons.get(b.name), page) for b in BENCHMARKS), args.out)
    print(f"wrote {args.out}")
    return 1 if any(reason and "failed" in reason for reason in reasons.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
