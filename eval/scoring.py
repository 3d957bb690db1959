"""`diffdistill eval --protocol`: images drawn, measured and judged as a protocol says, whatever interrupts it.

What is kept of an image is what the measures say of it, in checksummed shards: an interrupted evaluation goes on from
the last whole one. Batches are cut by the protocol and not by the number of processes, so that several processes
(`torchrun --nproc_per_node 2 -m diffdistill.commands.cli eval ..`) give the bits of one, as do any number of
interruptions, where each has the same number of threads. Features are read back shard by shard; those of a reference
are kept in a cache by what they depend on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffdistill.data.encoded import all_prompts
from diffdistill.data.images import Data, open_data
from diffdistill.data.shapes import HELD_OUT, draw_many
from diffdistill.data.shards import Kind, make, open_shards, start
from diffdistill.environment import environment
from diffdistill.errors import UserError, first_line
from diffdistill.eval.evaluate import model_folder
from diffdistill.eval.features.networks import Measure, measure, middle
from diffdistill.eval.metrics.attributes import Attributes
from diffdistill.eval.metrics.bootstrap import bootstrap_frechet, bootstrap_mean, interval
from diffdistill.eval.metrics.frechet import frechet_distance
from diffdistill.eval.metrics.kernel import KID_SIZE, cmmd, kernel_distance, kid
from diffdistill.eval.metrics.manifold import density_coverage, precision_recall
from diffdistill.eval.metrics.moments import Moments, Statistics, enough
from diffdistill.eval.metrics.scores import inception_score, vendi_score
from diffdistill.eval.models import Model, Wanted, open_model
from diffdistill.eval.protocol import AGAINST_REFERENCE, Metric, Protocol, data_path, digest
from diffdistill.eval.report import markdown_table, text_table, with_notes, write_json, write_text
from diffdistill.files import atomic_write
from diffdistill.pictures import as_bytes, image_grid, save_png

KIND = Kind("samples", "measured images", "image", "eval --protocol")
LEAST = 10
SHOWN = 20
_FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("lanczos", "bicubic", "bilinear")}


@dataclass(frozen=True)
class Columns:
    """What the measures said of all images, in order; memory-mapped."""

    shards: list[dict[str, Tensor]]

    def parts(self, name: str) -> Iterator[Tensor]:
        return (shard[name] for shard in self.shards)

    def all(self, name: str) -> Tensor:
        return torch.cat(list(self.parts(name)))

    def statistics(self, name: str) -> Statistics:
        """Mean and covariance, in memory that does not grow with the number of images."""
        moments = Moments(self.shards[0][name].shape[1])
        for part in self.parts(name):
            moments.update(part)
        return moments.statistics()


class Processes:
    """This process among those that `torchrun` started, or alone."""

    def __init__(self, device: str) -> None:
        self.rank, self.count, self.state = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
            threads = torch.get_num_threads()
            self.state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
            torch.set_num_threads(threads)  # accelerate chooses its own
            self.rank, self.count = self.state.process_index, self.state.num_processes

    @property
    def device(self) -> torch.device:
        return self.state.device if self.state else torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wait(self) -> None:
        if self.state:
            self.state.wait_for_everyone()


# -- what images are compared with -------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where references are kept: $DIFFDISTILL_CACHE, else ~/.cache/diffdistill."""
    return Path(os.environ.get("DIFFDISTILL_CACHE", Path.home() / ".cache" / "diffdistill"))


class Reference:
    """Real images as the measures see them; of a file of statistics, mean and covariance alone."""

    def __init__(self, name: str, columns: Columns | None, found: dict[str, Statistics], about: str) -> None:
        self.name, self.columns, self._found, self.about = name, columns, found, about

    def statistics(self, column: str) -> Statistics:
        if column not in self._found:
            if self.columns is None:
                raise UserError(f"reference: {self.name} holds no statistics of {column}; give the images themselves")
            self._found[column] = self.columns.statistics(column)
        return self._found[column]

    def lacks(self, metric: Metric) -> str | None:
        """Why the metric cannot be had of it, or None."""
        if self.columns is not None:
            return None
        if metric.kind != "frechet":
            return f"{self.name} holds statistics alone, and it needs the images"
        return None if metric.reads in self._found else f"{self.name} holds no statistics of {metric.reads}"

    @property
    def count(self) -> int:
        known = [statistics.n for statistics in self._found.values()]
        return sum(len(next(iter(s.values()))) for s in self.columns.shards) if self.columns else max(known)

    def all(self, column: str) -> Tensor:
        if self.columns is None:
            raise UserError(f"reference: {self.name} holds statistics alone, and this metric needs images; give those")
        return self.columns.all(column)


def open_reference(
    protocol: Protocol, given: str | None, measures: Sequence[Measure], processes: Processes, device: torch.device
) -> tuple[Reference, Data | None]:
    """The reference and, if it is images, the data. UserError where it is missing or of other kind or size."""
    spec = given or str(protocol.reference)
    if given is None and spec != "digits":
        path = data_path(spec.partition("#")[0])
        if not path.exists():
            told = f"fetch {protocol.fetch}" if protocol.fetch else "give --reference"
            raise UserError(f"reference: {path} is not there; {told}; or say with --reference where it is")
        spec = str(data_path(spec))
    path = Path(spec)
    if path.is_file() and path.suffix in (".npz", ".safetensors"):
        found = _statistics_file(path, protocol, measures)
        if found is not None:
            return Reference(path.name, None, found, f"statistics of {path.name}"), None
    data = _open_images(spec, protocol)
    if data.shape[1:] != (protocol.resolution,) * 2 and protocol.resize is None:
        size = f"{data.shape[2]}x{data.shape[1]}"
        want = f"{protocol.resolution}x{protocol.resolution}"
        raise UserError(f"reference: images of {spec} are {size} and the protocol's {want}; give those of that size")
    if len(data) < LEAST:
        raise UserError(f"reference: {spec} has {len(data)} images; give {LEAST} or more")
    settings = {
        "fingerprint": data.fingerprint,
        "files": _files(Path(spec.partition("#")[0])),
        "shape": [protocol.channels, protocol.resolution, protocol.resolution],
        "count": len(data),
        "shard_size": 1000,
        "device": str(torch.device(device).type),
        "resize": protocol.resize,
        "measures": {m.key: m.fingerprint for m in measures if m.key not in PROMPTED},
    }
    out = cache_folder() / "references" / digest(settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"reference: {out.parent} cannot be written ({error.strerror}); name another folder by $DIFFDISTILL_CACHE"
        ) from None
    seen = [m for m in measures if m.key not in PROMPTED]

    def produce(indices: range) -> dict[str, Tensor]:
        samples = data.get(torch.tensor(indices))
        return measured(_sized(as_bytes(samples.images), protocol, spec, crop=True), seen, None, samples.labels)

    about = f"{len(data)} images of {data.name}"
    kept = out / "statistics.safetensors"
    if kept.is_file() and all(m.kind == "frechet" for m in protocol.metrics if m.kind in AGAINST_REFERENCE):
        found = _statistics_file(kept, protocol, measures) or {}
        if all(m.reads in found for m in protocol.metrics if m.kind == "frechet"):
            return Reference(data.name, None, found, about), data
    reference = Reference(data.name, _columns(out, settings, {"data": data.name}, 50, produce, processes), {}, about)
    if processes.rank == 0 and any(m.kind == "frechet" for m in protocol.metrics):
        save_reference(kept, reference, protocol, measures)
    return reference, data


def _files(path: Path) -> str | None:
    """What tells whether files of images have changed since, without reading them; None of what is on a hub."""
    if path.is_file():
        return digest([path.stat().st_size, path.stat().st_mtime_ns])
    if not path.is_dir():
        return None
    told = sorted((str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*"))
    return digest(told)


PROMPTED = ("clip-score", "attributes", "lpips")
"""Measures that say nothing of real images without a caption, or of images in order."""


def _open_images(spec: str, protocol: Protocol) -> Data:
    """Real images; where they differ in size, their middle squares are brought to the protocol's by its filter."""
    try:
        return open_data(spec, channels=protocol.channels)
    except UserError as error:
        if "--resolution" not in str(error):
            raise
        if protocol.resize is None:
            told = f"{spec} has images of several sizes, and {protocol.name} takes them as they are"
            raise UserError(f"reference: {told}; give those of {protocol.resolution} pixels") from None
        return open_data(spec, channels=protocol.channels, resolution=protocol.resolution, resample=protocol.resize)


def _statistics_file(path: Path, protocol: Protocol, measures: Sequence[Measure]) -> dict[str, Statistics] | None:
    """Statistics of our own .safetensors, or `mu` and `sigma` of the usual .npz; None if the file holds images."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                if not {"mu", "sigma"} <= set(file.keys()):
                    return None
                mean, cov = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
        except Exception as error:  # zipfile and numpy raise many unrelated types
            raise UserError(f"reference: {path} cannot be read ({error})") from None
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise UserError(f"reference: mu and sigma of {path} have the shapes {shapes}; give (D,) and (D, D)")
        if len(mean) != 2048:
            raise UserError(
                f"reference: {path} is of {len(mean)} features, and Inception's are 2048; give its statistics"
            )
        return {"inception.features": Statistics(len(mean) + 1, mean, cov)}  # how many images it does not say
    try:
        with safe_open(path, "pt") as opened:
            told = opened.metadata() or {}
            if told.get("format") != "diffdistill reference":
                return None
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"reference: {path} is not a whole safetensors file ({error})") from None
    want = f"{protocol.channels}x{protocol.resolution}x{protocol.resolution} {protocol.resize}"
    if told["images"] != want:
        raise UserError(f"reference: {path} is of images {told['images']}, and the protocol's are {want}")
    fingerprints = json.loads(told["measures"])
    for m in measures:
        if m.key in fingerprints and fingerprints[m.key] != m.fingerprint:
            made = f"made with {fingerprints[m.key]} of {m.key}, and this one is {m.fingerprint} ({m.name})"
            raise UserError(f"reference: {path} was {made}; make it anew from the images")
    columns = {key.removesuffix(".mean") for key in tensors if key.endswith(".mean")}
    return {c: Statistics(int(told["count"]), tensors[f"{c}.mean"], tensors[f"{c}.cov"]) for c in columns}


def save_reference(path: Path, reference: Reference, protocol: Protocol, measures: Sequence[Measure]) -> Path:
    """Mean and covariance as a file to carry about, with the fingerprints of data, network and preprocessing."""
    used = [m for m in protocol.metrics if m.kind == "frechet" and reference.lacks(m) is None]
    found = {m.reads: reference.statistics(m.reads) for m in used}
    tensors = {f"{c}.mean": s.mean for c, s in found.items()} | {f"{c}.cov": s.cov for c, s in found.items()}
    told = {
        "format": "diffdistill reference",
        "data": reference.name,
        "count": str(max(s.n for s in found.values())),
        "images": f"{protocol.channels}x{protocol.resolution}x{protocol.resolution} {protocol.resize}",
        "measures": json.dumps({m.key: m.fingerprint for m in measures}),
    }
    return atomic_write(path, save(tensors, told))


# -- drawing and measuring ---------------------------------------------------------------------------------


def measured(
    images: Tensor, measures: Sequence[Measure], captions: Sequence[str] | None, labels: Tensor | None
) -> dict[str, Tensor]:
    return {f"{m.key}.{name}": column for m in measures for name, column in m(images, captions, labels).items()}


def _sized(images: Tensor, protocol: Protocol, whose: str, crop: bool = False) -> Tensor:
    """Images of the protocol's channels and size, uint8; UserError where they are of others and may not be resized.

    crop: of images that are not square, the middle.
    """
    channels, side = protocol.channels, protocol.resolution
    if images.shape[1] != channels:
        kinds = {1: "grey", 3: "RGB"}
        found = kinds.get(images.shape[1], f"of {images.shape[1]} channels")
        raise UserError(f"eval: the images of {whose} are {found} and the protocol's {kinds[channels]}")
    if tuple(images.shape[2:]) == (side, side):
        return images
    size = f"{images.shape[3]}x{images.shape[2]}"
    if protocol.resize is None:
        raise UserError(f"eval: the images of {whose} are {size} and the protocol's {side}x{side}, without resizing")
    if crop:
        images = middle(images, min(images.shape[2:]))
    if images.shape[2] != images.shape[3]:
        raise UserError(f"eval: the images of {whose} are {size}; the protocol resizes square ones to {side}x{side}")
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
    small = [np.asarray(p.resize((side, side), _FILTERS[protocol.resize])) for p in pictures]
    return torch.from_numpy(np.stack(small)).reshape(len(small), side, side, channels).permute(0, 3, 1, 2).contiguous()


def _columns(
    out: Path, settings: dict[str, Any], told: dict[str, Any], batch: int,
    produce: Callable[[range], dict[str, Tensor]], processes: Processes,
) -> Columns:  # fmt: skip
    if processes.rank == 0:
        start(KIND, out, settings, told)
    processes.wait()
    index = start(KIND, out, settings, told)
    with torch.inference_mode():
        make(KIND, out, index, batch, produce, processes.rank, processes.count)
    processes.wait()
    return Columns(open_shards(KIND, out)[1])


@dataclass(frozen=True)
class Asked:
    """A protocol, and what is asked besides."""

    protocol: Protocol
    wanted: Wanted
    reference: str | None = None
    prompts: str | None = None
    weights: dict[str, str] | None = None
    bootstrap: int | None = None
    device: str = "auto"
    save_reference: str | None = None


def _measure(key: str, device: torch.device, weights: dict[str, str] | None) -> Measure:
    return Attributes() if key == Attributes.key else measure(key, device, weights)


class Setting:
    """What all models of one evaluation share: the measures, the reference, classes and captions by index."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.protocol = asked, asked.protocol
        self.processes = Processes(asked.device)
        self.device = torch.device("cpu") if asked.device == "cpu" else self.processes.device
        self.wanted = replace(asked.wanted, device=self.device)
        self.captions = self._captions()
        for key in asked.weights or {}:
            if key not in self.protocol.measures:
                told = f"{key!r} is no measure of {self.protocol.name}"
                raise UserError(f"weights: {told}; they are {', '.join(self.protocol.measures)}")
        self.measures = [_measure(key, self.device, asked.weights) for key in self.protocol.measures]
        self.reference: Reference | None = None
        self.real: Data | None = None
        if self.protocol.needs_reference:
            opened = open_reference(self.protocol, asked.reference, self.measures, self.processes, self.device)
            self.reference, self.real = opened
        elif asked.reference:
            raise UserError(f"reference: the metrics of {self.protocol.name} compare with none")

    def _captions(self) -> list[str] | None:
        protocol, given = self.protocol, self.asked.prompts
        if "prompts" not in protocol.conditions:
            if given:
                raise UserError(
                    f"prompts: the protocol {protocol.name} has none; its conditions: {protocol.conditions}"
                )
            return None
        if given is None and protocol.prompts == "shapes":
            return draw_many(HELD_OUT, protocol.count)[1]
        path = Path(given) if given else data_path(str(protocol.prompts))
        if not path.exists():
            told = f"fetch {protocol.fetch}" if protocol.fetch else "make it, a prompt a line"
            raise UserError(f"prompts: {path} is not there; {told}; or say with --prompts where it is")
        found = all_prompts(str(path))
        if len(found) < protocol.count:
            told = f"{path} has {len(found)} prompts and the protocol takes {protocol.count}"
            raise UserError(f"prompts: {told}; give more, or --count {len(found)}")
        return found[: protocol.count]

    def labels(self, model: Model) -> Tensor | None:
        """Classes (count,) of the images."""
        protocol = self.protocol
        if model.conditions != "classes":
            return None
        if protocol.labels == "balanced":
            return torch.arange(protocol.count) % int(protocol.classes or 1)
        real = None
        if self.real is not None:
            real = self.real.get(torch.arange(min(protocol.count, len(self.real)))).labels
        if real is None:
            raise UserError(f"reference: {protocol.name} takes its classes from the real images, and these have none")
        return real[torch.arange(protocol.count) % len(real)]

    def given(self, labels: Tensor | None, indices: Sequence[int]) -> tuple[Tensor | None, list[str] | None]:
        """Classes and captions of the images at those indices."""
        captions = None if self.captions is None else [self.captions[i] for i in indices]
        return None if labels is None else labels[list(indices)], captions

    def check(self, model: Model) -> None:
        """UserError unless the model is one that the protocol can judge."""
        protocol = self.protocol
        if model.conditions == "images":
            if model.count is not None and model.count < protocol.count:
                told = f"{model.name} has {model.count} images and {protocol.name} takes {protocol.count}"
                raise UserError(f"eval: {told}; give more, or --count {model.count}")
            return
        if model.conditions not in protocol.conditions:
            takes = {"none": "no conditions", "classes": "class labels"}.get(model.conditions, model.conditions)
            told = f"{model.name} takes {takes}, and the protocol {protocol.name} {' or '.join(protocol.conditions)}"
            raise UserError(f"eval: {told}; give a pipeline that does")
        if model.classes is not None and protocol.classes is not None and model.classes != protocol.classes:
            told = f"{model.name} has {model.classes} classes and the protocol {protocol.name} {protocol.classes}"
            raise UserError(f"eval: {told}; give a pipeline of those")


@dataclass(frozen=True)
class Score:
    """A model's row: values by the names of the metrics, and intervals with their replicates where there are some."""

    model: str
    steps: int | None
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, Tensor]
    shown: Tensor | None
    missing: dict[str, str]  #: why a metric has no value

    @property
    def row(self) -> dict[str, Any]:
        return {"model": self.model, "steps": self.steps, **self.values}


def score(model: Model, setting: Setting, into: Path) -> Score:
    """Draw, measure and judge one model; what is in its folder already is not done again."""
    asked, protocol, processes = setting.asked, setting.protocol, setting.processes
    setting.check(model)
    labels = setting.labels(model)
    settings = {
        "fingerprint": model.fingerprint,
        "shape": [protocol.channels, protocol.resolution, protocol.resolution],
        "count": protocol.count,
        "shard_size": protocol.shard,
        "batch": protocol.batch,
        "seed": protocol.seed,
        "call": model.call,
        "dtype": asked.wanted.dtype,
        "attention": asked.wanted.attention,
        "resize": protocol.resize,
        "classes": None if labels is None else digest(labels.tolist()),
        "prompts": None if setting.captions is None else digest(setting.captions),
        "measures": {m.key: m.fingerprint for m in setting.measures},
        "device": setting.device.type,
        "threads": torch.get_num_threads() if setting.device.type == "cpu" else None,
    }

    def images(indices: Sequence[int]) -> Tensor:
        return _sized(model.draw(indices, protocol.seed, *setting.given(labels, indices)), protocol, model.name)

    def produce(indices: range) -> dict[str, Tensor]:
        classes, texts = setting.given(labels, indices)
        return measured(images(indices), setting.measures, texts, classes)

    missing = _check_first(model, setting, produce)
    columns = _columns(into / "measured", settings, {"model": model.name}, protocol.batch, produce, processes)
    values: dict[str, float | None] = {}
    replicates: dict[str, Tensor] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if processes.rank > 0:
        return Score(model.name, model.steps, values, intervals, replicates, None, missing)
    for metric in protocol.metrics:
        if metric.name in missing:
            values[metric.name] = None
            continue
        try:
            values |= judged(metric, columns, setting.reference)
            found = bootstrapped(metric, columns, setting.reference, asked.bootstrap, values.get(metric.name))
            if found is not None:
                # Replicates of a Fréchet distance are too large by their own small-sample bias.
                around = values[metric.name] if metric.kind == "frechet" else None
                replicates[metric.name], intervals[metric.name] = found, interval(found, around)
        except ValueError as error:  # of too few images, or features that are not finite
            values[metric.name], missing[metric.name] = None, str(error)
            continue
        if values.get(metric.name, 0) is None:
            missing[metric.name] = "no image has one"
    batches = torch.arange(min(SHOWN, protocol.count)).split(protocol.batch)
    with torch.inference_mode():
        shown = torch.cat([images(batch.tolist()) for batch in batches])
    return Score(model.name, model.steps, values, intervals, replicates, shown.float() / 127.5 - 1, missing)


def _check_first(model: Model, setting: Setting, produce: Callable[[range], dict[str, Tensor]]) -> dict[str, str]:
    """Draws and measures the first image, so that what fails does so before the rest; metrics that cannot be had."""
    protocol, reference = setting.protocol, setting.reference
    try:
        with torch.inference_mode():
            found = produce(range(1))
    except (UserError, KeyboardInterrupt, OSError):
        raise
    except Exception as error:  # whatever an unknown pipeline raises
        raise UserError(
            f"eval: {model.name} cannot be drawn as {protocol.name} wants it ({first_line(error)})"
        ) from error
    missing = {}
    for metric in protocol.metrics:
        if metric.reads not in found and metric.column != "agrees":
            held = ", ".join(sorted(name for name in found if name.startswith(f"{metric.measure}.")))
            raise UserError(f"{protocol.name}: {metric.name} reads {metric.reads}, and there is {held}")
        reason = None
        if metric.reads not in found:
            reason = "nobody says which classes the images were to be of"
        elif metric.kind in AGAINST_REFERENCE and reference is not None:
            reason = reference.lacks(metric)
            few = min(protocol.count, reference.count)
            if reason is None and metric.kind == "kid" and few < KID_SIZE:
                reason = f"its subsets are of {KID_SIZE} images, and there are {few}"
        if reason:
            missing[metric.name] = reason
    if len(missing) == len(protocol.metrics):
        raise UserError(f"{next(iter(missing))}: it cannot be had, {next(iter(missing.values()))}")
    return missing


def default_out(folder: str, protocol: Protocol, wanted: Wanted) -> Path:
    """In the folder of a run or a model; of a hub id or images in runs/eval."""
    own = (model_folder(folder) / "model_index.json").is_file()
    root = Path(folder) / "eval" if own else Path("runs/eval") / Path(folder).name
    parts = [protocol.name]
    if wanted.steps is not None:
        parts.append(f"{wanted.steps}steps")
    if wanted.guidance_scale is not None:
        parts.append(f"guidance{wanted.guidance_scale:g}")
    return root / "-".join(parts)


# -- judging -----------------------------------------------------------------------------------------------


def judged(metric: Metric, columns: Columns, reference: Reference | None) -> dict[str, float | None]:
    """One metric's values by name."""
    name, reads, kind = metric.name, metric.reads, metric.kind
    if kind == "mean":
        mean = float(torch.cat([part.double() for part in columns.parts(reads)]).nanmean())
        return {name: None if math.isnan(mean) else metric.scale * mean}
    if kind == "inception_score":
        mean, std = inception_score(columns.all(reads))
        return {name: mean, f"{name} +-": std}
    if kind == "vendi":
        return {name: vendi_score(columns.all(reads))}
    assert kind in AGAINST_REFERENCE and reference is not None
    if kind == "frechet":
        return {name: frechet_distance(columns.statistics(reads), reference.statistics(reads))}
    real, fake = reference.all(reads), columns.all(reads)
    if kind == "kernel":
        return {name: 1000 * kernel_distance(fake, real)}
    if kind == "kid":
        mean, std = kid(fake, real)
        return {name: 1000 * mean, f"{name} +-": 1000 * std}
    if kind == "cmmd":
        return {name: cmmd(fake, real)}
    if kind == "precision_recall":
        return precision_recall(real, fake, metric.k)._asdict()
    return density_coverage(real, fake, metric.k)._asdict()


REPLICATES = {"narrow": 200, "wide": 20}  # a wide covariance takes seconds a replicate
WIDE = 512


def bootstrapped(
    metric: Metric, columns: Columns, reference: Reference | None, wanted: int | None, value: float | None
) -> Tensor | None:
    """(R,) values of a Fréchet distance or mean over images drawn anew with replacement; None for other metrics.

    Replicate r weighs image i the same for every model.
    """
    if metric.kind not in ("frechet", "mean") or value is None:
        return None
    wide = metric.kind == "frechet" and columns.shards[0][metric.reads].shape[-1] > WIDE
    replicates = wanted if wanted is not None else REPLICATES["wide" if wide else "narrow"]
    if replicates < 2:
        return None
    values = columns.all(metric.reads)
    if metric.kind == "mean":
        means = metric.scale * bootstrap_mean(values, replicates)
        return means[means.isfinite()]  # where few images have a value, a replicate may have none
    assert reference is not None
    return bootstrap_frechet(values, reference.statistics(metric.reads), replicates)


# -- the command -------------------------------------------------------------------------------------------


def evaluate_protocol(folder: str, asked: Asked, out: str | None) -> dict[str, Any] | None:
    """`diffdistill eval DIR --protocol NAME`; returns the report, or None in processes other than the first."""
    setting = Setting(asked)
    into = Path(out) if out else default_out(folder, asked.protocol, asked.wanted)
    found = score(open_model(folder, setting.wanted), setting, into)
    if setting.processes.rank > 0:
        return None
    protocol = asked.protocol
    report = report_of([found], setting)
    write_json(report, into / "results.json")
    rows, columns = report_rows([found], protocol), report_columns([found])
    told = notes([found], setting)
    write_text(with_notes([markdown_table(rows, columns)], told), into / "table.md")
    print(text_table(rows, columns))
    print("\n".join(told))
    if found.shown is not None:
        scale = max(1, 64 // protocol.resolution)
        print(f"pictures: {save_png(image_grid(found.shown, 10, scale), into / 'samples.png')}")
    print(f"table:    {into / 'table.md'}, {into / 'results.json'}")
    if asked.save_reference and setting.reference is not None:
        file = save_reference(Path(asked.save_reference), setting.reference, protocol, setting.measures)
        print(f"reference: {file}")
    return report


def report_columns(scores: Sequence[Score]) -> list[str]:
    return [
        "model",
        "steps",
        *dict.fromkeys(name for found in scores for name in found.row if name not in ("model", "steps")),
    ]


def report_rows(scores: Sequence[Score], protocol: Protocol) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for found in scores:
        rows.append(found.row)
        if found.intervals:
            told = {name: f"{low:.4g} to {high:.4g}" for name, (low, high) in found.intervals.items()}
            rows.append({"model": "  95%", "steps": None, **told})
    rows += [{"model": f"{p.model} (published)", "steps": p.steps, p.metric: p.value} for p in protocol.published]
    return rows


def notes(scores: Sequence[Score], setting: Setting) -> list[str]:
    """What a reader must know of the numbers: images, networks, resizing and rounding, reference, bias."""
    protocol, reference = setting.protocol, setting.reference
    lines = [f"{protocol.name}: {protocol.title}", f"{protocol.count} images of seed {protocol.seed}, 8 bit"]
    if protocol.resize:
        lines[-1] += f", other sizes brought to {protocol.resolution} by {protocol.resize}"
    if reference is not None:
        lines.append(f"against {reference.about}")
    for m in setting.measures:
        used = ", ".join(metric.name for metric in protocol.metrics if metric.measure == m.key)
        lines.append(f"{used}: {m.name}")
    for metric in protocol.metrics:
        if metric.kind == "frechet" and reference is not None and reference.lacks(metric) is None:
            width = len(reference.statistics(metric.reads).mean)
            told = enough(min(protocol.count, reference.count), width)
            lines += [f"{metric.name}: {told}"] if told else []
    lines += dict.fromkeys(f"{name}: none, {why}" for found in scores for name, why in found.missing.items())
    lines += [f"published {p.metric} of {p.model}: {p.source}" for p in protocol.published]
    return lines


def report_of(scores: Sequence[Score], setting: Setting) -> dict[str, Any]:
    protocol = setting.protocol
    return {
        "protocol": protocol.name,
        "title": protocol.title,
        "count": protocol.count,
        "seed": protocol.seed,
        "metrics": {m.name: next(n.name for n in setting.measures if n.key == m.measure) for m in protocol.metrics},
        "reference": None if setting.reference is None else setting.reference.about,
        "rows": [{**found.row, "intervals": {k: list(v) for k, v in found.intervals.items()}} for found in scores],
        "published": [asdict(p) for p in protocol.published],
        "notes": notes(scores, setting),
        "environment": environment(),
    }
