"""What `encode` reads: images or videos with captions, images with classes, or prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from diffdistill.config import EncodeConfig
from diffdistill.data.examples import check_classes
from diffdistill.data.hub import open_stream
from diffdistill.data.images import Data, open_data, part, stream_data
from diffdistill.data.prompts import all_prompts
from diffdistill.data.texts import looked_for
from diffdistill.data.videos import open_videos
from diffdistill.errors import UserError
from diffdistill.families import Family


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
        return Source(None, *prompts_of(str(config.prompts), config.count, config.streaming))
    if encoder.frames is not None:
        if config.streaming:
            raise UserError("streaming: videos are read from a folder; leave it out")
        images = open_videos(config.data, frames=encoder.frames, size=encoder.size)
    elif config.streaming:
        images = stream_data(config.data, count=config.count, resolution=encoder.size, channels=3)
    else:
        images = open_data(config.data, resolution=encoder.size, channels=3)
    images = images if kept is None else part(images, kept)
    first = images.get(torch.arange(1))
    if (first.captions if family.text else first.labels) is None:
        where = f"; give {looked_for()} in a metadata.jsonl, or a .txt beside each image" if family.text else ""
        needed = "captions" if family.text else "class labels"
        raise UserError(f"data: {config.data!r} has no {needed}, which {family.name} is conditioned on{where}")
    if family.text is None:
        check_classes(f"{config.data!r}", images.num_classes, encoder.num_classes)
    return Source(images, None, min(len(images), config.count or len(images)), images.fingerprint)


def prompts_of(spec: str, count: int | None, streaming: bool) -> tuple[Callable[[range], list[str]], int, str]:
    """The prompts of consecutive rows, how many there are, and their fingerprint."""
    if streaming:
        stream = open_stream(spec, "prompts")
        return lambda i: stream.texts(stream.rows(list(i)), i) or [], stream.length(count), stream.fingerprint
    texts = all_prompts(spec)[:count]
    joined = "\n".join(texts).encode()
    return lambda i: texts[i.start : i.stop], len(texts), hashlib.blake2b(joined, digest_size=8).hexdigest()
