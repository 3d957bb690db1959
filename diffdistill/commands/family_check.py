"""`diffdistill family-check`: whether a family's teacher is its stock pipeline, on a user's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffdistill.commands.check_config import FamilyCheckConfig
from diffdistill.config import SavingConfig
from diffdistill.environment import use_machine
from diffdistill.errors import UserError
from diffdistill.exact.stock import (
    LIMIT,
    Case,
    Check,
    carried_out,
    gap,
    half_cases,
    half_check,
    ours,
    scales_of,
    stock,
    stock_case,
    stock_checks,
)
from diffdistill.families import (
    FAMILIES,
    Family,
    StudentRecord,
    family_of,
    from_outside,
    load_pipeline,
    load_student,
    local_folder,
    parts_of,
    read_json,
    register_family,
    report_unread,
    skeleton,
    weight_files,
)
from diffdistill.files import atomic_write
from diffdistill.options import Size, build, size_of
from diffdistill.pipelines.card import student_call
from diffdistill.pipelines.export import save_pipeline
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.players.sampler import Sampler

_SMALL = 2 * 10**9  #: bytes of weights up to which they are copied by default


def family_check(
    model: str | os.PathLike[str],
    *,
    family: Family | str | Path | None = None,
    resolution: Size | None = None,
    frames: int | None = None,
    prompt: str = "a red fox in the snow",
    whole: bool | None = None,
) -> list[Check]:
    """The checks of a pipeline's family, each with `name`, `ok` (None: left out) and what is `said` of it.

    `family` is registered first: a `Family` or a .py file that defines FAMILY. Raises UserError for a folder that no
    family reads, one that does not load, and a family that is not whole.
    """
    if family is not None:
        register_family(family)
    options = {"resolution": resolution, "frames": frames, "prompt": prompt, "whole": whole}
    return list(_checks(build(FamilyCheckConfig, {"model": os.fspath(model), **options}), torch.device("cpu")))


def _checks(config: FamilyCheckConfig, device: torch.device) -> Iterator[Check]:
    folder = local_folder(config.model)
    family, index = family_of(folder)
    yield Check("folder", True, f"{index['_class_name']} is read by the family {family.name}")
    size: dict[str, Any] = {"resolution": config.resolution, "frames": config.frames, "prompt": config.prompt}
    size["device"] = device
    case = stock_case(folder, **size)
    yield from stock_checks(case, config.prompt)
    bytes_there = _bytes(folder)
    if not (bytes_there < _SMALL if config.whole is None else config.whole):
        said = f"the folder has {bytes_there / 1e9:.1f} GB of weights; --whole true looks at it too"
        yield Check("bfloat16", None, said)
        yield Check("export", None, said)
        return
    yield from carried_out("export", lambda: _export_check(case, device))
    if family.autoencoder is None:  # numpy, of which they make images, has no such type
        yield Check("bfloat16", None, "stock pipelines in pixels draw nothing in bfloat16")
        return
    wide, half = half_cases(folder, **size)
    for scale in scales_of(case):
        yield from carried_out(f"bfloat16 at guidance {scale:g}", partial(half_check, wide, half, scale))


def _bytes(folder: Path) -> int:
    """Of the weights of all parts."""
    parts = (folder / part for part in parts_of(read_json(folder / "model_index.json")))
    files = (file for part in parts if any(part.glob("*.safetensors")) for file in weight_files(part)[0])
    return sum(file.stat().st_size for file in files)


def _export_check(case: Case, device: torch.device) -> Check:
    """Whether a student, here the teacher with its weights a little greater, is exported, and drawn by the stock
    pipeline as by our sampler."""
    teacher, family = case.teacher, case.family
    denoiser = teacher.denoiser
    before = ours(case, 1.0, stock(case, 1.0)[2])
    for value in denoiser.network.parameters():
        value.data.mul_(1.02)
    sampler = Sampler(denoiser, [float(denoiser.schedule.init_level)])
    latent = family.autoencoder is not None
    call = student_call(teacher, sampler) if latent else None
    record = StudentRecord(sampler.levels, "ddim", teacher.source, num_classes=teacher.num_classes, call=call)
    if latent:
        size = size_of(teacher.size["height"], teacher.size["width"]) if "height" in teacher.size else None
        record = replace(record, resolution=size, frames=teacher.frames)
    with TemporaryDirectory(prefix="diffdistill-") as made:
        folder, source = Path(made) / "student", str(case.folder)
        save_pipeline(
            folder, family.name, denoiser.network, student_scheduler(teacher, sampler), record, "", source, "float32",
            SavingConfig(parts="link"),
        )  # fmt: skip
        again, described = load_student(folder)
        pipe = load_pipeline(folder, device=device)
        drawn = replace(case, pipe=pipe, teacher=replace(described, size=teacher.size), steps=1)
        again.denoiser.to(device)
        again.denoiser.null = denoiser.null
        what = {key: value for key, value in case.call(1.0).items() if key in ("prompt", "class_labels")}
        drawn.call = lambda guidance: {**what, **(call or {})}
        latents, _, grid = stock(drawn, 1.0)
        mine = ours(drawn, 1.0, grid)
        kept = ours(case, 1.0, grid)
    if (lost := gap(mine.cpu(), kept.cpu())) > LIMIT:
        return Check("export", False, f"the weights that load again are others: the student is off by {lost:.1e}")
    if before.shape == kept.shape and gap(kept, before) < LIMIT:
        return Check("export", False, "the network's weights do not change the latents")
    error = gap(mine.cpu(), latents.cpu())
    said = f"a one-step student by {type(pipe).__name__} is off by {error:.1e}; {LIMIT:g} is allowed"
    return Check("export", error < LIMIT, said)


def run(config: FamilyCheckConfig) -> int:
    """The command; 1 if a check fails or no family reads the pipeline."""
    device = use_machine(config.device, config.threads)
    folder = local_folder(config.model)
    if _unread(folder):
        return _say_unread(folder, config.write)
    if config.write is not None:
        raise UserError(f"write: a family reads {config.model} already; leave it out")
    family, index = family_of(folder)
    outside = from_outside()
    if outside and family not in outside:
        names = ", ".join(outside[0].class_names)
        raise UserError(f"family: {outside[0].name} reads {names}, and {config.model} is a {index['_class_name']}")
    rows = []
    for row in _checks(config, device):
        rows.append(row)
        verdict = {True: "ok", False: "FAIL", None: "-"}[row.ok]
        print(f"{verdict:4} {row.name:36} {row.said}", flush=True)
    wrong = sum(row.ok is False for row in rows)
    print(f"{sum(row.ok is True for row in rows)} right, {wrong} wrong, {sum(row.ok is None for row in rows)} left out")
    return 1 if wrong else 0


def _unread(folder: Path) -> bool:
    """Whether the folder is a pipeline whose class no family reads."""
    if not (folder / "model_index.json").is_file():
        return False
    name = read_json(folder / "model_index.json").get("_class_name")
    return isinstance(name, str) and not any(name in family.class_names for family in FAMILIES.values())


def _say_unread(folder: Path, write: str | None) -> int:
    print("\n".join(report_unread(folder)))
    if write is None:
        print("--write FILE.py writes the beginning of one; then: family-check MODEL --family FILE.py")
        return 1
    path = Path(write)
    if path.suffix != ".py" or path.exists():
        raise UserError(f"write: {write} {'is there already' if path.exists() else 'is no .py file'}; name a new one")
    atomic_write(path, skeleton(folder))
    print(f"written: {write}; fill in what it lacks, then: family-check MODEL --family {write}")
    return 1
