"""Noise-image pairs: what the teacher's deterministic sampler makes of given noise, computed once and kept.

A folder of pairs holds shards of safetensors and an index, `pairs.json`, with every setting, a fingerprint of
the teacher and a checksum for each shard. Of each pair, `z` is standard normal, `x0` has unit variance
(an image is x0 times the schedule's data_std) and `class_labels` its class, if the teacher has classes.

Pair i is a function of (seed, i): its noise comes from a generator of its own, and classes take turns. The noise
is that of no evaluation seed, so that a student is never judged on the noise it was trained on. z and classes
are the same bits whatever the batch; x0 is too for the same batch and shard size, else to float rounding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from .config import PairsConfig, build
from .environment import environment
from .errors import UserError
from .families import load_teacher
from .files import atomic_write
from .guidance import guided
from .method import Pair
from .ode import ddim_step, heun_step, sample_ode
from .players import Teacher
from .rng import generator
from .schedule import sampling_grid

INDEX = "pairs.json"
_STEPS = {"ddim": ddim_step, "heun": heun_step}
# What a pair depends on, and which pairs a shard holds.
_RECIPE = ("count", "solver", "sampling_steps", "guidance_scale", "seed", "shard_size")


def fingerprint(teacher: Teacher) -> str:
    """16 hex digits that tell the content of two teachers apart: weights and scheduler."""
    scheduler = {k: v for k, v in sorted(teacher.scheduler.items()) if k != "_diffusers_version"}
    digest = hashlib.blake2b(json.dumps(scheduler, default=str).encode(), digest_size=8)
    for name, tensor in sorted(teacher.denoiser.network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def draw_pairs(teacher: Teacher, denoise: nn.Module, config: PairsConfig, indices: Sequence[int]) -> dict[str, Tensor]:
    """z and x0 (B, ...) and class_labels (B,) of pairs `indices`; `denoise` is the teacher, guided or not."""
    weight = next(itertools.chain(teacher.denoiser.parameters(), teacher.denoiser.buffers()))
    noise = [torch.randn(teacher.shape, generator=generator("cpu", config.seed, "pair", i)) for i in indices]
    z, cond = torch.stack(noise), {}
    if teacher.num_classes is not None:
        cond = {"class_labels": torch.tensor(indices) % teacher.num_classes}
    given = {key: value.to(weight.device) for key, value in cond.items()}
    schedule, step = teacher.denoiser.schedule, _STEPS[config.solver]
    x0 = sample_ode(step, denoise, schedule, z.to(weight), config.sampling_steps, given).cpu()
    if not bool(x0.isfinite().all()):
        raise UserError(f"teacher: {teacher.source!r} makes images that are not finite")
    return {"z": z, "x0": x0, **cond}


# -- making them -------------------------------------------------------------------------------------------


def make_pairs(**values: Any) -> Path:
    """`diffdistill pairs`: make a folder of pairs, or what is still missing of it; returns the folder.

    Options are those of the command, with underscores. Shards are written whole, and those that are there and
    have their checksum are kept. Raises UserError for whatever cannot be used, a folder made with other settings
    for one.
    """
    config = build(PairsConfig, values)
    out, device = Path(config.out), _device(config.device)
    teacher = load_teacher(config.teacher, null_class=config.null_class)
    teacher.denoiser.to(device)
    denoise = guided(teacher.denoiser, config.guidance_scale)
    sampling_grid(teacher.denoiser.schedule, config.sampling_steps)  # refuses too many steps now
    index = _start(out, _settings(teacher, config), teacher.source)
    names = [f"{k:05d}.safetensors" for k in range(-(-config.count // config.shard_size))]
    missing = [k for k, name in enumerate(names) if not _is_whole(out / name, index["shards"].get(name))]
    if not missing:
        print(f"{out} is done: {config.count} pairs")
        return out
    ranges = [range(k * config.shard_size, min((k + 1) * config.shard_size, config.count)) for k in range(len(names))]
    told = _progress(config.count, config.count - sum(len(ranges[k]) for k in missing))
    for k in missing:
        parts = []
        for first in range(ranges[k].start, ranges[k].stop, config.batch_size):
            indices = range(first, min(first + config.batch_size, ranges[k].stop))
            parts.append(draw_pairs(teacher, denoise, config, indices))
            told(len(indices))
        data = save({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        atomic_write(out / names[k], data)
        index["shards"][names[k]] = hashlib.sha256(data).hexdigest()
        index["shards"] = dict(sorted(index["shards"].items()))
        atomic_write(out / INDEX, json.dumps(index, indent=2) + "\n")
    return out


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for and torch sees no GPU; use --device cpu or auto")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def _settings(teacher: Teacher, config: PairsConfig) -> dict[str, Any]:
    options = asdict(config)
    return {
        "fingerprint": fingerprint(teacher),
        "shape": list(teacher.shape),
        "num_classes": teacher.num_classes,
        "data_std": teacher.denoiser.schedule.data_std,
        **{name: options[name] for name in _RECIPE},
    }


def _start(out: Path, settings: dict[str, Any], teacher: str) -> dict[str, Any]:
    """The folder's index: the one that is there if it is of the same settings, else a new one."""
    if (out / INDEX).exists():
        index = _read_index(out)
        for name, value in settings.items():
            if index["settings"].get(name) != value:
                raise UserError(
                    f"out: {str(out)!r} holds pairs made with {name} {index['settings'].get(name)}, "
                    f"and {value} is asked for; choose another --out"
                )
        return index
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {str(out)!r} exists and is no folder of pairs; choose another --out")
    index = {"teacher": teacher, "settings": settings, "environment": environment(), "shards": {}}
    try:
        atomic_write(out / INDEX, json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out: cannot write to {str(out)!r} ({error.strerror}); choose another --out") from None
    return index


def _progress(total: int, done: int) -> Callable[[int], None]:
    """n -> shows that n more are made: a bar on a terminal, else about ten lines."""
    bar = tqdm(total=total, initial=done, unit="pair", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    started, before = time.perf_counter(), done

    def told(n: int) -> None:
        nonlocal done
        bar.update(n)
        done += n
        if bar.disable and (done * 10 // total) != ((done - n) * 10 // total):
            rate = (done - before) / (time.perf_counter() - started)
            print(f"pair {done}/{total}  {rate:.1f}/s  {(total - done) / rate:.0f} s left", flush=True)
        if done == total:
            bar.close()

    return told


# -- reading them ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pairs:
    """A finished folder of pairs. Shards are memory-mapped: of a large folder only what is read is in memory."""

    folder: Path
    settings: dict[str, Any]
    shards: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return self.settings["count"]

    def get(self, indices: Tensor) -> Pair:
        """The pairs at int64 indices (B,), in that order; IndexError for one outside 0..len-1."""
        size, wanted = self.settings["shard_size"], indices.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"indices {min(wanted)}..{max(wanted)} lie outside 0..{len(self) - 1}")
        columns = {key: torch.stack([self.shards[i // size][key][i % size] for i in wanted]) for key in self.shards[0]}
        return Pair(columns.pop("z"), columns.pop("x0"), columns)


def open_pairs(folder: str | Path) -> Pairs:
    """A folder made by `make_pairs`; every shard's checksum is verified. UserError if it is not finished or damaged."""
    folder = Path(folder)
    index = _read_index(folder)
    settings, sums = index["settings"], index["shards"]
    count = -(-settings["count"] // settings["shard_size"])
    if len(sums) < count:
        raise UserError(
            f"pairs: {str(folder)!r} is not finished, {len(sums)} of {count} shards are there; "
            "run its `diffdistill pairs` command again"
        )
    for name, checksum in sums.items():
        if not _is_whole(folder / name, checksum):
            raise UserError(f"pairs: {folder / name} is missing or damaged; run its `diffdistill pairs` command again")
    return Pairs(folder, settings, [_mapped(folder / name) for name in sums])


def check_pairs(teacher: Teacher, pairs: Pairs) -> None:
    """UserError unless the pairs are this teacher's."""
    made = pairs.settings
    if tuple(made["shape"]) != tuple(teacher.shape):
        raise UserError(
            f"pairs: {str(pairs.folder)!r} has samples of shape {tuple(made['shape'])}; "
            f"the teacher's are {tuple(teacher.shape)}"
        )
    found = fingerprint(teacher)
    if (made["fingerprint"], made["num_classes"]) != (found, teacher.num_classes):
        raise UserError(
            f"pairs: {str(pairs.folder)!r} was made with another teacher (fingerprint {made['fingerprint']}, "
            f"{made['num_classes']} classes; this one has {found}, {teacher.num_classes}); make pairs of this one"
        )


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"pairs: {str(folder)!r} has no {INDEX}; make it with `diffdistill pairs`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"pairs: {folder / INDEX} is not readable JSON ({error})") from None
    settings = index.get("settings") if isinstance(index, dict) else None
    whole = isinstance(settings, dict) and {"count", "shard_size", "shape", "fingerprint"} <= set(settings)
    if not whole or not isinstance(index.get("shards"), dict):
        raise UserError(f"pairs: {folder / INDEX} is no index of pairs; make the folder anew with `diffdistill pairs`")
    return index


def _is_whole(path: Path, checksum: str | None) -> bool:
    if checksum is None or not path.is_file():
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest() == checksum


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"pairs: {path} is not a whole safetensors file ({error})") from None
