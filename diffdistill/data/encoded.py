"""Prompts and images of a text-to-image teacher, encoded once: training then loads neither text encoder nor VAE.

A folder holds shards of conditions and, where the data have images, latents, in safetensors; the conditions of "no
prompt"; and an index with every setting and a fingerprint of the encoders. Row i is a function of row i of the data.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffdistill.config import EncodeConfig
from diffdistill.core.denoiser import Cond
from diffdistill.data.buckets import bucket_sizes, in_buckets
from diffdistill.data.examples import Example, check_classes
from diffdistill.data.hub import Ended
from diffdistill.data.images import open_data, open_pairs
from diffdistill.data.processes import Processes
from diffdistill.data.shards import (
    Kind,
    hash_file,
    is_whole,
    make,
    mapped,
    open_shards,
    read_index,
    row_shapes,
    rows,
    without_padding,
    write_index,
)
from diffdistill.data.sources import Source, has_conditions, open_source, prompts_of
from diffdistill.errors import UserError, shown
from diffdistill.families import (
    FAMILIES,
    NOT_LOADED,
    Family,
    Prompt,
    describe,
    family_of,
    load_pipeline,
    local_folder,
    with_null,
)
from diffdistill.families._family import OWN_NULL
from diffdistill.families._parts import one_of_each
from diffdistill.files import atomic_write
from diffdistill.options import build
from diffdistill.players.teacher import Teacher

KIND = Kind("encode", "encoded prompts", "prompt")
_NULL = "null.safetensors"


def fingerprint(folder: Path, family: Family) -> str:
    """16 hex digits of what encodes: configs and weights of the VAE and the text encoders, tokenizers too."""
    assert family.autoencoder is not None
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted({"vae", *(family.text.components if family.text else ())}):
        weights, _ = one_of_each(folder / name)
        for path in sorted((folder / name).glob("*")):
            copy = any(fnmatch(path.name, pattern) for pattern in NOT_LOADED)
            if path in weights or (path.suffix in (".json", ".txt", ".model") and not copy):
                digest.update(f"{name}/{path.name}".encode())
                hash_file(digest, path)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Encoded:
    """A finished folder, memory-mapped: of a large one only what is read is in memory."""

    folder: Path
    settings: dict[str, Any]
    shards: list[dict[str, Tensor]]
    null: Cond = field(default_factory=dict)
    texts: Callable[[Tensor], tuple[str, ...]] | None = field(default=None, kw_only=True)  #: of rows (B,), if read

    def __len__(self) -> int:
        return self.settings["count"]

    @property
    def size(self) -> dict[str, Any]:
        """The arguments of `load_teacher` for samples of this size."""
        return {"resolution": self.settings["resolution"], "frames": self.settings["frames"]}

    @property
    def has_images(self) -> bool:
        """Whether the folder holds latents, or conditions alone."""
        return "latents" in self.shards[0]

    def get(self, indices: Tensor) -> Example:
        """Latents (B, ...), if there are any, and conditions (B, ...) at int64 indices (B,), in that order.

        In float32, also where they are stored in half precision. Raises IndexError for one outside 0..len-1.
        """
        columns = _wide(rows(self.shards, self.settings["shard_size"], len(self), indices))
        texts = None if self.texts is None else self.texts(indices)
        return Example(columns.pop("latents", None), columns, texts=texts)


@dataclass(frozen=True, eq=False)
class Bucketed(Encoded):
    """A finished folder of buckets: one of `parts` after the other, each of images of one size."""

    parts: tuple[Encoded, ...] = ()

    @property
    def counts(self) -> list[int]:
        """How many samples each bucket has."""
        return [len(part) for part in self.parts]

    def get(self, indices: Tensor) -> Example:
        """As of `Encoded`; latents only where all are of one bucket."""
        made, counts = [], self.counts
        starts = [sum(counts[:k]) for k in range(len(counts) + 1)]
        for i in indices.tolist():
            if not 0 <= i < starts[-1]:
                raise IndexError(f"index {i} lies outside 0..{starts[-1] - 1}")
            k = bisect_right(starts, i) - 1
            made.append(self.parts[k].get(torch.tensor([i - starts[k]])))
        cond = {name: torch.cat([row.cond[name] for row in made]) for name in made[0].cond}
        latents = [row.x0 for row in made if row.x0 is not None]
        same = len({x0.shape for x0 in latents}) == 1
        return Example(torch.cat(latents) if same else None, cond)


def negative_prompt(family: Family, chosen: str | None) -> str | None:
    """The negative prompt that stands for "no prompt": the chosen one, or the makers'; None: their pipeline's own."""
    return chosen if chosen is not None or family.text is None else family.text.negative


def with_prompts(teacher: Teacher, encoded: Encoded) -> Teacher:
    """The teacher with the conditions of "no prompt", and of the first prompt where only their shapes matter."""
    if encoded.null or any(name.startswith(OWN_NULL) for name in encoded.shards[0]):
        with_null(teacher.denoiser, encoded.null)
    return replace(teacher, example_cond=encoded.get(torch.zeros(1, dtype=torch.int64)).cond)


def encode(*, teacher: str | PathLike[str] | Teacher | None = None, **values: Any) -> Path:
    """`diffdistill encode`: encode prompts, or images with captions, or what is still missing; returns the folder.

    `teacher` is as in `diffdistill.encode`; the rest are the command's options, with underscores. Raises UserError for
    whatever cannot be used.
    """
    named = {} if teacher is None else _named(teacher, values) if isinstance(teacher, Teacher) else {"teacher": teacher}
    config = build(EncodeConfig, values | named)
    folder, out = local_folder(config.teacher), Path(config.out)
    processes = Processes(config.device)
    family, _ = family_of(folder)
    if family.autoencoder is None:
        raise UserError(
            f"teacher: {config.teacher!r} works on pixels, where there is nothing to encode; give a latent teacher"
        )
    if config.data is not None and not family.autoencoder.encodes:
        raise UserError(
            f"data: a sample of {family.name} has more than the images of data, and nothing encodes the rest; give "
            "--prompts alone"
        )
    described = describe(folder, config.resolution, config.frames)
    if isinstance(teacher, Teacher) and described.shape != teacher.shape:
        raise UserError(
            f"resolution: samples of this size are {described.shape}, and the teacher's are {teacher.shape}; "
            "leave it out, to encode for the teacher"
        )
    encoder = _Encoder(config, processes.device, folder, family, described)
    if config.buckets:
        _encode_buckets(out, config, processes, encoder)
    else:
        _encode_to(out, config, processes, encoder, open_source(config, encoder))
    return out


def _encode_to(out: Path, config: EncodeConfig, processes: Processes, encoder: _Encoder, source: Source) -> None:
    """Encode the source, or what is still missing of it, into a folder."""
    settings = encoder.settings() | {
        "source": source.fingerprint,
        "count": source.count,
        "shard_size": config.shard_size,
    }
    if config.streaming:
        settings["asked"] = source.count
        if (out / KIND.index).exists():  # it may have turned out that there are fewer
            made = read_index(KIND, out)["settings"]
            settings["count"] = made["count"] if made.get("asked") == source.count else source.count
    named = {"teacher": config.teacher, "data": config.data, "prompts": config.prompts}  # for people, and for `eval`
    index = processes.start(KIND, out, settings, named)

    def produce(indices: range) -> dict[str, Tensor]:
        return without_padding(encoder.columns(source, indices))

    with torch.no_grad():
        if processes.rank == 0 and not is_whole(out / _NULL, index.get("null")):
            data = save(encoder.null())
            atomic_write(out / _NULL, data)
            write_index(out / KIND.index, index | {"null": hashlib.sha256(data).hexdigest()})
        processes.wait()
        index = read_index(KIND, out)
        last = None
        try:
            make(KIND, out, index, config.batch_size, produce, processes.rank, processes.count)
        except Ended as end:
            last = end.rows
        last = processes.least(last)  # of several processes one meets the end itself, others begin behind it
        if last is not None:
            index["settings"]["count"] = last
            if processes.rank == 0:
                print(f"{config.data or config.prompts} has {last} rows")
                write_index(out / KIND.index, index)
            processes.make(KIND, out, index, config.batch_size, produce)


def _encode_buckets(out: Path, config: EncodeConfig, processes: Processes, encoder: _Encoder) -> None:
    """Encode each image at the size that is nearest to its ratio, into a folder for each size inside of `out`."""
    if config.data is None or config.streaming or encoder.frames is not None:
        wrong = "prompts alone have no ratio" if config.data is None else "a stream is read once, in order"
        wrong = wrong if encoder.frames is None else "videos are of one size"
        raise UserError(f"buckets: {wrong}; leave it out")
    opening = open_pairs if has_conditions(encoder.family, config.data) else open_data
    whole = opening(config.data, resolution=encoder.size, channels=3)
    assert whole.stored is not None
    held = in_buckets(whole.stored()[: config.count], bucket_sizes(encoder.size))
    # Before anything is encoded: UserError for a size that the family cannot have.
    described = {size: describe(encoder.folder, size, config.frames) for size in held}
    inside = {f"{height}x{width}": len(rows) for (height, width), rows in held.items()}
    settings = encoder.settings() | {
        "source": whole.fingerprint,
        "count": sum(inside.values()),
        "shard_size": config.shard_size,
        "buckets": inside,
    }
    processes.start(KIND, out, settings, {"teacher": config.teacher, "data": config.data, "prompts": None})
    if processes.rank == 0:
        print(f"buckets: {', '.join(f'{count} of {size}' for size, count in inside.items())}")
    for name, (size, images) in zip(inside, held.items(), strict=True):
        # As for a folder of that size alone, so that the conditions that say a size say its own.
        own = replace(config, resolution=name if size[0] != size[1] else size[0], buckets=False, count=None)
        one = _Encoder(own, encoder.device, encoder.folder, encoder.family, described[size], encoder)
        _encode_to(out / name, own, processes, one, open_source(own, one, images))


def _named(teacher: Teacher, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name the pipeline of a teacher that Python gave, and its size; UserError where it has none."""
    if teacher.family not in FAMILIES:
        raise UserError(
            f"teacher: {teacher.source} is a network alone, without text encoder and autoencoder; give the folder or "
            "hub id of a pipeline, or what load_teacher loaded of one"
        )
    size = {"resolution": None, "frames": None} | {k: v for k, v in values.items() if k in ("resolution", "frames")}
    if set(size.values()) == {None} and describe(local_folder(teacher.source)).shape != teacher.shape:
        height, width = teacher.size.get("height"), teacher.size.get("width")
        size = {
            "resolution": None if height is None else (height, width),
            "frames": teacher.frames,
        }
    return {"teacher": teacher.source, **size}


class _Encoder:
    """A pipeline's encoders for samples of one size, which are loaded when something is encoded."""

    def __init__(
        self, config: EncodeConfig, device: torch.device, folder: Path, family: Family, described: Teacher,
        loaded: _Encoder | None = None,
    ):  # fmt: skip
        """`loaded`: one whose pipeline is taken."""
        self.config, self.folder, self.family, self.loaded = config, folder, family, loaded
        self.shape, self.num_classes = described.shape, described.num_classes
        self.device, self.dtype = device, getattr(torch, config.teacher_dtype)
        self.size = family.pixels(folder, self.shape)  #: height and width in pixels
        self.frames: int | None = described.frames  #: of a video
        if family.text is None and (config.negative_prompt, config.prompt_dtype) != (None, None):
            name = "prompt_dtype" if config.negative_prompt is None else "negative_prompt"
            raise UserError(f"{name}: {config.teacher!r} takes class labels and no prompts; leave it out")
        self.prompt = Prompt(self.size, config.embedded_guidance, config.negative_prompt, frames=self.frames)

    @cached_property
    def pipeline(self) -> Any:
        if self.loaded is not None:
            return self.loaded.pipeline
        loaded = load_pipeline(self.folder, leave_out=self.family.networks, device=self.device, dtype=self.dtype)
        if self.dtype == torch.float16 and getattr(loaded.vae.config, "force_upcast", False):
            loaded.vae.float()  # it says that it overflows otherwise; the stock pipelines do so too
        return loaded

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides the data."""
        config = self.config
        return {
            "fingerprint": fingerprint(self.folder, self.family),
            "family": self.family.name,
            "shape": list(self.shape),
            "pixels": list(self.size),
            "resolution": config.resolution,
            "frames": config.frames,
            "embedded_guidance": config.embedded_guidance,
            "negative_prompt": negative_prompt(self.family, config.negative_prompt),
            # None in float32, as folders are from before there was a choice.
            "teacher_dtype": None if self.dtype == torch.float32 else config.teacher_dtype,
            "prompt_dtype": config.prompt_dtype,
            "buckets": None,
        }

    def null(self) -> dict[str, Tensor]:
        """The conditions of "no prompt", (1, ...) each; empty for a family without text."""
        return self.stored(self.family.text.null(self.pipeline, self.prompt) if self.family.text else {})

    def columns(self, source: Source, indices: range) -> dict[str, Tensor]:
        """Latents and conditions (n, ...) of consecutive rows of the data."""
        columns: dict[str, Tensor] = {}
        captions = None if source.texts is None else source.texts(indices)
        conditions = None if source.conditions is None else source.conditions(indices)
        if source.images is not None:
            samples = source.images.get(torch.tensor(indices))
            captions, vae, conditions = samples.captions, self.pipeline.vae, samples.conditions
            assert self.family.autoencoder is not None
            columns["latents"] = self.family.autoencoder.encode(vae, samples.images.to(self.device, vae.dtype))
            if self.family.text is None:
                assert samples.labels is not None
                highest = int(samples.labels.max()) + 1  # of a stream nobody may know before
                check_classes(f"{self.config.data!r}", max(highest, source.images.num_classes or 0), self.num_classes)
                columns["class_labels"] = samples.labels
        if self.family.text is not None:
            prompt = self.prompt._replace(images=conditions)
            columns |= self.family.text.encode(self.pipeline, list(captions or ()), prompt)
        return self.stored(columns)

    def stored(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """What bfloat16 encoders give is stored as it is, what float16 ones give in float32; or prompts as is said."""
        for name, value in columns.items():
            if not bool(value.isfinite().all()):
                if self.dtype == torch.float16:
                    raise UserError(f"teacher_dtype: {self.family.name} overflows in float16; use bfloat16 or float32")
                raise UserError(
                    f"teacher: the {name} of {self.config.teacher!r} are not finite in {self.config.teacher_dtype}; "
                    "its text encoder or autoencoder is damaged"
                )
        halves = {key: value.float() for key, value in columns.items() if value.dtype == torch.float16}
        return {key: self._typed(key, value).cpu().contiguous() for key, value in (columns | halves).items()}

    def _typed(self, name: str, value: Tensor) -> Tensor:
        """Prompts in the type in which they are stored."""
        kind = self.config.prompt_dtype
        if kind is None or name == "latents" or not value.is_floating_point():
            return value
        typed = value.to(getattr(torch, kind))
        if not bool(typed.isfinite().all()):
            raise UserError(f"prompt_dtype: the {name} of {self.family.name} overflow in {kind}; use bfloat16")
        return typed


def is_of_prompts(folder: Path, spec: str) -> bool:
    """Whether a folder, finished or not, is made of the prompts that a file or data set holds now."""
    return read_index(KIND, folder)["settings"].get("source") == prompts_of(spec, None, streaming=False)[2]


def open_encoded(folder: str | Path) -> Encoded:
    """A folder made by `encode`; every checksum is verified. UserError if it is not finished or damaged."""
    folder = Path(folder)
    if (settings := read_index(KIND, folder)["settings"]).get("buckets"):
        parts = tuple(open_encoded(folder / name) for name in settings["buckets"])
        return Bucketed(folder, settings, parts[0].shards, parts[0].null, parts)
    settings, shards = open_shards(KIND, folder)
    if not is_whole(folder / _NULL, read_index(KIND, folder).get("null")):
        raise UserError(f"encode: {folder / _NULL} is missing or damaged; run {KIND.made_by} again")
    shapes = [row_shapes(shard) for shard in shards]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(f"encode: the shards of {str(folder)!r} differ in columns or shapes; make the folder anew")
    return Encoded(folder, settings, shards, _wide(mapped(KIND, folder / _NULL)))


def _wide(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    halves = (torch.bfloat16, torch.float16)
    return {key: value.float() if value.dtype in halves else value for key, value in columns.items()}


def check_encoded(encoded: Encoded, folder: Path, family: Family, shape: Sequence[int]) -> None:
    """UserError unless the folder was made with this teacher's encoders and size."""
    made, own = encoded.settings, fingerprint(folder, family)
    if (made["family"], made["fingerprint"]) != (family.name, own):
        raise UserError(
            f"prompts: {str(encoded.folder)!r} was made by another model ({made['family']} {made['fingerprint']}; this "
            f"one is {family.name} {own}); encode with this one"
        )
    if tuple(made["shape"]) != tuple(shape):
        raise UserError(
            f"prompts: {str(encoded.folder)!r} was made for samples of shape {tuple(made['shape'])}; "
            f"here they are {tuple(shape)}; give the same --resolution"
        )


def check_negative(encoded: Encoded, other: str | None, pairs: str | None = None) -> None:
    """UserError unless the folder's negative prompt is the other one: an option's, if there is one, or `pairs`' own."""
    made = encoded.settings.get("negative_prompt")
    if made == other or (pairs is None and other is None):
        return
    ours, theirs = ("the family's own" if text is None else shown(text) for text in (made, other))
    prompts = f"negative_prompt: {shown(str(encoded.folder))} was made with {ours}"
    if pairs is None:
        raise UserError(f"{prompts}, and {theirs} is given; encode the prompts with it, or leave it out")
    raise UserError(f"{prompts}, and {shown(pairs)} with {theirs}; make the pairs with these prompts")


def decoder(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Latents (B, ...) -> images (B, 3, H, W) in [-1, 1] by the teacher's VAE, which is loaded for the call alone."""
    entry = FAMILIES.get(teacher.family)
    if entry is None or entry.autoencoder is None:
        return lambda images: images

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        assert entry is not None and entry.autoencoder is not None
        pipeline = load_pipeline(local_folder(teacher.source), only=("vae",), device=latents.device)
        vae = pipeline.vae
        for saving in ("enable_slicing", "enable_tiling"):
            if hasattr(vae, saving) and latents.shape[-1] > 64:
                getattr(vae, saving)()
        images = entry.autoencoder.decode(vae, latents)
        return images[:, :, 0] if images.ndim == 5 else images

    return decode
