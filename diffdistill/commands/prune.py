"""`diffdistill prune`: a smaller network of a teacher's own blocks, for `train --student`."""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffdistill.config import PruneConfig
from diffdistill.core.denoiser import Cond
from diffdistill.core.experts import Experts
from diffdistill.core.schedule import sampling_grid
from diffdistill.data.encoded import Encoded, check_encoded, open_encoded, with_prompts
from diffdistill.data.examples import ClassLabels
from diffdistill.environment import use_machine
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, TeacherRecord, diffusers_class, load_teacher, local_folder, record_of
from diffdistill.options import build
from diffdistill.pipelines.export import save_pipeline
from diffdistill.players.pruning import block_lists, importance, least_important, thinner_unet, without_blocks
from diffdistill.players.teacher import Teacher
from diffdistill.rng import generator

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import PruneOptions


def prune(teacher: str | PathLike[str], **options: Unpack[PruneOptions]) -> Path:
    """Make a teacher's network smaller by taking out blocks; returns the diffusers folder, `out`.

    The options are those of `diffdistill prune`, with underscores. Raises UserError for a network that has no blocks to
    take out, and for whatever cannot be used.
    """
    config = build(PruneConfig, {**options, "teacher": str(teacher)})
    device = use_machine(config.device, config.threads)
    encoded = None if config.prompts is None else open_encoded(config.prompts)
    own = load_teacher(config.teacher, null_class=config.null_class, **({} if encoded is None else encoded.size))
    if encoded is not None:
        folder = local_folder(config.teacher)
        check_encoded(encoded, folder, FAMILIES[own.family], own.shape)
        own = with_prompts(own, encoded)
    own.denoiser.to(device)
    network = own.denoiser.network
    smaller, lines = _smaller(own, encoded, config)
    shares = [sum(p.numel() for p in part.parameters()) for part in (smaller, network)]
    lines.append(f"{shares[0]:,} of {shares[1]:,} parameters, {shares[0] / shares[1]:.0%}")
    print("\n".join(lines))
    record = record_of(config.teacher)
    kept = record.null_class if isinstance(record, TeacherRecord) else config.null_class
    kind: Any = diffusers_class(own.scheduler["_class_name"])
    text = "\n\n".join([f"# {own.source}, without some of its blocks", *lines])
    card = f"{text}\n\nIt has learned nothing since; `diffdistill train --student` takes it.\n"
    return save_pipeline(
        Path(config.out),
        own.family,
        smaller.cpu(),
        kind.from_config(own.scheduler),
        TeacherRecord(kept),
        card,
        own.source,
    )


def _smaller(teacher: Teacher, encoded: Encoded | None, config: PruneConfig) -> tuple[nn.Module, list[str]]:
    """The network, and in words what was taken out of it."""
    network: Any = teacher.denoiser.network
    if isinstance(network, Experts):
        raise UserError("teacher: its network is two, each for a part of the noise, and one alone is made smaller")
    layers = dict(getattr(network, "config", {})).get("layers_per_block")
    if isinstance(layers, int):
        fewer = max(1, round(config.keep * layers))
        if fewer == layers:
            raise UserError(f"keep: {config.keep} of {layers} blocks in each level leaves them all; give less")
        return thinner_unet(network, fewer), [f"{fewer} of {layers} blocks in each level of a UNet"]
    lists = block_lists(network)
    if not lists:
        raise UserError(f"teacher: a {type(network).__name__} has no list of blocks that its config counts")
    total = sum(len(network.get_submodule(name)) for name in lists)
    count = min(total - round(config.keep * total), total - len(lists))
    if count < 1:
        raise UserError(f"keep: {config.keep} of {total} blocks leaves them all; give less")
    states = _states(teacher, encoded, config)
    scores = {name: importance(teacher.denoiser, name, states) for name in lists}
    gone = least_important(scores, count)
    lines = [
        f"{name}.{k}: {value:.4g}{', taken out' if k in gone[name] else ''}"
        for name, own in scores.items()
        for k, value in enumerate(own)
    ]
    return without_blocks(network, gone), ["change of v without each block alone:", *lines]


@torch.no_grad()
def _states(teacher: Teacher, encoded: Encoded | None, config: PruneConfig) -> list[tuple[Tensor, Tensor, Cond]]:
    """Where the teacher's own samples pass."""
    denoiser, n = teacher.denoiser, config.count
    if encoded is None and FAMILIES[teacher.family].conditions == "text":
        made = f"`diffdistill encode --teacher {teacher.source} ..`"
        raise UserError(
            f"prompts: the blocks of a text-to-image teacher are compared with prompts; give those of {made}"
        )
    weight = next(denoiser.parameters())
    draw = generator("cpu", 0, "prune")
    grid = sampling_grid(denoiser.schedule, config.sampling_steps, option="sampling_steps").to(weight.device)
    if encoded is not None:
        cond = encoded.get(torch.arange(n) % len(encoded)).cond
    else:
        cond = ClassLabels(teacher.num_classes).draw(n, draw).cond or teacher.sample_cond(n)
    cond = {name: value.to(weight.device) for name, value in cond.items()}
    x = torch.randn(n, *teacher.shape, generator=draw).to(weight) * denoiser.schedule.init_scale(float(grid[0]))
    states = []
    for k in range(config.sampling_steps):
        t = grid[k].expand(n)
        states.append((x, t, cond))
        x = denoiser(x, t, cond).at(grid[k + 1].expand(n))
    return states


def run(config: PruneConfig) -> None:
    """The command `prune`."""
    values = asdict(config)
    made = prune(values.pop("teacher"), **values)
    print(f"use it with: diffdistill train --teacher {config.teacher} --student {made}")
