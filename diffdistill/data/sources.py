"""What `encode` reads: images or videos with captions, images with classes, or prompts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffdistill.config import EncodeConfig
from diffdistill.data.beside import conditions_in, metadata_of, names_conditions
from diffdistill.data.examples import check_classes
from diffdistill.data.folder import Pictures, check_ends, decode, in_lists, of_each
from diffdistill.data.hub import open_stream
from diffdistill.data.images import Data, open_data, open_pairs, part, stream_data
from diffdistill.data.prompts import all_prompts
from diffdistill.data.texts import looked_for
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError, shown
from diffdistill.families import Family

CONDITIONED = (".jsonl", ".ndjson", ".csv", ".tsv")  #: files of prompts whose rows may name condition images


class Encoder(Protocol):
    """What must be known of whoever encodes."""

    family: Family
    size: tuple[int, int]  #: height and width in pixels
    frames: int | None  #: of a video
    num_classes: int | None


@dataclass(frozen=True)
class Source:
    """What is encoded: images with captions or classes, or texts by consecutive rows."""

    images: Data | None
    texts: Callable[[range], list[str]] | None
    count: int
    fingerprint: str
    #: Condition images (n, 3, H, W) in [-1, 1] of texts alone; of k each (n, k, 3, H, W).
    conditions: Callable[[range], Tensor] | None = None


def open_source(config: EncodeConfig, encoder: Encoder, kept: list[int] | None = None) -> Source:
    """The data of the options, or those rows of them; UserError where the encoder's family cannot use them."""
    family = encoder.family
    if (config.prompts is None) == (config.data is None):
        raise UserError(
            "encode: give either --prompts (a .txt, .jsonl, .json, .csv) or --data (images with captions, or classes)"
        )
    if config.data is None:
        if family.text is None:
            raise UserError(f"prompts: {config.teacher!r} takes class labels; give images and classes with --data")
        if has_conditions(family, None, config.prompts):
            return _conditioned_prompts(config, encoder)
        return Source(None, *prompts_of(str(config.prompts), config.count, config.streaming))
    conditioned = has_conditions(family, config.data)
    if conditioned and config.streaming:
        raise UserError("streaming: condition images are read from folders of images and .tar shards; leave it out")
    if encoder.frames is not None:
        if config.streaming:
            raise UserError("streaming: videos are read from a folder; leave it out")
        images = open_videos(config.data, frames=encoder.frames, size=encoder.size, conditioned=conditioned)
    elif config.streaming:
        images = stream_data(config.data, count=config.count, resolution=encoder.size, channels=3)
    else:
        opening = open_pairs if conditioned else open_data
        images = opening(config.data, resolution=encoder.size, channels=3)
    images = images if kept is None else part(images, kept)
    first = images.get(torch.arange(1))
    if first.conditions is not None:
        check_several(first.conditions, f"data: {config.data!r}", family.name, family.several)
    if (first.captions if family.text else first.labels) is None:
        where = f"; give {looked_for()} in a metadata.jsonl, or a .txt beside each image" if family.text else ""
        needed = "captions" if family.text else "class labels"
        raise UserError(f"data: {config.data!r} has no {needed}, which {family.name} is conditioned on{where}")
    if family.text is None:
        check_classes(f"{config.data!r}", images.num_classes, encoder.num_classes)
    return Source(images, None, min(len(images), config.count or len(images)), images.fingerprint)


def has_conditions(family: Family, data: str | None, prompts: str | None = None) -> bool:
    """Whether condition images are read: those that a family needs, or those that data name where it takes some."""
    return family.reads_image or (family.several and conditions_named(data, prompts))


def conditions_named(data: str | None, prompts: str | None = None) -> bool:
    """Whether the first row of these data, or of a file of prompts, names an image to read; some kinds have one."""
    path = Path(str(prompts or data)).expanduser()
    metadata = [path] if prompts else metadata_of(path) if path.is_dir() else []
    drawn = not prompts and str(data).partition(":")[0] in ("edits", "reduced")
    return drawn or any(names_conditions(file) for file in metadata[:1])


def check_several(conditions: Tensor, what: str, model: str, several: bool) -> None:
    """UserError for condition images (n, k, 3, H, W), k of each prompt, of a model that takes one, not `several`."""
    if conditions.ndim == 5 and not several:
        raise UserError(f"{what} has {conditions.shape[1]} condition images a row, and {model} takes one; give one")


def _conditioned_prompts(config: EncodeConfig, encoder: Encoder) -> Source:
    """Prompts with the condition images that their rows name; UserError for prompts of another kind."""
    path = Path(str(config.prompts)).expanduser()
    if config.streaming or path.suffix.lower() not in CONDITIONED:
        raise UserError(
            f"prompts: {encoder.family.name} reads a condition image with each prompt; give a .jsonl or .csv whose "
            "rows have 'prompt' and 'condition_image', or --data"
        )
    texts, count, fingerprint = prompts_of(str(path), config.count, streaming=False)
    rows = conditions_in(path, "prompts")[:count]
    files, each = [file for row in rows for file in row], len(rows[0])
    places: list[Any] = [str(path.parent / file) for file in files]
    check_ends(places, places)
    sizes = "".join(f"{file}\0{os.path.getsize(place)}\n" for file, place in zip(files, places, strict=True))
    digest = hashlib.blake2b(f"{fingerprint} {sizes}".encode(), digest_size=8).hexdigest()
    pictures = Pictures(
        len(places), lambda rows: [places[i] for i in rows], places.__getitem__, None, None, None, digest
    )

    def conditions(rows: range) -> Tensor:
        return in_lists(decode(pictures, of_each(rows, each), (3, *encoder.size), resize=True), each)

    family = encoder.family
    check_several(conditions(range(1)), f"prompts: {shown(str(path))}", family.name, family.several)
    return Source(None, texts, count, digest, conditions)


def prompts_of(spec: str, count: int | None, streaming: bool) -> tuple[Callable[[range], list[str]], int, str]:
    """The prompts of consecutive rows, how many there are, and their fingerprint."""
    if streaming:
        stream = open_stream(spec, "prompts")
        return lambda i: stream.texts(stream.rows(list(i)), i) or [], stream.length(count), stream.fingerprint
    texts = all_prompts(spec)[:count]
    joined = "\n".join(texts).encode()
    return lambda i: texts[i.start : i.stop], len(texts), hashlib.blake2b(joined, digest_size=8).hexdigest()
