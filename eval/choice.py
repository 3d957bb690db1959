"""What a model is judged by where the user does not say: the protocol, the real images and the captions that fit it.

8x8 grey images are judged by the protocol digits, 28x28 ones of digits by mnist, captions of drawn shapes by shapes,
all else by pixels, which needs no weights. The real images are those that the user names, those of the model's
training, or, where none are known, samples of the teacher itself in 50 steps.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffdistill.config import run_options
from diffdistill.data import shapes
from diffdistill.data.encoded import KIND as ENCODED
from diffdistill.data.images import Data, open_data, open_pairs, part
from diffdistill.data.prompts import all_prompts
from diffdistill.data.shards import read_index
from diffdistill.data.sources import check_several, conditions_named
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError, shown
from diffdistill.eval.features.digit_classifier import load_mnist_classifier
from diffdistill.eval.judge import DRAWN, JudgeOptions
from diffdistill.eval.ladder import check_there
from diffdistill.eval.models import ModelLike, SamplingOptions, family_or_none, model_folder, models_in, open_model
from diffdistill.eval.protocol import Protocol, load
from diffdistill.families import Family, StudentRecord, TeacherRecord, describe, local_folder, read_record
from diffdistill.options import size_of
from diffdistill.players.teacher import Teacher

MOST_REAL = 5000  # images that pixels compares with: neighbourhoods take all pairs
QUICK = 2000  # images of the protocol mnist, where nobody has asked for it
LATENT = {"count": 500, "batch": 8}
SURE = 0.8  # share of images that the classifier of MNIST must know for digits


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is loaded."""

    name: str
    conditions: str  #: none, classes, prompts, or images: there is nothing to draw
    shape: tuple[int, ...]  #: of its images, (C, H, W), or videos, (C, F, H, W)
    classes: int | None = None
    count: int | None = None  #: of images
    latent: bool = False
    reads_image: bool = False  #: it changes images
    several: bool = False  #: it takes several images a prompt, or none where it does not read one anyway
    options: Mapping[str, Any] | None = None  #: of the training that made it
    teacher: str | None = None  #: where a student was distilled from

    @property
    def frames(self) -> int:
        """Of its videos; 0 where it makes images."""
        return self.shape[1] if len(self.shape) == 4 else 0


def facts_of(model: ModelLike) -> Facts:
    """UserError for what is no model, or makes what no protocol can judge."""
    return _checked(_facts(model))


def _facts(model: ModelLike) -> Facts:
    if isinstance(model, str | os.PathLike):
        return _of_folder(model)
    described = model if isinstance(model, Teacher) else model[1]
    if described.size:
        raise UserError("model: a loaded model of latents has no autoencoder beside it; give its folder")
    conditions = "none" if described.num_classes is None else "classes"
    return Facts("the model", conditions, described.shape, described.num_classes)


def _checked(facts: Facts) -> Facts:
    channels = facts.shape[0]
    if channels not in (1, 3):
        raise UserError(f"eval: images of {shown(facts.name)} have {channels} channels; only grey and RGB are judged")
    return facts


def _of_folder(model: str | os.PathLike[str]) -> Facts:
    name, models = os.fspath(model), models_in(model)
    path = models[0] if models else model_folder(model)
    if not models and path.exists():
        if (path / "config.yaml").is_file():
            check_there(path)
            raise UserError(f"eval: {name!r} holds no student or teacher yet; train on, or export a checkpoint")
        images = open_model(path, SamplingOptions())
        if images.conditions == "images":
            return Facts(name, "images", tuple(images.draw([0], 0, None, None).shape[1:]), count=images.count)
    if not models:
        check_there(model)
    folder = local_folder(str(path))
    family = family_or_none(folder)
    if family is None:
        raise UserError(f"protocol: {name!r} is a pipeline of a kind that is not known; name a --protocol")
    return _of_pipeline(name, folder, family)


def _of_pipeline(name: str, folder: Path, family: Family) -> Facts:
    record = read_record(folder)
    student = record if isinstance(record, StudentRecord) else None
    size = (student.resolution, student.frames) if student else (None, None)
    described = describe(folder, *size)
    shape, classes = described.shape, described.num_classes
    if family.autoencoder is not None:
        shape = (3, *([] if described.frames is None else [described.frames]), *family.pixels(folder, shape))
    null = record.null_class if isinstance(record, StudentRecord | TeacherRecord) else None
    if classes is not None and null is not None:
        classes = min(classes, null)
    conditions = "prompts" if family.conditions == "text" else "none" if classes is None else "classes"
    made = student.options if student else record.recipe if isinstance(record, TeacherRecord) else None
    if (folder.parent / "config.yaml").is_file():  # which says where data lie, and a model's own record does not
        made = {**(made or {}), **run_options(folder.parent)}
    teacher = (made or {}).get("teacher", student.teacher) if student else None
    latent = family.autoencoder is not None
    return Facts(
        name, conditions, shape, classes, latent=latent, reads_image=family.reads_image, options=made, teacher=teacher,
        several=family.several,
    )  # fmt: skip


@dataclass(frozen=True)
class Wishes:
    """What the user says of an evaluation; None: nothing."""

    protocol: str | None = None
    reference: str | None = None
    data: str | None = None
    prompts: str | None = None
    count: int | None = None
    seed: int | None = None
    batch: int | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """What goes before a protocol's own numbers."""
        return {"count": self.count, "seed": self.seed, "batch": self.batch}


@dataclass(frozen=True)
class Choice:
    """A protocol, and what it compares with."""

    protocol: Protocol
    reference: str | None = None  #: as one would name it; None: the protocol's own, or nothing
    data: Data | None = None  #: the real images, where they are open
    captions: list[str] | None = None
    conditions: Data | None = None  #: images that the model changes
    own: bool = False  #: real images are not known, and samples of the teacher are to be made for them
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """One line on how it is judged."""
        measures = ", ".join(self.protocol.measures)
        against = "its teacher's own samples in 50 steps" if self.own else self.reference or self.protocol.reference
        compared = f" against {against}" if against else ""
        return f"{self.protocol.count} images by the protocol {self.protocol.name} (features: {measures}){compared}"

    def options(self, **others: Any) -> JudgeOptions:
        """Those of the judge; `others` are its fields besides."""
        return JudgeOptions(
            self.protocol, reference=self.reference, data=self.data, captions=self.captions,
            conditions=self.conditions, notes=self.notes, **others,
        )  # fmt: skip


def choose(facts: Facts, wishes: Wishes) -> Choice:
    """The protocol that fits; of `wishes.protocol`, which is open, what it leaves to the model.

    Opens the real images and the captions, loads no model and draws nothing. UserError where captions or real images
    that are needed are not known.
    """
    overrides, named = wishes.overrides, wishes.reference or wishes.data
    if wishes.protocol is None and _moves(facts, wishes):
        return Choice(load("moving-i2v" if facts.reads_image else "moving", frames=facts.frames, **overrides))
    if facts.reads_image or (facts.several and _names_images(facts, wishes)):
        return _of_edits(facts, wishes)
    captions = _captions(facts, wishes) if facts.conditions == "prompts" and named != "shapes" else None
    if wishes.protocol is None:
        if facts.conditions == "prompts" and _are_shapes(facts, named, captions):
            return Choice(load("shapes", **overrides))
        if facts.shape == (1, 8, 8) and facts.classes in (None, 10):
            protocol = load("digits", **_at_most(overrides, facts.count, "digits"))
            return Choice(protocol, None if named == "digits" else named)
    data, spec = _real_images(facts, named)
    if facts.conditions == "images" and data is None:
        kind = f"{facts.shape[2]}x{facts.shape[1]} {'grey' if facts.shape[0] == 1 else 'RGB'}"
        raise UserError(f"data: {shown(facts.name)} holds {kind} images; name the real ones to compare with by --data")
    fits = facts.shape == (1, 28, 28) and facts.classes in (None, 10)
    if wishes.protocol is None and fits and data is not None and _are_digits(data):
        usual = overrides if wishes.count else overrides | {"count": min(QUICK, facts.count or QUICK)}
        assert spec is not None
        return Choice(load("mnist", **_at_most(usual, facts.count, "mnist")), held_out(spec))
    return _pixels(facts, wishes, data, spec, captions)


def _names_images(facts: Facts, wishes: Wishes) -> bool:
    """Whether the images that are named, or else those that a model was trained on, come with condition images."""
    if named := wishes.data or wishes.reference:
        return conditions_named(named)
    options = facts.options or {}
    source = _encoded_from(options)
    prompts = [name for name in _names(source.get("prompts")) if wishes.prompts is None]
    data = [*_names(source.get("data")), *_names(options.get("data"))]
    return any(conditions_named(None, name) for name in prompts) or any(map(conditions_named, data))


def _of_edits(facts: Facts, wishes: Wishes) -> Choice:
    """That of a model that changes images: what it changes, and what it is to make of it, are of the same data."""
    does = "begins with images" if facts.frames else "changes images"
    if wishes.prompts is not None:
        raise UserError(
            f"prompts: {shown(facts.name)} {does}; give images with captions and condition images by --data"
        )
    named, options = wishes.data or wishes.reference, facts.options or {}
    for spec in [named] if named else [*_names(_encoded_from(options).get("data")), *_names(options.get("data"))]:
        if wishes.protocol is None and spec.partition(":")[0] == "edits" and facts.shape == (3, *[shapes.SIDE] * 2):
            return Choice(load("edits", **wishes.overrides))
        try:
            data = _fewer(_opened(facts, spec, pairs=True))
        except UserError:
            if named:
                raise
            continue
        captions, condition = _captions_of(data), data.get(torch.arange(1)).conditions
        if condition is not None:
            check_several(condition, f"data: {shown(spec)}", shown(facts.name), facts.several)
        if captions is None:
            raise UserError(f"data: {shown(spec)} has no captions, which say what is to be changed")
        own = part(data, list(range(len(captions))))
        return replace(_pixels(facts, wishes, data, spec, captions), conditions=own)
    raise UserError(
        f"data: {shown(facts.name)} {does}, and none are known; give images with captions and condition images "
        "by --data"
    )


def _pixels(facts: Facts, wishes: Wishes, data: Data | None, spec: str | None, captions: list[str] | None) -> Choice:
    """The protocol, which leaves all to the model, completed."""
    name = wishes.protocol or "pixels"
    usual = {name: value for name, value in LATENT.items() if facts.latent and getattr(wishes, name) is None}
    protocol = load(name, **_at_most(wishes.overrides | usual, facts.count, name))
    if captions is not None:
        captions = list(itertools.islice(itertools.cycle(captions), protocol.count))
    conditions = "none" if facts.conditions == "images" else facts.conditions
    protocol = replace(
        protocol, resolution=size_of(*_pixels_of(facts)), channels=facts.shape[0], frames=facts.frames,
        conditions=[conditions], classes=facts.classes,
        labels="balanced", prompts="captions of the model's own data" if captions is not None else None,
        reference=spec or "samples of the teacher",
    )  # fmt: skip
    notes = []
    if data is None:
        notes.append("no real images are known: these are the teacher's own samples; name real ones by --data")
    if (better := _better(facts)) is not None:
        notes.append(f"features of networks judge photographs better: {better}")
    return Choice(protocol, spec, data, captions, own=data is None, notes=tuple(notes))


def _at_most(overrides: dict[str, Any], there: int | None, protocol: str) -> dict[str, Any]:
    """With no more images than there are, unless the user has said a number."""
    count = overrides["count"] or load(protocol).count
    return overrides if there is None or overrides["count"] else overrides | {"count": min(count, there)}


def _better(facts: Facts) -> str | None:
    """A protocol of feature networks whose weights must be fetched; None for small or grey images."""
    if facts.shape[0] != 3:
        return None
    if facts.frames:
        return "--protocol videos --weights videomae=FOLDER"
    inception = "--weights inception=FILE"
    if facts.conditions == "prompts":
        return f"--protocol coco2017-5k {inception} --weights clip-score=FOLDER --weights clip=FOLDER"
    known = {(32, 10): "cifar10", (32, None): "cifar10", (64, 1000): "imagenet64", (256, 1000): "imagenet256"}
    protocol = known.get((facts.shape[1], facts.classes)) if facts.shape[1] == facts.shape[2] else None
    return None if protocol is None else f"--protocol {protocol} --reference IMAGES {inception}"


# -- real images and captions ------------------------------------------------------------------------------


def _pixels_of(facts: Facts) -> tuple[int, int]:
    return facts.shape[-2], facts.shape[-1]


def _opened(facts: Facts, spec: str, pairs: bool = False) -> Data:
    """Images, or videos, of the model's size; `pairs`: with condition images."""
    if facts.frames:
        return open_videos(spec, frames=facts.frames, size=_pixels_of(facts), conditioned=pairs)
    opening = open_pairs if pairs else open_data
    return opening(spec, resolution=_pixels_of(facts), channels=facts.shape[0])


def _moves(facts: Facts, wishes: Wishes) -> bool:
    """Whether a model makes videos of drawn shapes that move, of the size that can be read."""
    specs = [wishes.data or wishes.reference, *_known_images(facts)]
    spec = next(itertools.chain(*map(_names, specs)), "")
    fits = (facts.shape[0], *_pixels_of(facts)) == (3, shapes.SIDE, shapes.SIDE)
    return facts.frames > 0 and fits and spec.partition(":")[0] == "moving"


def _real_images(facts: Facts, named: str | None) -> tuple[Data | None, str | None]:
    """Real images at the model's size, spread evenly where there are many, and how they are named."""
    if named is not None:
        return _fewer(_opened(facts, named)), named
    for spec in _known_images(facts):
        try:
            return _fewer(_opened(facts, spec)), spec
        except UserError:  # they have been moved since, or are on a hub that is out of reach
            continue
    return None, None


def _known_images(facts: Facts) -> Iterator[str]:
    """Names of the real images that the model, or its teacher, was trained on."""
    options = facts.options or {}
    yield from _names(options.get("data"))
    yield from _names(_encoded_from(options).get("data"))
    if facts.teacher is None:
        return
    try:
        record = read_record(local_folder(facts.teacher))
    except UserError:
        return
    if isinstance(record, TeacherRecord):
        yield from _names(record.recipe.get("data"))


def _names(spec: Any) -> list[str]:
    return [spec] if isinstance(spec, str) and spec and not spec.startswith("python:") else []


def _encoded_from(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder of `diffdistill encode` that a model was trained on says of its source."""
    prompts = options.get("prompts")
    if not isinstance(prompts, str) or not (Path(prompts) / ENCODED.index).is_file():
        return {}
    return read_index(ENCODED, Path(prompts))


def _fewer(data: Data) -> Data:
    if len(data) <= MOST_REAL:
        return data
    total = len(data)

    def read(rows: list[int]) -> Any:
        return data.read([row * total // MOST_REAL for row in rows])

    name = f"{data.name}, evenly spread of its {total}"
    return replace(data, name=name, fingerprint=f"{data.fingerprint} spread", size=MOST_REAL, read=read)


def _captions(facts: Facts, wishes: Wishes) -> list[str]:
    """Captions of the images to draw; UserError if none are known."""
    if wishes.prompts is not None:
        return all_prompts(wishes.prompts, keep_blank=True)
    encoded = _encoded_from(facts.options or {})
    images = [wishes.data, wishes.reference, encoded.get("data"), (facts.options or {}).get("data")]
    for spec in itertools.chain(*map(_names, images)):
        try:
            data = _fewer(_opened(facts, spec) if facts.frames else open_data(spec))
        except UserError:  # which is said where the images themselves are needed
            continue
        if captions := _captions_of(data):
            return captions
    for spec in itertools.chain(_names(encoded.get("prompts")), _names((facts.options or {}).get("prompts"))):
        if Path(spec).exists() and not (Path(spec) / ENCODED.index).is_file():
            return all_prompts(spec)
    raise UserError(
        f"prompts: {shown(facts.name)} is text-to-image, and no captions are known; give --prompts FILE (a prompt on "
        "each line), or a --protocol with its own"
    )


def _captions_of(data: Data) -> list[str] | None:
    """The first ones, read a few at a time, since videos are large."""
    rows = torch.arange(min(len(data), LATENT["count"])).split(LATENT["batch"])
    captions = [data.get(part).captions for part in rows]
    return None if captions[0] is None else [text for each in captions for text in each or []]


def _are_shapes(facts: Facts, named: str | None, captions: list[str] | None) -> bool:
    """Whether a text-to-image model is one of drawn shapes."""
    if named is not None:
        return named.partition(":")[0] == "shapes"
    sizes = (len(shapes.COLOURS), len(shapes.SHAPES), len(shapes.POSITIONS))
    known = {shapes.caption(*each) for each in itertools.product(*map(range, sizes))}
    return facts.shape == (3, shapes.SIDE, shapes.SIDE) and captions is not None and set(captions) <= known


@torch.no_grad()
def _are_digits(data: Data) -> bool:
    """Whether the shipped classifier of MNIST tells most images: into their classes, or, of none, surely into many."""
    count = min(len(data), 500)
    samples = data.get(torch.arange(count) * len(data) // count)
    probabilities = load_mnist_classifier()(samples.images).softmax(1)
    if samples.labels is None:
        seen = int((probabilities.argmax(1).bincount(minlength=10) >= 0.02 * count).sum())  # of noise it sees one
        return seen >= 8 and bool((probabilities.max(1).values > 0.9).float().mean() >= SURE)
    pairs = torch.stack([samples.labels, probabilities.argmax(1)], 1)
    usual = sum(int(pairs[pairs[:, 0] == label, 1].bincount().max()) for label in pairs[:, 0].unique())
    return usual >= SURE * count  # whatever numbers the classes have


def held_out(spec: str) -> str:
    """The test split of images that have one, else they themselves."""
    if "#" in spec and not Path(spec).exists():
        return spec
    try:
        open_data(f"{spec}#test", resolution=28, channels=1)
    except UserError:
        return spec
    return f"{spec}#test"


# -- for train's last line ---------------------------------------------------------------------------------


def suggestion(run: Path) -> str:
    """A command that judges a run's student, and a line on what it does; of what cannot be judged, one that draws."""
    facts = _facts(run)
    try:
        choice = choose(_checked(facts), Wishes())
    except UserError:  # videos, or captions that have been moved
        prompt = ["--prompt", "a red circle"] if facts.conditions == "prompts" else []
        prompt += ["--image", "FILE"] if facts.reads_image else []
        return f"look at its images: {shlex.join(['diffdistill', 'sample', str(run), *prompt])}"
    source = choice.reference.removesuffix("#test") if choice.reference else None
    drawn = choice.protocol.prompts in DRAWN
    source = source or (str(choice.protocol.prompts).removesuffix("-i2v") if drawn else None)
    images = ["--data", source] if source else []
    command = shlex.join(["diffdistill", "eval", str(run), *images])
    return f"compare it with its teacher: {command}\n  judges {choice.about}"
