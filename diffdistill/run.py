"""Wiring: options to teacher, data, method, trainer and a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoint import checkpoints, load_checkpoint, load_into
from .config import FitConfig, MethodInfo, TrainConfig, build, coerce, describe_method, nearest, run_options, split
from .data import Data, batch_indices, open_data
from .denoiser import Denoiser
from .encode import Encoded, check_encoded, decoder, encode, open_encoded
from .environment import environment
from .errors import UserError
from .families import FAMILIES, family_of, load_teacher, local_folder
from .files import atomic_write
from .lora import LoraSettings, checkpoint_activations
from .method import Batch, Method, Pair
from .pairs import Pairs, check_pairs, open_pairs
from .pipelines.export import model_card, other_parts, save_pipeline, student_call, student_scheduler
from .players import FewStepSampler, Teacher
from .rng import generator, image_generators, seed_for
from .trainer import Accelerator, Trainer, accelerator_for


def refuse_a_run(out: Path) -> None:
    """UserError if the folder holds a run already."""
    if (out / "config.yaml").exists():
        raise UserError(f"out: {str(out)!r} already holds a run; resume it with --resume {out}, or choose another")


def start_folder(
    out: Path,
    options: dict[str, Any],
    player_bytes: int,
    accelerator: Accelerator,
    *,
    resume: bool,
    kept_bytes: int = 0,
    export_bytes: int = 0,
) -> None:
    """Make the run folder with its resolved options and environment, and start the tracker.

    Fails here, not after the training, where the folder cannot be written or the disk has no room for the
    checkpoints: parameters, two moments and an average each, and what a method keeps besides (`kept_bytes`), of
    which one more than is kept exists at times; and for the student (`export_bytes`).
    """
    import yaml

    if accelerator.is_main_process:
        if not resume:
            refuse_a_run(out)
        existing = next(p for p in (out, *out.absolute().parents) if p.exists())
        need = (4 * player_bytes + kept_bytes) * (options["keep_checkpoints"] + 1) + export_bytes
        free = shutil.disk_usage(existing).free
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
    known = data if data is not None else teacher.conditions
    if isinstance(known, Data | Encoded):
        batch_indices(len(known), size, 0, seed=config.seed, rank=rank, world_size=world)  # refuses now, not later

    def pair_at(step: int) -> Pair | None:
        if pairs is None:
            return None
        # Not the data's order: pair i and image i have nothing to do with each other.
        seed = seed_for(config.seed, "pairs")
        got = pairs.get(batch_indices(len(pairs), size, step, seed=seed, rank=rank, world_size=world))
        return Pair(got.z.to(device), got.x0.to(device), {k: v.to(device) for k, v in got.cond.items()})

    def batch(step: int) -> Batch:
        key = (config.seed, step, rank)
        if isinstance(teacher.conditions, Encoded):
            encoded = teacher.conditions
            order = batch_indices(len(encoded), size, step, seed=config.seed, rank=rank, world_size=world)
            x0, cond = encoded.get(order)
            cond = {name: value.to(device) for name, value in cond.items()}
            return Batch(size, teacher.shape, cond, None if x0 is None else x0.to(device), device, key, pair_at(step))
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
    encoded = teacher.conditions
    latent = FAMILIES[teacher.family].autoencoder is not None
    count = 8 if latent else 8 * columns  # large images, and a decoder
    decode = decoder(teacher)

    def write(step: int) -> None:
        sampler = sampler_now()
        device = next(sampler.denoiser.parameters()).device
        cond = {} if teacher.num_classes is None else {"class_labels": torch.arange(count, device=device) % columns}
        if isinstance(encoded, Encoded):
            cond = {k: v.to(device) for k, v in encoded.get(torch.arange(count) % len(encoded))[1].items()}
        images = decode(sampler(teacher.shape, cond, image_generators(0, range(count)))).float().clamp(-1, 1)
        picture = image_grid(images, columns, scale=max(1, 32 // images.shape[-1]))
        save_png(picture, out / "samples" / f"step-{step:08d}.png")

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
    teacher = _teacher(config)
    # The method's own Config has the same fields; the one read from source served only to parse options.
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    method = module.METHOD(teacher, module.Config(**dataclasses.asdict(method_config)))
    for role in sorted(teacher.lora.keys() - teacher.cast):
        told = role.replace("_", " ")
        raise UserError(f"{role}: {info.name} has no {told} that can be an adapter on the teacher; leave it at full")
    if config.gradient_checkpointing:
        parts = [part for player in method.players.values() for part in player.modules()]
        for network in {part.network for part in parts if isinstance(part, Denoiser)}:
            checkpoint_activations(network)
    return Game(config, info, method_config, teacher, method)


def _teacher(config: TrainConfig) -> Teacher:
    """The teacher with its encoded prompts, and what it is told of LoRA players."""
    folder = local_folder(config.teacher)
    family, _ = family_of(folder)
    dtype = getattr(torch, config.teacher_dtype)
    size = {"resolution": config.resolution, "frames": config.frames}
    encoded: Encoded | None = None
    if family.autoencoder is not None:
        encoded = _encoded(config) if config.prompts is not None or family.conditions == "text" else None
    elif config.prompts is not None or config.resolution is not None:
        given = "prompts" if config.prompts is not None else "resolution"
        raise UserError(f"{given}: {config.teacher!r} is a model of pixels, which has none to choose; leave it out")
    if encoded is not None:  # which say the size where nothing else does
        size = {name: encoded.size[name] if value is None else value for name, value in size.items()}
    teacher = load_teacher(config.teacher, null_class=config.null_class, dtype=dtype, conditions=encoded, **size)
    if config.frames is not None and len(teacher.shape) == 3:
        raise UserError(f"frames: {config.frames} was given, and {family.name} makes images; leave it out")
    if encoded is not None:
        check_encoded(encoded, folder, family, teacher.shape)
        if "guidance" in encoded.shards[0]:  # the student is to be called with what it was trained with
            told = {"guidance_scale": encoded.settings["embedded_guidance"]}
            teacher = dataclasses.replace(teacher, size=teacher.size | told)
    targets = family.lora_targets
    if config.adapter_targets is not None:
        named = [name.strip() for name in config.adapter_targets.split(",")]
        targets = None if named == ["all"] else tuple(named)
    settings = LoraSettings(config.adapter_rank, config.adapter_alpha, targets)
    lora = {role: settings for role in ("student", "fake_score") if getattr(config, role) == "lora"}
    return dataclasses.replace(teacher, lora=lora)


def _encoded(config: TrainConfig) -> Encoded:
    """The folder of `prompts`, which is made first in the run folder if it names a file of prompts."""
    if config.prompts is None:
        made = f"`diffdistill encode --teacher {config.teacher}`"
        raise UserError(f"prompts: {config.teacher!r} needs them; give a .txt, or a folder made by {made}")
    if Path(config.prompts).is_dir():
        return open_encoded(config.prompts)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"prompts: {config.prompts!r} with several processes; encode it first with `diffdistill encode`"
        )
    inside = Path(config.out) / "encoded"
    if not Path(config.prompts).exists() and inside.is_dir():
        return open_encoded(inside)
    options = {"teacher": config.teacher, "prompts": config.prompts, "device": config.device}
    size = {"resolution": config.resolution, "frames": config.frames}
    return open_encoded(encode(**options, **size, out=inside))


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
    if resume is None:
        refuse_a_run(out)  # before anything is loaded
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
    kept_bytes = sum(v.numel() * v.element_size() for m in method.state.values() for v in m.state_dict().values())
    export_bytes = sum(p.numel() * p.element_size() for p in teacher.denoiser.parameters()) + _parts_bytes(teacher)
    teacher.denoiser.to(accelerator.device)
    grids = grid_writer(out, method.sampler, teacher)
    trainer = Trainer(method, draw, config, out, accelerator, grids)
    if resume is not None:
        trainer.resume()
    sizes = {"kept_bytes": kept_bytes, "export_bytes": export_bytes}
    start_folder(out, game.options(), player_bytes, accelerator, resume=resume is not None, **sizes)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.evaluating():
            _export(game, out / "student", trainer.step)
    accelerator.end_training()
    return out / "student"


def _parts_bytes(teacher: Teacher) -> int:
    """What a student's folder holds besides the network; UserError where the teacher's is not whole."""
    entry = FAMILIES.get(teacher.family)
    if entry is None or entry.autoencoder is None:
        return 0
    parts = other_parts(local_folder(teacher.source), entry)
    return sum(file.stat().st_size for part in parts for file in part.rglob("*.safetensors"))


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
    encoded = game.teacher.conditions
    if isinstance(encoded, Encoded):
        if not encoded.has_images:
            raise UserError(
                f"prompts: {game.info.name} with these options needs images too; give a folder made by "
                "`diffdistill encode --data` from images with captions"
            )
        return None
    if FAMILIES[game.teacher.family].autoencoder is not None:
        raise UserError(f"prompts: {game.info.name} needs images; give a folder made by `diffdistill encode --data`")
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
    if FAMILIES[game.teacher.family].autoencoder is not None:
        encoded = game.teacher.conditions
        given = {"resolution": game.config.resolution, "frames": game.config.frames}
        metadata |= encoded.size if isinstance(encoded, Encoded) else given
        metadata["call"] = student_call(game.teacher, sampler)
    network = sampler.denoiser.network
    return save_pipeline(folder, game.teacher.family, network, scheduler, metadata, card, game.teacher.source)


def load_run(run: str | Path, step: int | None = None) -> tuple[Game, int]:
    """A run's parts with the student as its checkpoint at `step` (default: the last) has it, and that step."""
    run = Path(run)
    game = make_game(run_options(run) | {"out": str(run)})  # which may have been moved
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
