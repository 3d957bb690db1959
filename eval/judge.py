"""The judge: models are drawn, measured and judged as a protocol says.

`eval`, `compare`, the ladder of a teacher's steps and the scoreboard are loops over `score`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.images import Data, open_edits
from diffdistill.data.moving import draw_moving, open_moving
from diffdistill.data.processes import Processes
from diffdistill.data.progress import speaking
from diffdistill.data.prompts import all_prompts
from diffdistill.data.shapes import HELD_OUT, caption, draw_edits, draw_many
from diffdistill.errors import UserError, first_line
from diffdistill.eval.features.measure import Measure, measure
from diffdistill.eval.measurements import Measurements, make_measurements, measured, prepared
from diffdistill.eval.metrics.bootstrap import interval
from diffdistill.eval.metrics.registry import Inputs
from diffdistill.eval.models import Model, SamplingOptions
from diffdistill.eval.protocol import Protocol, ProtocolMetric, data_path, digest
from diffdistill.eval.reference import Reference, open_reference
from diffdistill.pictures import stills

SHOWN = 20
DRAWN = ("shapes", "edits", "moving", "moving-i2v")  #: what a protocol calls the captions of what is drawn
CHANGED = ("edits", "moving-i2v")  #: those that a model reads images with
REPLICATES = {"narrow": 200, "wide": 20}  # a wide covariance takes seconds a replicate
WIDE = 512


@dataclass(frozen=True)
class JudgeOptions:
    """A protocol, and what may be chosen beside it."""

    protocol: Protocol
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    reference: str | None = None  #: real images or a file of their statistics; default: the protocol's
    data: Data | None = None  #: the real images, where they are open already
    prompts: str | None = None  #: a file; default: the protocol's
    captions: Sequence[str] | None = None  #: of the images, in place of a file of prompts
    conditions: Data | None = None  #: its condition images, in turn, are those that models change
    notes: Sequence[str] = ()  #: what a reader must know of how all this was chosen
    weights: Mapping[str, str] = field(default_factory=dict)  #: of feature networks, by key
    bootstrap: int | None = None  #: replicates of the intervals; 0: none; default: REPLICATES
    device: str = "auto"
    threads: int = 1  #: of the CPU, on which the last bits depend; 0: torch's own choice


def drawn_samples(protocol: Protocol) -> Tensor:
    """What the held-out captions of a protocol of drawn pictures or videos say, (count, ...) in [-1, 1]."""
    if protocol.frames:
        return draw_moving(HELD_OUT, protocol.count, protocol.frames)[0]
    return (draw_edits if protocol.prompts == "edits" else draw_many)(HELD_OUT, protocol.count)[0]


class Judge:
    """What all models of one evaluation share: the measures, the reference, classes and captions by index."""

    def __init__(
        self, options: JudgeOptions, *, data: Data | None = None, measures: Mapping[str, Measure] | None = None
    ) -> None:
        """`data`: the real images, if they are open already; `measures`: by key, in place of the known ones.

        UserError for a protocol that leaves to the model what `eval.choice` completes.
        """
        self.options, self.protocol = options, options.protocol
        if self.protocol.is_open:
            raise UserError(f"protocol: {self.protocol.name} says no resolution; complete it by eval.choice")
        self.processes = Processes(options.device, options.threads)
        self.sampling = replace(options.sampling, device=self.processes.device, eight_bit=options.protocol.eight_bit)
        #: What measures read of each image, where it is not its prompt.
        self.said: list[str] | None = None
        self.changed = options.conditions
        self.captions = self._captions()
        for key in options.weights:
            if key not in self.protocol.measures:
                problem = f"{key!r} is no measure of {self.protocol.name}"
                raise UserError(f"weights: {problem}; they are {', '.join(self.protocol.measures)}")
        own = measures or {}
        self.measures = [
            own[key] if key in own else measure(key, self.device, dict(options.weights))
            for key in self.protocol.measures
        ]
        self.reference: Reference | None = None
        self.real: Data | None = None
        if self.protocol.needs_reference:
            self.reference, self.real, self.measures = open_reference(
                self.protocol, options.reference, self.measures, self.processes, data or options.data
            )
        elif options.reference:
            needless = "has no metric that compares with real images; leave --reference out"
            raise UserError(f"reference: {self.protocol.name} {needless}")

    @property
    def device(self) -> torch.device:
        """Where models and measures are."""
        return self.processes.device

    def with_seed(self, seed: int) -> Judge:
        """The same judge of images from another seed."""
        twin = copy.copy(self)
        twin.protocol = replace(self.protocol, seed=seed)
        return twin

    def _captions(self) -> list[str] | None:
        protocol, file = self.protocol, self.options.prompts
        if "prompts" not in protocol.conditions:
            if file:
                raise UserError(
                    f"prompts: the protocol {protocol.name} takes no prompts; its conditions are "
                    f"{', '.join(protocol.conditions)}; leave --prompts out"
                )
            return None
        if self.options.captions is not None:
            return list(self.options.captions)[: protocol.count]
        if file is None and protocol.prompts == "shapes":
            return draw_many(HELD_OUT, protocol.count)[1]
        if file is None and protocol.prompts == "edits":
            edits = draw_edits(HELD_OUT, protocol.count)
            self.said = [caption(*each) for each in edits.attributes.tolist()]
            self.changed = open_edits("edits", protocol.count, None, 3, HELD_OUT)
            return edits.captions
        if file is None and protocol.prompts in ("moving", "moving-i2v"):
            data = open_moving("moving", protocol.count, protocol.frames, protocol.pixels, True, HELD_OUT)
            if protocol.prompts == "moving-i2v":
                self.changed = data
            return data.get(torch.arange(protocol.count)).captions
        path = Path(file) if file else data_path(str(protocol.prompts))
        if not path.exists():
            remedy = f"fetch {protocol.fetch}" if protocol.fetch else "make it, a prompt a line"
            raise UserError(f"prompts: {path} is not there; {remedy}; or say with --prompts where it is")
        prompts = all_prompts(str(path), keep_blank=True)
        if len(prompts) < protocol.count:
            problem = f"{path} has {len(prompts)} prompts and the protocol takes {protocol.count}"
            raise UserError(f"prompts: {problem}; {_enough(len(prompts))}")
        return prompts[: protocol.count]

    def labels(self, model: Model) -> Tensor | None:
        """Classes (count,) of the images of a model; None of one that takes none."""
        protocol = self.protocol
        if model.conditions != "classes":
            return None
        if protocol.labels == "balanced":
            return torch.arange(protocol.count) % int(protocol.classes or 1)
        real = self.real_labels(protocol.count)
        if real is None:
            raise UserError(
                f"reference: {protocol.name} takes its classes from the real images; give images with labels"
            )
        return real[torch.arange(protocol.count) % len(real)]

    def real_labels(self, count: int | None = None) -> Tensor | None:
        """Classes of the first real images, or of all."""
        if self.real is None:
            return None
        return self.real.get(torch.arange(min(count or len(self.real), len(self.real)))).labels

    def conditions(self, labels: Tensor | None, indices: Sequence[int]) -> tuple[Any, ...]:
        """What a model draws the images at those indices from: classes, captions, and pictures that it changes."""
        captions = None if self.captions is None else [self.captions[i] for i in indices]
        changed = self.changed
        pictures = None if changed is None else changed.get(torch.tensor([i % len(changed) for i in indices]))
        classes = None if labels is None else labels[list(indices)]
        return classes, captions, None if pictures is None else pictures.conditions

    def described(self, indices: Sequence[int]) -> list[str] | None:
        """The captions that measures read."""
        texts = self.said or self.captions
        return None if texts is None else [texts[i] for i in indices]

    def images(self, model: Model, labels: Tensor | None, indices: Sequence[int]) -> Tensor:
        """Images of a model as they are measured."""
        drawn = model.draw(indices, self.protocol.seed, *self.conditions(labels, indices))
        return prepared(drawn, self.protocol, model.name)

    def shown(self, model: Model, count: int = SHOWN) -> Tensor:
        """The first images (n, C, H, W) in [-1, 1], for pictures; of videos all frames of the first."""
        labels, videos = self.labels(model), max(1, count // max(1, self.protocol.frames))
        batches = torch.arange(min(videos, self.protocol.count)).split(self.protocol.batch)
        with torch.inference_mode():
            images = torch.cat([self.images(model, labels, batch.tolist()) for batch in batches])
        return stills(images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images, count)[0]

    def check(self, model: Model) -> None:
        """UserError unless the model is one that the protocol can judge."""
        protocol = self.protocol
        if model.conditions == "images":
            if model.count is not None and model.count < protocol.count:
                problem = f"{model.name} has {model.count} images and {protocol.name} takes {protocol.count}"
                raise UserError(f"eval: {problem}; {_enough(model.count)}")
            return
        if model.conditions not in protocol.conditions:
            takes = {"none": "no conditions", "classes": "class labels"}.get(model.conditions, model.conditions)
            problem = f"{model.name} takes {takes}, and the protocol {protocol.name} {' or '.join(protocol.conditions)}"
            one = "a pipeline that takes captions" if protocol.conditions == ["prompts"] else "a pipeline that does"
            raise UserError(f"eval: {problem}; give {one}")
        if model.reads_image and self.changed is None:
            problem = f"{model.name} changes images, and the protocol {protocol.name} has none to be changed"
            raise UserError(f"eval: {problem}; give images with captions and condition images by --data")
        if self.changed is not None and not (model.reads_image or model.several):
            raise UserError(f"eval: {model.name} reads no image, and {protocol.name} is of images that are changed")
        if model.classes is not None and protocol.classes is not None and model.classes != protocol.classes:
            problem = f"{model.name} has {model.classes} classes and the protocol {protocol.name} {protocol.classes}"
            raise UserError(f"eval: {problem}; give a pipeline of so many")


def _enough(count: int) -> str:
    """What to do where there are only so many images or prompts."""
    return f"give more, or --count {count}" if count > 1 else "give 2 or more"


@dataclass(frozen=True)
class Score:
    """A model's row: values by heading, and intervals with their replicates by the names of metrics that have them."""

    model: str
    steps: int | None
    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    replicates: dict[str, Tensor] = field(default_factory=dict)
    shown: Tensor | None = None  #: (n, C, H, W) in [-1, 1]
    missing: dict[str, str] = field(default_factory=dict)  #: why a metric has no value
    ms_per_image: float | None = None

    @property
    def row(self) -> dict[str, Any]:
        """As tables and JSON hold it."""
        timed = {} if self.ms_per_image is None else {"ms per image": self.ms_per_image}
        return {"model": self.model, "steps": self.steps, **self.values, **timed}


def score(model: Model, judge: Judge, folder: Path, *, quiet: bool = False) -> Score:
    """Draw, measure and judge one model; what is in its folder already is not done again.

    Its milliseconds an image are the median over the batches that were drawn now, None if none was. In processes other
    than the first the score is empty. Raises UserError for a model that the protocol cannot judge.
    """
    judge.check(model)
    labels = judge.labels(model)
    milliseconds: list[float] = []

    def produce(indices: range) -> dict[str, Tensor]:
        classes = None if labels is None else labels[list(indices)]
        started = time.perf_counter()
        images = judge.images(model, labels, indices)  # which have come to the CPU: nothing is pending
        milliseconds.append(1000 * (time.perf_counter() - started) / len(indices))
        return measured(images, judge.measures, judge.described(indices), classes)

    missing = _check_first(model, judge, produce)
    milliseconds.clear()  # of a single image
    measurements = make_measurements(
        folder / "measured", _settings(model, judge, labels), {"model": model.name}, judge.protocol.batch, produce,
        judge.processes, quiet,
    )  # fmt: skip
    if judge.processes.rank > 0:
        return Score(model.name, model.steps, missing=missing)
    result = judged(model, judge, labels, measurements, missing, quiet=quiet)
    timed = statistics.median(milliseconds) if milliseconds and model.conditions != "images" else None
    return replace(result, shown=judge.shown(model), ms_per_image=timed)


def _settings(model: Model, judge: Judge, labels: Tensor | None) -> dict[str, Any]:
    """What the measurements of a model depend on."""
    protocol, sampling = judge.protocol, judge.sampling
    return {
        "fingerprint": model.fingerprint,
        "shape": list(protocol.shape),
        "count": protocol.count,
        "shard_size": protocol.shard,
        "batch": protocol.batch,
        "seed": protocol.seed,
        "call": model.call,
        "dtype": sampling.dtype,
        "attention": sampling.attention,
        "resize": protocol.resize,
        "eight_bit": protocol.eight_bit,
        "classes": None if labels is None else digest(labels.tolist()),
        "prompts": None if judge.captions is None else digest(judge.captions),
        **({} if judge.changed is None else {"conditions": judge.changed.fingerprint}),
        "measures": {m.key: m.fingerprint for m in judge.measures},
        "device": judge.device.type,
        "threads": torch.get_num_threads() if judge.device.type == "cpu" else None,
    }


def _check_first(model: Model, judge: Judge, produce: Callable[[range], dict[str, Tensor]]) -> dict[str, str]:
    """Draws and measures the first image, so that what fails does so before the rest; metrics that cannot be had."""
    protocol = judge.protocol
    try:
        with torch.inference_mode():
            columns = produce(range(1))
    except (UserError, KeyboardInterrupt, OSError):
        raise
    except Exception as error:  # whatever an unknown pipeline raises
        raise UserError(f"eval: {model.name} cannot be drawn as {protocol.name} says ({first_line(error)})") from error
    missing = {}
    for metric in protocol.metrics:
        if metric.reads not in columns and metric.column != "agrees":
            there = ", ".join(sorted(name for name in columns if name.startswith(f"{metric.measure}.")))
            raise UserError(
                f"{protocol.name}: {metric.name} reads {metric.reads}, which is not measured; there is {there}"
            )
        reason = "nobody says which classes the images were to be of" if metric.reads not in columns else None
        reason = reason or _cannot_be_had(metric, judge)
        if reason:
            missing[metric.name] = reason
    if len(missing) == len(protocol.metrics):
        raise UserError(f"{next(iter(missing))}: no value can be had; {next(iter(missing.values()))}")
    return missing


def _cannot_be_had(metric: ProtocolMetric, judge: Judge) -> str | None:
    """Why the reference, or the number of images, does not allow a metric."""
    count, reference = judge.protocol.count, judge.reference
    if reference is not None and metric.metric.compares:
        if (reason := reference.lacks(metric)) is not None:
            return reason
        count = min(count, reference.count)
    if count < metric.metric.least:
        return f"{metric.metric.why_least} {metric.metric.least} images, and there are {count}"
    return None


def judged(
    model: Model, judge: Judge, labels: Tensor | None, measurements: Measurements, missing: Mapping[str, str],
    quiet: bool = True,
) -> Score:  # fmt: skip
    """The metrics of measurements, with intervals. Unless `quiet`, what takes long says where it is."""
    values: dict[str, float | None] = {}
    replicates: dict[str, Tensor] = {}
    intervals: dict[str, tuple[float, float]] = {}
    missing = dict(missing)
    with nullcontext() if quiet else speaking(model.name) as speaker:
        for metric in judge.protocol.metrics:
            if metric.name in missing:
                values[metric.columns[0]] = None
                continue
            if speaker is not None:
                speaker.name = f"{model.name}, {metric.name}"
            inputs = _inputs(metric, judge, labels, measurements)
            factor = metric.metric.scale * metric.scale
            try:
                numbers = [None if number is None else factor * number for number in metric.metric.compute(inputs)]
                values |= dict(zip(metric.columns, numbers, strict=True))
                if numbers[0] is None:
                    missing[metric.name] = "no image has one"
                    continue
                resampled = bootstrapped(metric, inputs, judge.options.bootstrap)
                if resampled is not None:
                    replicates[metric.name] = factor * resampled
                    around = numbers[0] if metric.metric.centred else None
                    intervals[metric.name] = interval(replicates[metric.name], around)
            except ValueError as error:  # of too few images, or features that are not finite
                values[metric.columns[0]], missing[metric.name] = None, str(error)
    return Score(model.name, model.steps, values, intervals, replicates, missing=missing)


def _inputs(metric: ProtocolMetric, judge: Judge, labels: Tensor | None, measurements: Measurements) -> Inputs:
    real = judge.reference.column(metric.reads) if judge.reference and metric.metric.compares else None
    real_labels = judge.real_labels() if metric.metric.needs == "images" else None
    return Inputs(measurements.column(metric.reads), real, labels, real_labels, metric.k)


def bootstrapped(metric: ProtocolMetric, inputs: Inputs, replicates: int | None) -> Tensor | None:
    """(R,) values over images drawn anew with replacement; None of a metric that cannot be resampled.

    Replicate r weighs image i the same for every model.
    """
    if metric.metric.resample is None:
        return None
    if replicates is None:
        part = next(iter(inputs.drawn.parts()))
        replicates = REPLICATES["wide" if part.ndim > 1 and part.shape[-1] > WIDE else "narrow"]
    return None if replicates < 2 else metric.metric.resample(inputs, replicates)
