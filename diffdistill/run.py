"""Wiring: options to teacher, data, method, trainer and a run folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .adapters import plain_network
from .checkpoint import checkpoints, load_checkpoint, load_into
from .config import FitConfig, MethodInfo, TrainConfig, build, coerce, describe_method, nearest, run_options, split
from .data import Data, batch_indices, open_data
from .environment import environment
from .errors import UserError
from .families import load_teacher
from .files import atomic_write
from .method import Batch, Method, Pair
from .pairs import Pairs, check_pairs, open_pairs
from .pipelines.export import model_card, save_pipeline, student_scheduler
from .players import FewStepSampler, Teacher
from .rng import generator, image_generators, seed_for
from .trainer import Accelerator, Trainer, accelerator_for


def start_folder(
    out: Path, options: dict[str, Any], player_bytes: int, accelerator: Accelerator, *, resume: bool
) -> None:
    """Make the run folder with its resolved options and environment, and start the tracker.

    Fails here, not after the training, where the folder cannot be written or the disk has no room for the
    checkpoints: parameters, two moments and an average each, of which one more than is kept exists at times.
    """
    import yaml

    if accelerator.is_main_process:
        if (out / "config.yaml").exists() and not resume:
            raise UserError(f"out: {str(out)!r} already holds a run; resume it with --resume {out}, or choose another")
        existing = next(p for p in (out, *out.absolute().parents) if p.exists())
        need, free = 4 * player_bytes * (options["keep_checkpoints"] + 1), shutil.disk_usage(existing).free
        if free < need:
            raise UserError(f"out: {str(out)!r} has {free >> 20} MiB free and this run needs {need >> 20} MiB")
        try:
            atomic_write(out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            atomic_write(out / "config.yaml", yaml.safe_dump(options, sort_keys=False))
        except OSError as error:
            raise UserError(f"out: cannot write to {str(out)!r} ({error.strerror}); choose another --out") from None
    told = {k: v for k, v in options.items() if v is not None}  # TensorBoard takes no None
    accelerator.init_trackers("diffdistill", config=told)


def batches(
    config: FitConfig,
    teacher: Teacher,
    data: Data | None,
    accelerator: Accelerator,
    label_dropout: float = 0.0,
    pairs: Pairs | None = None,
) -> Callable[[int], Batch]:
    """step -> Batch: a function of (seed, step, rank) alone. Without data, conditions are drawn uniformly."""
    rank, world = accelerator.process_index, accelerator.num_processes
    device, size = accelerator.device, config.batch_size
    if data is not None:
        batch_indices(len(data), size, 0, seed=config.seed, rank=rank, world_size=world)  # refuses now, not later

    def pair_at(step: int) -> Pair | None:
        if pairs is None:
            return None
        # Not the data's order: pair i and image i have nothing to do with each other.
        seed = seed_for(config.seed, "pairs")
        got = pairs.get(batch_indices(len(pairs), size, step, seed=seed, rank=rank, world_size=world))
        return Pair(got.z.to(device), got.x0.to(device), {k: v.to(device) for k, v in got.cond.items()})

    def batch(step: int) -> Batch:
        key = (config.seed, step, rank)
        if data is None:
            cond = teacher.random_cond(size, generator(device, *key, "condition"))
            return Batch(size, teacher.shape, cond, None, device, key, pair_at(step))
        got = data.get(batch_indices(len(data), size, step, seed=config.seed, rank=rank, world_size=world))
        x0 = got.images.to(device) / teacher.denoiser.schedule.data_std
        cond = {}
        if teacher.num_classes is not None and got.labels is not None:
            labels = got.labels.to(device)
            if label_dropout and teacher.denoiser.null is not None:
                drop = torch.rand(size, generator=generator(device, *key, "label dropout"), device=device)
                null = teacher.denoiser.null({"class_labels": labels})["class_labels"]
                labels = torch.where(drop < label_dropout, null, labels)
            cond = {"class_labels": labels}
        return Batch(size, teacher.shape, cond, x0, device, key, pair_at(step))

    return batch


def check_data(teacher: Teacher, data: Data) -> None:
    """UserError unless the data's shape and labels are the teacher's."""
    if tuple(data.shape) != tuple(teacher.shape):
        raise UserError(
            f"data: {data.name!r} has samples of shape {tuple(data.shape)}; the teacher's are {tuple(teacher.shape)}"
        )
    if teacher.num_classes is not None:
        if data.num_classes is None:
            raise UserError(f"data: {data.name!r} has no labels and the teacher has {teacher.num_classes} classes")
        if data.num_classes > teacher.num_classes:
            raise UserError(
                f"data: {data.name!r} has {data.num_classes} classes; the teacher knows {teacher.num_classes}"
            )


def grid_writer(out: Path, sampler_now: Callable[[], FewStepSampler], teacher: Teacher) -> Callable[[int], None]:
    """step -> writes <out>/samples/step-<step>.png, always of the same noise and conditions."""
    from .eval.report import image_grid, save_png

    columns = min(teacher.num_classes or 8, 10)
    count = 8 * columns

    def write(step: int) -> None:
        sampler = sampler_now()
        device = next(sampler.denoiser.parameters()).device
        cond = {} if teacher.num_classes is None else {"class_labels": torch.arange(count, device=device) % columns}
        images = sampler(teacher.shape, cond, image_generators(0, range(count)))
        save_png(image_grid(images.float(), columns, scale=4), out / "samples" / f"step-{step:08d}.png")

    return write


# -- distillation ------------------------------------------------------------------------------------------

_ON_RESUME = {
    "steps",
    "device",
    "threads",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tracker",
}


@dataclasses.dataclass
class Game:
    """A distillation's parts, put together from its options."""

    config: TrainConfig
    info: MethodInfo
    method_config: Any
    teacher: Teacher
    method: Method

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config) | dataclasses.asdict(self.method_config)


def make_game(values: dict[str, Any]) -> Game:
    """Teacher and method from the options of `diffdistill train`, nothing trained yet."""
    info = describe_method(str(values.get("method", TrainConfig.method)))
    shared, own = split(values, TrainConfig, info.config)
    config, method_config = build(TrainConfig, shared), build(info.config, own)
    module = info.load()
    teacher = load_teacher(config.teacher, null_class=config.null_class)
    # The method's own Config has the same fields; the one read from source served only to parse options.
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    method = module.METHOD(teacher, module.Config(**dataclasses.asdict(method_config)))
    return Game(config, info, method_config, teacher, method)


def distill(*, preset: str | None = None, resume: str | Path | None = None, **values: Any) -> Path:
    """Distill a teacher into a few-step student and export it; returns the student's diffusers folder.

    Options are those of `diffdistill train`, with underscores: method, teacher, data, out, steps,
    batch_size, ... and the method's own. `resume` continues a run folder from its last checkpoint; a few
    options, `steps` among them, may change then. Raises UserError for whatever cannot be used.
    """
    if resume is not None:
        values = resumed_options(Path(resume), values | ({} if preset is None else {"preset": preset}))
    elif preset is not None:
        preset = coerce("preset", preset, str, {})
        presets = describe_method(str(values.get("method", TrainConfig.method))).presets
        if preset not in presets:
            raise UserError(f"preset: {preset!r} is not known; {nearest(preset, presets)}")
        values = dict(presets[preset]) | values
    out = Path(str(values.get("out", TrainConfig.out)))
    game = make_game(values)
    config, method, teacher = game.config, game.method, game.teacher
    student_scheduler(teacher, method.sampler())  # a level that cannot be exported is refused now
    whole = getattr(method, "whole", config.steps)  # what only methods with stages say
    if config.steps != whole:
        end = "it stops at an earlier stage" if config.steps < whole else "the rest trains nothing"
        print(
            f"note: all stages of {game.info.name} take {whole} steps and steps is {config.steps}: {end}",
            file=sys.stderr,
        )
    accelerator = accelerator_for(config, out)
    data = _data_for(game)
    pairs = _pairs_for(game, config.batch_size * accelerator.num_processes)
    draw = batches(config, teacher, data, accelerator, pairs=pairs)
    player_bytes = sum(p.numel() * p.element_size() for m in method.players.values() for p in m.parameters())
    teacher.denoiser.to(accelerator.device)
    grids = grid_writer(out, method.sampler, teacher)
    trainer = Trainer(method, draw, config, out, accelerator, grids)
    if resume is not None:
        trainer.resume()
    start_folder(out, game.options(), player_bytes, accelerator, resume=resume is not None)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.evaluating():
            _export(game, out / "student", trainer.step)
    accelerator.end_training()
    return out / "student"


def resumed_options(run: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A run folder's options with those given now; UserError for one that cannot change on the way."""
    saved = run_options(run)
    for name in values:
        if name not in _ON_RESUME:
            raise UserError(f"{name}: cannot change when a run is resumed; what can is {', '.join(sorted(_ON_RESUME))}")
    return saved | values | {"out": str(run)}


def _data_for(game: Game) -> Data | None:
    if not game.method.needs_data:
        return None
    if game.config.data is None:
        raise UserError(f"data: {game.info.name} with these options needs real images; give --data ({game.info.data})")
    channels, size = game.teacher.shape[0], game.teacher.shape[1]
    data = open_data(game.config.data, resolution=size, channels=channels)
    check_data(game.teacher, data)
    return data


def _pairs_for(game: Game, needed: int) -> Pairs | None:
    if not game.method.needs_pairs:
        return None
    folder, name = game.config.pairs, game.info.name
    if folder is None:
        made = f"`diffdistill pairs --teacher {game.config.teacher} --out DIR`"
        raise UserError(f"pairs: {name} with these options needs noise-image pairs; make them with {made}")
    pairs = open_pairs(folder)
    check_pairs(game.teacher, pairs)
    if len(pairs) < needed:
        raise UserError(f"pairs: {folder!r} holds {len(pairs)} and a step takes {needed}; make more")
    own, theirs = game.options().get("guidance_scale"), pairs.settings["guidance_scale"]
    if own is not None and own != theirs:
        print(f"note: the pairs were made with guidance_scale {theirs:g} and {name}'s is {own:g}", file=sys.stderr)
    return pairs


def _export(game: Game, folder: Path, step: int) -> Path:
    sampler = game.method.sampler()
    scheduler = student_scheduler(game.teacher, sampler)
    metadata = {
        "levels": list(sampler.levels),
        "renoise": sampler.renoise,
        "num_classes": game.teacher.num_classes,
        "null_class": game.teacher.num_classes if game.teacher.denoiser.null is not None else None,
        "teacher": game.teacher.source,
        "method": game.info.name,
        "step": step,
        "options": game.options(),
        "environment": environment(),
    }
    card = model_card(game.info, game.options(), game.teacher, sampler, step)
    network = plain_network(sampler.denoiser.network)
    return save_pipeline(folder, game.teacher.family, network, scheduler, metadata, card)


def load_run(run: str | Path, step: int | None = None) -> tuple[Game, int]:
    """A run's parts with the student as its checkpoint at `step` (default: the last) has it, and that step."""
    run = Path(run)
    game = make_game(run_options(run))
    found = {int(path.name.split("-")[1]): path for path in checkpoints(run / "checkpoints")}
    if not found:
        raise UserError(f"run: {str(run)!r} has no checkpoint yet")
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"step: no checkpoint at {step}; there are {', '.join(map(str, sorted(found)))}")
    tensors, _ = load_checkpoint(found[step])
    for name, module in game.method.state.items():
        load_into(module, tensors[f"state.{name}"], found[step])
    name, student = next(iter(game.method.players.items()))
    load_into(student.eval(), tensors[name] | tensors.get("average", {}), found[step])
    return game, step


def export_run(run: str | Path, *, step: int | None = None, out: str | Path | None = None) -> Path:
    """Save a run's student from its checkpoint at `step` (default: the last); returns the folder."""
    game, step = load_run(run, step)
    return _export(game, Path(out) if out else Path(run) / "student", step)
