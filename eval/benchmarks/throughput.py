"""Benchmark: how fast images become a Fréchet distance, against torchmetrics' FrechetInceptionDistance.

    python -m diffdistill.eval.benchmarks.throughput --out throughput.json

Two kinds of work are timed pair by pair, interleaved in one process: batches of images through the Inception network
into the sums, where both have the same random weights; and features of a given width into a distance of two sets,
from the first batch to the result, both in float64. Ours runs the network with its normalisations folded into the
convolutions, channels last, as `diffdistill eval` does. Reported are the medians, the median ratio of a pair, the
middle half of the ratios, and how far the results are apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.eval.features.inception import Inception, folded
from diffdistill.eval.features.measure import module_measure
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.moments import Moments
from diffdistill.eval.report import markdown_table, write_json

COLUMNS = ("work", "torchmetrics s", "ours s", "times as fast", "from", "to", "relative difference")


class Same(nn.Module):
    """A feature network that gives back the features it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """The features, unchanged."""
        return features


def torchmetrics_fid(network: nn.Module) -> Any:
    """Their FID metric around a feature network; UserError if torchmetrics is not installed."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise UserError("torchmetrics: it is what this is measured against; pip install torchmetrics") from error
    # Its sums are float64 by themselves; set_dtype would make the network float64 too, several times as slow.
    return FrechetInceptionDistance(feature=network)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work took, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def row(work: str, theirs: Sequence[float], ours: Sequence[float], apart: float) -> dict[str, object]:
    """One row of the table, of paired times in seconds: medians, and the median and quartiles of theirs / ours."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    return {
        "work": work,
        "torchmetrics s": statistics.median(theirs),
        "ours s": statistics.median(ours),
        "times as fast": statistics.median(ratios),
        "from": ratios[len(ratios) // 4],
        "to": ratios[-1 - len(ratios) // 4],
        "relative difference": apart,
    }


def measure_features(images: int, batch: int, size: int) -> dict[str, object]:
    """Seconds of a batch of random images (batch, 3, size, size), features and sums; `images` in all."""
    torch.manual_seed(0)
    network = Inception()
    ours = module_measure(folded(network), "inception", "Inception-v3, random weights")
    theirs, moments = torchmetrics_fid(network), Moments(network.num_features)

    def add(pixels: Tensor) -> None:
        moments.update(ours(pixels, None, None)["features"])

    taken: tuple[list[float], list[float]] = [], []
    for k in range(-1, images // batch):  # the first is not counted
        pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
        first = timed(partial(theirs.update, pixels, real=False))[0]
        second = timed(partial(add, pixels))[0]
        if k >= 0:
            taken[0].append(first)
            taken[1].append(second)
    sums = theirs.fake_features_sum
    apart = ((moments.statistics().mean * moments.n - sums).norm() / sums.norm()).item()
    return row(f"features of {batch} images of {size}x{size}, added up", *taken, apart)


def two_sets(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Correlated float64 features (rows, width), the k-th variance along random axes 1 / k; mean and scale differ.

    Not steeper, or torchmetrics, which takes roots of the eigenvalues of a product, has no nine digits to compare.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    mix = torch.arange(1, width + 1).float().rsqrt()[:, None] * axes
    real, fake = (torch.randn(rows, width, generator=generator) @ mix for _ in range(2))
    return real.double(), (1.1 * fake + 0.02).double()


def our_distance(real: Tensor, fake: Tensor, batch: int) -> float:
    """Our Frechet distance of features (N, D) in float64, added up in batches of that many rows."""
    moments = []
    for features in (real, fake):
        moments.append(Moments(features.shape[1]))
        for part in features.split(batch):
            moments[-1].update(part)
    return frechet_distance(moments[1].statistics(), moments[0].statistics())


def their_distance(real: Tensor, fake: Tensor, batch: int) -> float:
    """The same distance by torchmetrics."""
    metric = torchmetrics_fid(Same(real.shape[1]))
    for features, is_real in ((real, True), (fake, False)):
        for part in features.split(batch):
            metric.update(part, real=is_real)
    return metric.compute().item()


def measure_statistics(rows: int, width: int, batch: int, pairs: int) -> dict[str, object]:
    """Seconds from two sets of features (rows, width) in batches to their distance."""
    real, fake = two_sets(rows, width)
    taken: tuple[list[float], list[float]] = [], []
    apart = 0.0
    for _ in range(pairs):
        first, expected = timed(partial(their_distance, real, fake, batch))
        second, distance = timed(partial(our_distance, real, fake, batch))
        taken[0].append(first)
        taken[1].append(second)
        apart = max(apart, abs(distance / expected - 1))
    return row(f"distance of 2 x {rows:,} x {width} features in batches of {batch}", *taken, apart)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--images", type=int, default=128, help="images that go through the network; 0: none (default: 128)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images of a batch (default: 8)")
    parser.add_argument(
        "--size", type=int, default=299, help="pixels of an image's side, resized to 299 (default: 299)"
    )
    parser.add_argument("--rows", type=int, default=50_000, help="features of each set; 0: none (default: 50000)")
    parser.add_argument("--width", type=int, default=2048, help="numbers of a feature (default: 2048)")
    parser.add_argument("--feature-batch", type=int, default=64, help="features of a batch (default: 64)")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of ours and of theirs (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch takes)")
    parser.add_argument("--out", "--json", type=Path, default=Path("throughput.json"), help="a file for the rows")
    args = parser.parse_args(argv)
    try:
        for name in ("batch_size", "size", "width", "feature_batch", "pairs"):
            if getattr(args, name) < 1:
                raise UserError(f"{name}: {getattr(args, name)} is not at least 1")
        if 0 < args.images < args.batch_size:
            raise UserError(f"images: {args.images} are fewer than a batch; use {args.batch_size} or more, or 0")
        if args.rows == 1:
            raise UserError("rows: 1 has no covariance; use 2 or more, or 0")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        rows = []
        if args.images:
            rows.append(measure_features(args.images, args.batch_size, args.size))
        if args.rows:
            rows.append(measure_statistics(args.rows, args.width, args.feature_batch, args.pairs))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown_table(rows, COLUMNS))
    options = vars(args) | {"out": str(args.out)}
    write_json({"rows": rows, "columns": COLUMNS, "options": options, "environment": environment()}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
