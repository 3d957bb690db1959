"""Benchmark: attention with a forward derivative on a GPU, against flash attention's plain pass and other kernels.

    python -m diffdistill.eval.benchmarks.attention_gpu --out attention-gpu.json

Each row is a length and a width of heads: output and tangent without a graph by ours, over the plain pass of torch's
own kernel; by jvp-flash-attention where it is installed and takes the width; memory beyond the inputs; and the relative
errors of ours against float64 where the sequence is short. Two last rows are an iteration of sCM, a tangent and then a
pass with its gradient, on a network of DiT-XL/2's shape, by ours and by plain products (MATH). On a CPU the same is
computed by tiles, which says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffdistill.core.attention import attention
from diffdistill.core.attention_choice import attention_by
from diffdistill.core.jvp import jvp
from diffdistill.environment import environment, use_machine
from diffdistill.errors import UserError
from diffdistill.eval.benchmarks.attention import peak_mb, seconds, whole_numbers
from diffdistill.eval.report import markdown_table, write_json
from diffdistill.rng import generator

COLUMNS = (
    "work", "type", "length", "width", "plain ms", "ours ms", "times plain", "jvp-flash-attention ms", "MB",
    "error of output", "error of tangent",
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXACT_UP_TO = 4096
"""The longest sequence that is computed in float64 too."""
DIT_XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32}
DIT_TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}


def milliseconds(work: Callable[[], object], device: torch.device, count: int) -> float:
    """The median of so many calls, after one that is not counted."""

    def whole() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    whole()
    return 1000 * statistics.median(seconds(whole) for _ in range(count))


def peak(work: Callable[[], object], device: torch.device) -> float:
    """The most MB that torch held at once beyond what it held before."""
    if device.type != "cuda":
        return peak_mb(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def with_tangent(attend: Callable[..., Tensor], parts: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """Output and tangent, without a graph."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(parts, tangents, strict=True))
        both = forward_ad.unpack_dual(attend(*duals))
        assert both.tangent is not None
        return [both.primal, both.tangent]


def measure(
    length: int, heads: int, width: int, kind: str, device: torch.device, count: int, seed: int
) -> dict[str, Any]:
    """The row of one length and width."""
    draw = generator("cpu", "benchmark", seed)
    made = torch.randn(6, 1, heads, length, width, generator=draw).to(device, DTYPES[kind])
    parts, tangents = list(made[:3]), list(made[3:])

    def ours() -> list[Tensor]:
        return with_tangent(attention, parts, tangents)

    plain = milliseconds(lambda: F.scaled_dot_product_attention(*parts), device, count)
    taken = milliseconds(ours, device, count)
    row: dict[str, Any] = {
        "work": "attention", "type": kind, "length": length, "width": width, "plain ms": plain, "ours ms": taken,
        "times plain": taken / plain, "MB": peak(ours, device),
        "jvp-flash-attention ms": other(parts, tangents, device, count),
    }  # fmt: skip
    if length <= EXACT_UP_TO:
        exact = with_tangent(attention, [x.double() for x in parts], [x.double() for x in tangents])
        for name, a, b in zip(("output", "tangent"), ours(), exact, strict=True):
            row[f"error of {name}"] = ((a.double() - b).norm() / b.norm()).item()
    return row


def other(parts: Sequence[Tensor], tangents: Sequence[Tensor], device: torch.device, count: int) -> float | None:
    """Milliseconds of jvp-flash-attention; None where it is not installed or does not take this call."""
    if device.type != "cuda":
        return None
    try:
        attend = import_module("jvp_flash_attention.jvp_attention").attention
        return milliseconds(lambda: with_tangent(attend, parts, tangents), device, count)
    except (ImportError, AssertionError, NotImplementedError, RuntimeError, ValueError):
        return None


def iteration(choice: str, kind: str, shape: dict[str, int], device: torch.device, count: int) -> dict[str, Any]:
    """The row of a tangent, and a pass with its gradient, of a DiT of random weights by one kind of attention."""
    torch.manual_seed(0)
    network: Any = DiTTransformer2DModel(**shape, in_channels=4, out_channels=4).to(device, DTYPES[kind])
    x, v = torch.randn(2, 4, 4, shape["sample_size"], shape["sample_size"]).to(device, DTYPES[kind])
    t, labels = torch.full((4,), 500.0, device=device), torch.arange(4, device=device)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, class_labels=labels).sample

    def step() -> None:
        with attention_by(choice):
            with torch.no_grad():
                target = jvp(field, (x, t), (v, torch.ones_like(t)))[1]
            (field(x, t) - target).square().mean().backward()
        network.zero_grad()

    side = shape["sample_size"] // network.config.patch_size
    return {
        "work": f"sCM iteration of a DiT, {'MATH' if choice == 'math' else 'ours'}", "type": kind, "length": side**2,
        "width": shape["attention_head_dim"], "ours ms": milliseconds(step, device, count), "MB": peak(step, device),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--lengths", default="1024,4096,16384,65536", help="of the sequences, separated by commas")
    parser.add_argument("--widths", default="64,72,128", help="of a head, separated by commas")
    parser.add_argument("--heads", type=int, default=16, help="heads of attention (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the inputs and weights (default: bf16)")
    parser.add_argument("--count", type=int, default=10, help="calls that are timed (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="a small network in place of DiT-XL/2's shape")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--out", "--json", type=Path, default=Path("attention-gpu.json"), help="a file for the rows")
    args = parser.parse_args(argv)
    try:
        device = use_machine(args.device)
        lengths, widths = whole_numbers("lengths", args.lengths), whole_numbers("widths", args.widths)
        for name in ("heads", "count"):
            if getattr(args, name) < 1:
                raise UserError(f"{name}: {getattr(args, name)} is not at least 1")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    kind, count = args.dtype, args.count
    rows = [measure(n, args.heads, width, kind, device, count, args.seed) for width in widths for n in lengths]
    shape = DIT_TINY if args.tiny else DIT_XL
    rows += [iteration(choice, kind, shape, device, count) for choice in ("auto", "math")]
    print(markdown_table(rows, COLUMNS))
    report = {"rows": rows, "columns": COLUMNS, "environment": environment()}
    write_json(report | {"options": vars(args) | {"out": str(args.out)}}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
