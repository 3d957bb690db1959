"""What a metric is: a function of columns of measurements, and a record of what it reads and needs.

A protocol names a metric by its kind. `register` adds one from outside the package:

    from diffdistill.eval.metrics.registry import Metric, register

    def spread(inputs):
        return [float(inputs.drawn.all().std())]

    register(Metric("spread", spread))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from typing import Protocol as Interface

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.eval.metrics.bootstrap import bootstrap_frechet, bootstrap_mean
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.kernel import KID_SIZE, cmmd, kernel_distance, kid
from diffdistill.eval.metrics.manifold import density_coverage, precision_recall
from diffdistill.eval.metrics.moments import Statistics
from diffdistill.eval.metrics.scores import diversity, inception_score, vendi_score
from diffdistill.options import nearest


class Column(Interface):
    """What a measure says of every image of one set, in order: (N, D) or (N,)."""

    def parts(self) -> Iterator[Tensor]:
        """Blocks of rows, so that not all need be in memory."""

    def all(self) -> Tensor:
        """All rows."""

    def statistics(self) -> Statistics:
        """Mean and covariance of (N, D)."""


@dataclass(frozen=True)
class Inputs:
    """What a metric is computed from."""

    drawn: Column  #: of the images that are judged
    real: Column | None = None  #: of the reference
    labels: Tensor | None = None  #: (N,) classes of the images that are judged
    real_labels: Tensor | None = None  #: (M,) classes of the reference
    k: int = 5  #: neighbours


Needs = Literal["nothing", "statistics", "images"]


@dataclass(frozen=True)
class Metric:
    """One number, or several, of a set of images."""

    kind: str  #: the name by which a protocol asks for it
    compute: Callable[[Inputs], Sequence[float | None]]  #: a value for each of `columns`; None where there is none
    reads: str = "features"  #: the column of a measure; "": the protocol names it
    needs: Needs = "nothing"  #: of a reference: its mean and covariance, or the images themselves
    least: int = 1  #: images of each set
    why_least: str = "it takes"
    scale: float = 1.0  #: factor of the values in tables
    columns: tuple[str, ...] = ("{name}",)  #: headings of the table; {name} is the protocol's name for the metric
    resample: Callable[[Inputs, int], Tensor] | None = None  #: (R,) values of R bootstrap replicates
    centred: bool = False  #: replicates are biased, and the interval is moved to lie around the value

    @property
    def compares(self) -> bool:
        """Whether it takes a reference."""
        return self.needs != "nothing"


def register(metric: Metric) -> Metric:
    """Make a metric known to protocols; UserError if its kind is taken."""
    if metric.kind in METRICS:
        raise UserError(f"metric: {metric.kind!r} exists already; register it under another kind")
    METRICS[metric.kind] = metric
    return metric


def find_metric(kind: str, where: str = "metric") -> Metric:
    """The metric of that kind; UserError with the nearest name if there is none."""
    if kind not in METRICS:
        raise UserError(f"{where}: kind {kind!r} is not known; {nearest(kind, METRICS)}")
    return METRICS[kind]


# -- the functions -----------------------------------------------------------------------------------------


def _real(inputs: Inputs) -> Column:
    assert inputs.real is not None, "a metric that compares is given a reference"
    return inputs.real


def _frechet(inputs: Inputs) -> list[float | None]:
    return [frechet_distance(inputs.drawn.statistics(), _real(inputs).statistics())]


def _resampled_frechet(inputs: Inputs, replicates: int) -> Tensor:
    return bootstrap_frechet(inputs.drawn.all(), _real(inputs).statistics(), replicates)


def _kernel(inputs: Inputs) -> list[float | None]:
    return [kernel_distance(inputs.drawn.all(), _real(inputs).all())]


def _kid(inputs: Inputs) -> Sequence[float | None]:
    return kid(inputs.drawn.all(), _real(inputs).all())


def _cmmd(inputs: Inputs) -> list[float | None]:
    return [cmmd(inputs.drawn.all(), _real(inputs).all())]


def _precision_recall(inputs: Inputs) -> Sequence[float | None]:
    return precision_recall(_real(inputs).all(), inputs.drawn.all(), inputs.k)


def _density_coverage(inputs: Inputs) -> Sequence[float | None]:
    return density_coverage(_real(inputs).all(), inputs.drawn.all(), inputs.k)


def _diversity(inputs: Inputs) -> list[float | None]:
    """Relative to that of the real images."""
    real = diversity(_real(inputs).all(), None if inputs.labels is None else inputs.real_labels)
    return [diversity(inputs.drawn.all(), inputs.labels) / real]


def _inception_score(inputs: Inputs) -> Sequence[float | None]:
    return inception_score(inputs.drawn.all())


def _vendi(inputs: Inputs) -> list[float | None]:
    return [vendi_score(inputs.drawn.all())]


def _mean(inputs: Inputs) -> list[float | None]:
    mean = float(torch.cat([part.double() for part in inputs.drawn.parts()]).nanmean())
    return [None if math.isnan(mean) else mean]


def _root_mean_square(inputs: Inputs) -> list[float | None]:
    square = float(torch.cat([part.double() for part in inputs.drawn.parts()]).square().nanmean())
    return [None if math.isnan(square) else square**0.5]


def _resampled_mean(inputs: Inputs, replicates: int) -> Tensor:
    means = bootstrap_mean(inputs.drawn.all(), replicates)
    return means[means.isfinite()]  # where few images have a value, a replicate may have none


_WITH_DEVIATION = ("{name}", "{name} +-")

METRICS: dict[str, Metric] = {
    metric.kind: metric
    for metric in (
        Metric("frechet", _frechet, needs="statistics", least=2, resample=_resampled_frechet, centred=True),
        Metric("kernel", _kernel, needs="images", least=2, scale=1000),
        Metric(
            "kid", _kid, needs="images", least=KID_SIZE, why_least="its subsets are of", scale=1000,
            columns=_WITH_DEVIATION,
        ),
        Metric("cmmd", _cmmd, needs="images"),
        Metric("precision_recall", _precision_recall, needs="images", columns=("precision", "recall")),
        Metric("density_coverage", _density_coverage, needs="images", columns=("density", "coverage")),
        Metric("diversity", _diversity, needs="images", least=2),
        Metric("inception_score", _inception_score, reads="logits", columns=_WITH_DEVIATION),
        Metric("vendi", _vendi),
        Metric("mean", _mean, reads="", resample=_resampled_mean),
        Metric("root_mean_square", _root_mean_square, reads=""),
    )
}  # fmt: skip
