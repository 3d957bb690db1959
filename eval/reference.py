"""What images are compared with: real images as the measures see them, or a file of their statistics.

A reference is measured once and kept in a cache by what it depends on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffdistill.data.arrays import check_expansion, holds_arrays
from diffdistill.data.files import walk
from diffdistill.data.images import Data, open_data
from diffdistill.data.processes import Processes
from diffdistill.data.texts import printable
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError
from diffdistill.eval.features.measure import FittedMeasure, Measure
from diffdistill.eval.measurements import Measurements, make_measurements, measured, prepared
from diffdistill.eval.metrics.moments import Statistics
from diffdistill.eval.protocol import Protocol, ProtocolMetric, data_path, digest
from diffdistill.files import atomic_write, cache_folder
from diffdistill.pictures import as_bytes

LEAST = 10
MANY = 5000  # images, whose measuring shows its progress
FITTED = 5000  # images that a measure is fitted to ..
MOST_BYTES = 16 * 10**9  # .. which are in memory together: fewer, where they are large
FORMAT = "diffdistill reference"


@dataclass(frozen=True)
class Reference:
    """Real images as the measures see them; of a file of statistics, mean and covariance alone."""

    name: str
    about: str  #: for people
    measurements: Measurements | None
    known: dict[str, Statistics] = field(default_factory=dict)  #: of columns

    def statistics(self, column: str) -> Statistics:
        """Mean and covariance of a column; UserError if the reference has none of it."""
        if column not in self.known:
            if self.measurements is None:
                raise UserError(f"reference: {self.name} holds no statistics of {column}; give the images themselves")
            self.known[column] = self.measurements.column(column).statistics()
        return self.known[column]

    def column(self, name: str) -> ReferenceColumn:
        """A column as metrics read it."""
        return ReferenceColumn(self, name)

    def lacks(self, metric: ProtocolMetric) -> str | None:
        """Why the metric cannot be computed against this reference, or None."""
        if self.measurements is not None or not metric.metric.compares:
            return None
        if metric.metric.needs == "images":
            return f"{self.name} holds statistics alone, and it needs the images"
        return None if metric.reads in self.known else f"{self.name} holds no statistics of {metric.reads}"

    @property
    def count(self) -> int:
        """Number of real images."""
        return len(self.measurements) if self.measurements else max(s.n for s in self.known.values())


@dataclass(frozen=True)
class ReferenceColumn:
    """A column of a reference; of a file of statistics these alone."""

    reference: Reference
    name: str

    def parts(self) -> Iterator[Tensor]:
        """All rows as one block."""
        return iter([self.all()])

    def all(self) -> Tensor:
        """All rows; UserError where there are statistics alone."""
        if self.reference.measurements is None:
            problem = "holds statistics alone, and this metric needs images; give those"
            raise UserError(f"reference: {self.reference.name} {problem}")
        return self.reference.measurements.column(self.name).all()

    def statistics(self) -> Statistics:
        """Mean and covariance."""
        return self.reference.statistics(self.name)


def open_reference(
    protocol: Protocol, spec: str | None, measures: Sequence[Measure], processes: Processes, data: Data | None = None
) -> tuple[Reference, Data | None, list[Measure]]:
    """The reference, its images if it has any, and the measures, fitted where one is made of the real images.

    `spec` names real images or a file of statistics (default: the protocol's own); `data` are images that are open
    already, of that name. UserError where the reference is missing or of another kind or size.
    """
    spec = spec or (_own_reference(protocol) if data is None else data.name)
    path = Path(spec)
    if data is None:
        if path.is_file() and path.suffix.lower() in (".npz", ".safetensors"):
            statistics = statistics_of_file(path, protocol, measures)
            if statistics is not None:
                key = next((m.key for m in measures if isinstance(m, FittedMeasure)), None)
                if key is not None:
                    raise UserError(f"reference: {spec} holds statistics alone, and {key!r} is made of images")
                return Reference(path.name, f"statistics of {path.name}", None, statistics), None, list(measures)
        data = _open_images(spec, protocol)
    _check_images(data, spec, protocol)
    fitted = [_fitted(m, data, spec, protocol, processes) if isinstance(m, FittedMeasure) else m for m in measures]
    unconditional = [m for m in fitted if not m.conditional]
    return _measured_images(data, spec, protocol, unconditional, processes), data, fitted


def _fitted(m: FittedMeasure, data: Data, spec: str, protocol: Protocol, processes: Processes) -> Measure:
    """The measure fitted to images that are spread evenly over the data; from the cache if it was before."""
    file = _folder_of(_identity(data, spec, protocol) | {"fitted": m.fingerprint}) / "fitted.safetensors"
    if not file.is_file() and processes.rank == 0:
        count = min(len(data), FITTED, max(LEAST, MOST_BYTES // math.prod(protocol.shape)))
        parts = (torch.arange(count) * len(data) // count).split(50)
        images = torch.cat([_as_measured(data.get(rows).images, spec, protocol) for rows in parts])
        state = m.fit(images, processes.device).state_dict()
        atomic_write(file, save({name: value.cpu().contiguous() for name, value in state.items()}))
    processes.wait()
    return m.load(load_file(file), processes.device)


def _own_reference(protocol: Protocol) -> str:
    """The protocol's own real images; UserError, which says what to fetch, if they are not there."""
    spec = str(protocol.reference)
    if spec == "digits":
        return spec
    path = data_path(spec.partition("#")[0])
    if not path.exists():
        remedy = f"fetch {protocol.fetch}" if protocol.fetch else "give --reference"
        raise UserError(f"reference: {path} is not there; {remedy}; or say with --reference where it is")
    return str(data_path(spec))


def _open_images(spec: str, protocol: Protocol) -> Data:
    """Real images; where they differ in size, their middle squares are brought to the protocol's by its filter."""
    if protocol.frames:
        return open_videos(spec, frames=protocol.frames, size=protocol.pixels)
    try:
        return open_data(spec, channels=protocol.channels)
    except UserError as error:
        if "--resolution" not in str(error):
            raise UserError(re.sub("^data:", "reference:", str(error))) from None
        if protocol.resize is None:
            kinds = f"{spec} has images of several sizes, and {protocol.name} takes them as they are"
            raise UserError(f"reference: {kinds}; give those of {protocol.resolution} pixels") from None
        return open_data(spec, channels=protocol.channels, resolution=protocol.pixels, resample=protocol.resize)


def _check_images(data: Data, spec: str, protocol: Protocol) -> None:
    height, width = protocol.pixels
    if data.shape[-2:] != (height, width) and protocol.resize is None:
        size = f"{data.shape[-1]}x{data.shape[-2]}"
        raise UserError(
            f"reference: images of {spec} are {size} and the protocol's {width}x{height}; give those of that size"
        )
    if len(data) < LEAST:
        raise UserError(f"reference: {spec} has {len(data)} images; give {LEAST} or more")


def _measured_images(
    data: Data, spec: str, protocol: Protocol, measures: Sequence[Measure], processes: Processes
) -> Reference:
    """The images through the measures, from the cache as far as they are there."""
    settings = _identity(data, spec, protocol) | {
        "shard_size": 1000,
        "device": processes.device.type,
        "measures": {m.key: m.fingerprint for m in measures},
    }
    folder = _folder_of(settings)

    def produce(indices: range) -> dict[str, Tensor]:
        samples = data.get(torch.tensor(indices))
        return measured(_as_measured(samples.images, spec, protocol), measures, None, samples.labels)

    about = f"{len(data)} images of {data.name}"
    cached = folder / "statistics.safetensors"
    comparing = [m for m in protocol.metrics if m.metric.compares]
    if cached.is_file() and all(m.metric.needs == "statistics" for m in comparing):
        known = statistics_of_file(cached, protocol, measures) or {}
        if all(m.reads in known for m in comparing):
            return Reference(data.name, about, None, known)
    quiet = len(data) < MANY
    measurements = make_measurements(folder, settings, {"data": data.name}, 50, produce, processes, quiet)
    reference = Reference(data.name, about, measurements)
    if processes.rank == 0 and any(m.metric.needs == "statistics" for m in comparing):
        save_reference(cached, reference, protocol, measures)
    return reference


def _identity(data: Data, spec: str, protocol: Protocol) -> dict[str, Any]:
    """What real images as they are measured depend on."""
    return {
        "fingerprint": data.fingerprint,
        "files": _files(Path(spec.partition("#")[0])),
        "shape": list(protocol.shape),
        "count": len(data),
        "resize": protocol.resize,
        "eight_bit": protocol.eight_bit,
    }


def _folder_of(settings: dict[str, Any]) -> Path:
    """The folder of the cache for these settings, made if it is not there."""
    folder = cache_folder() / "references" / digest(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"reference: {folder.parent} cannot be written ({error.strerror}); name another folder by "
            "$DIFFDISTILL_CACHE"
        ) from None
    return folder


def _as_measured(images: Tensor, spec: str, protocol: Protocol) -> Tensor:
    return prepared(as_bytes(images) if protocol.eight_bit else images, protocol, spec, crop=True)


def _files(path: Path) -> str | None:
    """What tells whether files of images have changed since, without reading them; None of what is on a hub."""
    if path.is_file():
        return digest([path.stat().st_size, path.stat().st_mtime_ns])
    if not path.is_dir():
        return None
    held = [*(p.name for p in path.glob("metadata.*")), *(p.name for p in path.glob("*.tar")), *walk(path)]
    states = [(name, (path / name).stat()) for name in held if (path / name).is_file()]
    return digest(sorted((printable(name), state.st_size, state.st_mtime_ns) for name, state in states))


def statistics_of_file(path: Path, protocol: Protocol, measures: Sequence[Measure]) -> dict[str, Statistics] | None:
    """Statistics of our own .safetensors, or `mu` and `sigma` of the usual .npz; None if the file holds images."""
    return (
        _usual_statistics(path, protocol)
        if path.suffix.lower() == ".npz"
        else _own_statistics(path, protocol, measures)
    )


def _usual_statistics(path: Path, protocol: Protocol) -> dict[str, Statistics] | None:
    reads = {metric.reads for metric in protocol.metrics}
    try:
        if "inception.features" not in reads and holds_arrays(path):
            return None  # images with statistics that the protocol has no use for
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.keys()):
                return None
            for key in ("mu", "sigma"):
                check_expansion(path, key, "reference")
            arrays = [file[key] for key in ("mu", "sigma")]
            if any(array.dtype.kind not in "fiu" for array in arrays):
                raise ValueError("mu and sigma are no real numbers")
            mean, cov = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many unrelated types
        raise UserError(f"reference: {path} cannot be read ({error})") from None
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
        raise UserError(f"reference: mu and sigma of {path} have the shapes {shapes}; give (D,) and (D, D)")
    if len(mean) != 2048:
        raise UserError(f"reference: {path} is of {len(mean)} features, and Inception's are 2048; give its statistics")
    if not bool(mean.isfinite().all() and cov.isfinite().all()):
        raise UserError(f"reference: mu and sigma of {path} are not finite; make the file anew")
    return {"inception.features": Statistics(len(mean) + 1, mean, cov)}  # how many images it does not say


def _own_statistics(path: Path, protocol: Protocol, measures: Sequence[Measure]) -> dict[str, Statistics] | None:
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"reference: {path} is not a whole safetensors file ({error})") from None
    kind = _image_kind(protocol)
    if metadata.get("images") != kind:
        held = metadata.get("images")
        raise UserError(f"reference: {path} is of images {held}, and the protocol's are {kind}; make it anew")
    fingerprints, count = _checked(path, metadata, tensors)
    for m in measures:
        if m.key in fingerprints and fingerprints[m.key] != m.fingerprint:
            made = f"made with {fingerprints[m.key]} of {m.key}, and this one is {m.fingerprint} ({m.name})"
            raise UserError(f"reference: {path} was {made}; make it anew from the images")
    columns = {key.removesuffix(".mean") for key in tensors if key.endswith(".mean")}
    return {c: Statistics(count, tensors[f"{c}.mean"], tensors[f"{c}.cov"]) for c in columns}


def _checked(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict[str, str], int]:
    """The fingerprints of measures and the count of images in a file of ours; UserError if it is not one."""
    try:
        fingerprints, count = json.loads(metadata["measures"]), int(metadata["count"])
        whole = isinstance(fingerprints, dict) and count > 0
        for key, mean in tensors.items():
            if key.endswith(".mean"):
                cov = tensors[f"{key.removesuffix('.mean')}.cov"]
                whole = whole and mean.ndim == 1 and cov.shape == (len(mean), len(mean))
                whole = whole and mean.is_floating_point() and bool(mean.isfinite().all() and cov.isfinite().all())
    except (KeyError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"reference: {path} is no whole file of statistics; make it anew with --save-reference")
    return fingerprints, count


def _image_kind(protocol: Protocol) -> str:
    rounding = "" if protocol.eight_bit else " unrounded"
    return f"{'x'.join(map(str, protocol.shape))} {protocol.resize}{rounding}"


def save_reference(path: Path, reference: Reference, protocol: Protocol, measures: Sequence[Measure]) -> Path:
    """Mean and covariance as a file to carry about, with the fingerprints of data, network and preprocessing."""
    metrics = [m for m in protocol.metrics if m.metric.needs == "statistics" and reference.lacks(m) is None]
    if not metrics:
        raise UserError(f"save_reference: no metric of {protocol.name} reads statistics of the real images")
    statistics = {m.reads: reference.statistics(m.reads) for m in metrics}
    tensors = {f"{c}.mean": s.mean for c, s in statistics.items()} | {f"{c}.cov": s.cov for c, s in statistics.items()}
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "data": reference.name,
        "count": str(max(s.n for s in statistics.values())),
        "images": _image_kind(protocol),
        "measures": json.dumps({m.key: m.fingerprint for m in measures}),
    }
    return atomic_write(path, save(tensors, metadata))
