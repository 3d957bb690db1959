"""From options to teacher, data, pairs and method."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffdistill.catalogue import MethodInfo, describe_method
from diffdistill.config import TrainConfig, run_options
from diffdistill.core.denoiser import Denoiser
from diffdistill.data.batches import check_data
from diffdistill.data.encoded import Encoded, check_encoded, encode, open_encoded, with_prompts
from diffdistill.data.examples import Examples
from diffdistill.data.images import open_data
from diffdistill.data.pairs import Pairs, check_pairs, open_pairs
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, family_of, load_teacher, local_folder
from diffdistill.options import build, split
from diffdistill.players.lora import LoraSettings, checkpoint_activations, is_lora
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for
from diffdistill.scaffold.method import Method, Need
from diffdistill.training.checkpoint import checkpoints, load_checkpoint, load_into


@dataclasses.dataclass
class Game:
    """A distillation's parts, put together from its options."""

    config: TrainConfig
    info: MethodInfo
    method_config: Any
    teacher: Teacher
    method: Method
    encoded: Encoded | None = None  #: prompts of a latent teacher, with latents if there are any

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config) | dataclasses.asdict(self.method_config)


def make_game(values: dict[str, Any]) -> Game:
    """Teacher and method from the options of `diffdistill train`, nothing trained yet."""
    info = describe_method(str(values.get("method", TrainConfig.method)))
    shared, own = split({**info.about.defaults, **values}, TrainConfig, info.config)
    config, method_config = build(TrainConfig, shared), build(info.config, own)
    module = info.load()
    teacher, encoded = _teacher(config)
    # The method's own Config has the same fields; the one read from source served only to parse options.
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    method = module.METHOD(teacher, module.Config(**dataclasses.asdict(method_config)))
    check_lora(teacher, method, info.name)
    if config.gradient_checkpointing:
        parts = [part for player in method.players.values() for part in player.modules()]
        for network in {part.network for part in parts if isinstance(part, Denoiser)}:
            checkpoint_activations(network)
    return Game(config, info, method_config, teacher, method, encoded)


def _teacher(config: TrainConfig) -> tuple[Teacher, Encoded | None]:
    """The teacher with the settings of its LoRA players, and its encoded prompts if it has any."""
    folder = local_folder(config.teacher)
    family, _ = family_of(folder)
    dtype = getattr(torch, config.teacher_dtype)
    size = {"resolution": config.resolution, "frames": config.frames}
    encoded: Encoded | None = None
    if family.autoencoder is not None:
        encoded = _encoded(config) if config.prompts is not None or family.conditions == "text" else None
    elif config.prompts is not None or config.resolution is not None:
        option = "prompts" if config.prompts is not None else "resolution"
        raise UserError(f"{option}: {config.teacher!r} is a model of pixels, which has none to choose; leave it out")
    if encoded is not None:  # which say the size where nothing else does
        size = {name: encoded.size[name] if value is None else value for name, value in size.items()}
    teacher = load_teacher(config.teacher, null_class=config.null_class, dtype=dtype, **size)
    if config.frames is not None and len(teacher.shape) == 3:
        raise UserError(f"frames: {config.frames} was given, and {family.name} makes images; leave it out")
    if encoded is not None:
        check_encoded(encoded, folder, family, teacher.shape)
        teacher = with_prompts(teacher, encoded)
        if "guidance" in encoded.shards[0]:  # the student is to be called with what it was trained with
            guidance = {"guidance_scale": encoded.settings["embedded_guidance"]}
            teacher = dataclasses.replace(teacher, size=teacher.size | guidance)
    return dataclasses.replace(teacher, lora=lora_settings(config, family.lora_targets)), encoded


def lora_settings(config: TrainConfig, usual: Sequence[str] | None) -> dict[str, LoraSettings]:
    """By role, for those that are LoRA; `usual` are the layers that have it unless the options name others."""
    roles = [role.strip() for role in (config.lora or "").split(",") if role.strip()]
    targets = usual
    if config.lora_targets is not None:
        names = tuple(name.strip() for name in config.lora_targets.split(","))
        targets = None if names == ("all",) else names
    return {role: LoraSettings(config.lora_rank, config.lora_alpha, targets) for role in roles}


def check_lora(teacher: Teacher, method: Method, name: str) -> None:
    """UserError for a role that was to be LoRA and is no player, or one that the method makes in its own way."""
    players = {role: list(player.modules()) for role, player in method.players.items()}
    able = [role for role, parts in players.items() if role in teacher.lora and any(map(is_lora, parts))]
    for role in teacher.lora:
        if role not in able:
            raise UserError(
                f"lora: {name} has no player {role!r} that can be LoRA; its players are {', '.join(players)}"
            )


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


def _data_for(game: Game) -> Examples | None:
    """What the method is trained on; None: class labels drawn uniformly."""
    encoded, needed = game.encoded, Need.IMAGES in game.method.needs
    if encoded is not None:
        if needed and not encoded.has_images:
            raise UserError(
                f"prompts: {game.info.name} with these options needs images too; give a folder made by "
                "`diffdistill encode --data` from images with captions"
            )
        return encoded
    if not needed:
        return None
    if FAMILIES[game.teacher.family].autoencoder is not None:
        raise UserError(f"prompts: {game.info.name} needs images; give a folder made by `diffdistill encode --data`")
    if game.config.data is None:
        raise UserError(
            f"data: {game.info.name} with these options needs real images; give --data ({game.info.about.data})"
        )
    channels, size = game.teacher.shape[0], game.teacher.shape[1]
    data = open_data(game.config.data, resolution=size, channels=channels)
    check_data(game.teacher, data)
    return data


def _pairs_for(game: Game, needed: int) -> Pairs | None:
    if Need.PAIRS not in game.method.needs:
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
    name = game.method.exported
    student = game.method.players[name]
    load_into(student.eval(), tensors[name] | tensors.get("average", {}), found[step])
    return game, step
