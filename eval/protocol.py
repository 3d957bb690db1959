"""Protocols: what is drawn, what it is compared with and how it is measured, each a small file in protocols/.

`diffdistill eval DIR --protocol NAME` follows one; NAME may also be a YAML file of your own with the same fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.eval.metrics.registry import Metric, find_metric
from diffdistill.options import coerce, height_width, nearest, read_yaml


@dataclass(frozen=True)
class ProtocolMetric:
    """One metric that a protocol asks for, of the columns of one measure."""

    name: str
    kind: str
    measure: str
    column: str = ""  #: of the measure; default: the one that the kind reads
    scale: float = 1.0
    k: int = 5

    @property
    def metric(self) -> Metric:
        """The function and its record."""
        return find_metric(self.kind)

    @property
    def reads(self) -> str:
        """The column of measurements, "measure.column"."""
        return f"{self.measure}.{self.column or self.metric.reads}"

    @property
    def columns(self) -> list[str]:
        """Headings of the table."""
        return [column.format(name=self.name) for column in self.metric.columns]


@dataclass(frozen=True)
class Published:
    """A figure of a known model under this protocol, and where it stands."""

    model: str
    metric: str
    value: float
    source: str
    steps: int | None = None


@dataclass(frozen=True)
class Protocol:
    """The fields of a protocol's file."""

    title: str
    conditions: list[str]  #: what the models may take: none, classes, prompts
    count: int
    #: Of the images that are measured: pixels a side, or HEIGHTxWIDTH; 0: as the model has them, so its channels too.
    resolution: int | str
    channels: int
    metrics: list[ProtocolMetric]
    name: str = ""
    seed: int = 0  #: image i is drawn from seed 1000000 * seed + i
    classes: int | None = None
    labels: Literal["balanced", "reference"] = "balanced"  #: class i mod classes, or that of real image i
    frames: int = 0  #: of the videos that are measured; 0: images
    prompts: str | None = (
        None  #: 'shapes', 'edits', 'moving', 'moving-i2v', or a file or data set below the data folder
    )
    reference: str | None = None  #: data as of `open_data`, or a statistics file; below the data folder
    fetch: str = ""  #: where data that are missing come from
    resize: str | None = None  #: images of another size: refused, or brought to `resolution` by this filter
    eight_bit: bool = True  #: images are rounded to 8 bits before they are measured, as published figures are
    batch: int = 50  #: images drawn and measured together, whatever the number of processes
    shard: int = 250  #: images in a file of measurements, which is what an interruption can cost
    published: list[Published] = field(default_factory=list)  #: measured as here; others are left out

    @property
    def is_open(self) -> bool:
        """Whether size, channels, conditions and real images are those of the model that is judged."""
        return self.resolution == 0

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images that are measured."""
        return height_width(self.resolution)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that are measured, (C, F, H, W) of videos."""
        return (self.channels, *((self.frames,) if self.frames else ()), *self.pixels)

    @property
    def measures(self) -> list[str]:
        """Keys of the measures that the metrics read."""
        return list(dict.fromkeys(metric.measure for metric in self.metrics))

    @property
    def needs_reference(self) -> bool:
        """Whether a metric compares with real images, or the classes are theirs."""
        return any(m.metric.compares for m in self.metrics) or self.labels == "reference"


def names() -> list[str]:
    """The protocols that are shipped."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def _folder() -> Any:
    return files("diffdistill.eval").joinpath("protocols")


def load(name: str, **overrides: Any) -> Protocol:
    """The protocol of that name or file, with other values where they are not None; UserError if a field is wrong."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in names():
        path = Path(str(_folder().joinpath(f"{name}.yaml")))
    else:
        raise UserError(f"protocol: {name!r} is not known; {nearest(name, names())}, or give a .yaml file")
    values = read_yaml(str(path))
    for field_name in ("conditions", "metrics", "published"):
        if not isinstance(values.get(field_name, []), list):
            raise UserError(f"{path.name}: {field_name}: {values[field_name]!r} is no list")
    values["metrics"] = [_build(ProtocolMetric, m, f"{path.name}: metrics") for m in values.get("metrics") or []]
    values["published"] = [_build(Published, p, f"{path.name}: published") for p in values.get("published") or []]
    changes = {key: value for key, value in overrides.items() if value is not None}
    if any(changes[key] != values.get(key, 0) for key in changes if key != "batch"):
        values["published"] = []  # which are of the protocol as it stands
    values |= changes
    protocol = _build(Protocol, values | {"name": path.stem}, path.name)
    _check(protocol, path.name)
    return protocol


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where}: {values!r} is not a mapping of fields")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: {name!r} is no field; {nearest(str(name), fields)}")
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and values.get(name) is None:
            raise UserError(f"{where}: {name} is missing")
    lists = {n for n, hint in hints.items() if typing.get_origin(hint) is list}  # which `load` and `_check` look at
    plain = {n: v if n in lists else coerce(f"{where}: {n}", v, hints[n], {}) for n, v in values.items()}
    return cls(**plain)


def _check(protocol: Protocol, where: str) -> None:
    for condition in protocol.conditions:
        if condition not in ("none", "classes", "prompts"):
            raise UserError(f"{where}: conditions: {condition!r} is not one of none, classes, prompts")
    if not protocol.metrics:
        raise UserError(f"{where}: metrics: there is none; give at least one")
    for metric in protocol.metrics:
        kind = find_metric(metric.kind, f"{where}: metrics")
        if not (metric.column or kind.reads):
            raise UserError(f"{where}: metrics: {metric.name!r} is a {metric.kind} and names no column")
    if protocol.frames < 0:
        raise UserError(f"{where}: frames: {protocol.frames} is negative; give 0 for images, or the frames of a video")
    if protocol.seed < 0:
        raise UserError(f"{where}: seed: {protocol.seed} is negative; give 0 or more")
    if any(metric.k < 1 for metric in protocol.metrics):
        raise UserError(f"{where}: metrics: k must be 1 or more")
    for name in ("count", "batch", "shard") if protocol.is_open else ("count", "resolution", "batch", "shard"):
        if (min(protocol.pixels) if name == "resolution" else getattr(protocol, name)) < 1:
            raise UserError(f"{where}: {name}: {getattr(protocol, name)} is not 1 or more")
    if protocol.channels not in ((0,) if protocol.is_open else (1, 3)):
        raise UserError(
            f"{where}: channels: {protocol.channels} is "
            + ("not 0, as the resolution is" if protocol.is_open else "neither 1 nor 3")
        )
    if protocol.resize not in (None, "lanczos", "bicubic", "bilinear"):
        raise UserError(f"{where}: resize: {protocol.resize!r} is not one of lanczos, bicubic, bilinear")
    if protocol.is_open:
        return
    if protocol.needs_reference and not protocol.reference:
        raise UserError(f"{where}: reference is missing, and the metrics compare with one")
    if "classes" in protocol.conditions and not protocol.classes:
        raise UserError(f"{where}: classes is missing, the number of them")
    if "prompts" in protocol.conditions and not protocol.prompts:
        raise UserError(f"{where}: prompts is missing, a file of them")


def data_path(name: str) -> Path:
    """Where a protocol's data of that name lie: in $DIFFDISTILL_DATA, else in ./data."""
    return Path(os.environ.get("DIFFDISTILL_DATA", "data")) / name


def digest(value: Any) -> str:
    """16 hex digits of a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
