"""From options to teacher, data, pairs and method."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import TrainConfig, run_options
from diffdistill.core.denoiser import Denoiser
from diffdistill.core.guidance import with_second_scale
from diffdistill.core.weightless import Weightless, filled
from diffdistill.data.batches import check_data
from diffdistill.data.encoded import (
    Bucketed,
    Encoded,
    check_encoded,
    check_negative,
    encode,
    open_encoded,
    with_prompts,
)
from diffdistill.data.examples import Examples, TensorExamples, as_examples
from diffdistill.data.images import Data, open_data
from diffdistill.data.pairs import check_pairs, open_pairs
from diffdistill.data.unreadable import skipping
from diffdistill.environment import process_count
from diffdistill.errors import UserError
from diffdistill.families import (
    FAMILIES,
    Family,
    StudentRecord,
    family_of,
    load_pipeline,
    load_teacher,
    local_folder,
    prompt_of,
    record_of,
    with_null,
)
from diffdistill.options import TeacherGuidance, build, split
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.lora import LoraSettings, is_lora
from diffdistill.players.recomputing import checkpoint_activations
from diffdistill.players.teacher import Teacher
from diffdistill.rng import seed_for
from diffdistill.scaffold.chains import GuidedChains
from diffdistill.scaffold.method import Method, Need
from diffdistill.training.checkpoint import checkpoints, load_checkpoint, load_into, load_newest, state_tensors, step_of
from diffdistill.training.derived import Derived, Situation, derive
from diffdistill.training.recipe import READ, Objects, Recipe, recorded, shallow
from diffdistill.training.starting import levels_of_start, note_other_steps, of_another_size, with_start

NO_OBJECTS = Objects()
_PROMPT = "a photograph of a red fox that stands in deep snow, with the low sun of the evening behind it"
_FEW_STEPS = 8  # of a student that is no denoiser between its own levels


@dataclasses.dataclass
class Game:
    """A distillation's parts, put together from its options."""

    config: TrainConfig
    recipe: Recipe
    method_config: Any
    teacher: Teacher
    method: Method
    encoded: Encoded | None = None  #: prompts of a latent teacher, with latents if there are any
    objects: Objects = dataclasses.field(default_factory=Objects)
    derived: Mapping[str, Derived] = dataclasses.field(default_factory=dict)  #: options that the teacher has given

    def options(self) -> dict[str, Any]:
        """The resolved options, for run folders and model cards."""
        return dataclasses.asdict(self.config) | recorded(self.method_config)

    @property
    def family(self) -> Family | None:
        """The teacher's family; None for a network that diffusers does not know."""
        return FAMILIES.get(self.teacher.family)


def make_game(
    values: Mapping[str, Any], objects: Objects = NO_OBJECTS, *, deriving: bool = False, weights: bool = True
) -> Game:
    """Teacher and method from the options of `diffdistill train`, nothing trained yet.

    Where `steps` is not among the options, a method with stages takes all of them. With `deriving`, options that are
    not there are derived from the teacher where there is a rule (`training.derived`). Without `weights` the teacher is
    made of its configs, on the meta device, and prompts need not be encoded.
    """
    recipe = objects.method_of(values, TrainConfig.method)
    values = {**recipe.about.defaults, **values}
    shared, own = split(values, TrainConfig, recipe.config)
    config, method_config = build(TrainConfig, shared), objects.method_options(recipe, own)
    objects.require_objects({name: value for name, value in values.items() if name not in READ})
    if objects.teacher is None:
        teacher, encoded = _teacher(config, weights, tuned=recipe.about.kind == "preference")
    else:
        teacher, encoded = _own_teacher(config, objects.teacher), None
    if config.start is not None:
        teacher = with_start(config, teacher)
        values = values | levels_of_start(values, teacher, recipe)
        _, own = split(values, TrainConfig, recipe.config)
        method_config = objects.method_options(recipe, own)
    derived: dict[str, Derived] = {}
    if deriving:
        chosen = shallow(config) | shallow(method_config)
        given = {name: chosen[name] for name in values} | ({} if objects.options is None else shallow(method_config))
        derived = derive(Situation(teacher, recipe.config, given, config.steps))
        shared, own = split({**values, **{n: d.value for n, d in derived.items()}}, TrainConfig, recipe.config)
        config, method_config = build(TrainConfig, shared), objects.method_options(recipe, own)
    teacher = _guided_at_two(teacher, method_config)
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    method = recipe.make(teacher, method_config)
    if config.start is not None:
        note_other_steps(config.start, teacher, method.sampler())
    if "steps" not in values and method.whole is not None:
        config = dataclasses.replace(config, steps=method.whole)
    if method.shortest is not None and config.steps < method.shortest:
        raise UserError(
            f"steps: {config.steps} do not bring a student of {recipe.name} to its teacher, which takes "
            f"{method.shortest}; give more of them, or shorter stages"
        )
    if encoded is not None:  # which may say what the options do not
        config = dataclasses.replace(config, negative_prompt=encoded.settings.get("negative_prompt"))
    check_lora(teacher, method, recipe.name)
    exported = getattr(method.players[method.exported], "network", None)
    if teacher.small is not None and isinstance(exported, AdaptedNetwork):
        raise UserError(f"student: {recipe.name} trains adapters on the teacher's own network; leave student out")
    check_bits(config, method_config)
    if config.gradient_checkpointing:
        parts = [part for player in method.players.values() for part in player.modules()]
        for network in {part.network for part in parts if isinstance(part, Denoiser)}:
            checkpoint_activations(network)
    return Game(config, recipe, method_config, teacher, method, encoded, objects, derived)


def _teacher(config: TrainConfig, weights: bool, tuned: bool) -> tuple[Teacher, Encoded | None]:
    """The teacher with the settings of its LoRA players, and its encoded prompts if it has any.

    `tuned`: it is a student that goes on.
    """
    folder = local_folder(config.teacher, weights)
    family, _ = family_of(folder)
    dtype = getattr(torch, config.teacher_dtype)
    size: dict[str, Any] = {"resolution": config.resolution, "frames": config.frames}
    encoded: Encoded | None = None
    if family.autoencoder is not None:
        needed = family.conditions == "text" and weights
        encoded = _encoded(config) if config.prompts is not None or needed else None
    elif config.prompts is not None or config.resolution is not None:
        option = "prompts" if config.prompts is not None else "resolution"
        raise UserError(f"{option}: {config.teacher!r} is a model of pixels, which takes no {option}; leave it out")
    if config.negative_prompt is not None and family.text is None:
        raise UserError(f"negative_prompt: {config.teacher!r} takes no prompts; leave it out")
    if encoded is not None:  # which say the size where nothing else does
        size = {name: encoded.size[name] if value is None else value for name, value in size.items()}
    teacher = load_teacher(config.teacher, null_class=config.null_class, dtype=dtype, weights=weights, **size)
    record = record_of(config.teacher)
    if isinstance(record, StudentRecord):
        teacher = dataclasses.replace(teacher, levels=record.levels, move=record.move)
    if isinstance(record, StudentRecord) and len(record.levels) <= _FEW_STEPS and not tuned:
        of = f"'{record.teacher}', which it was distilled from"
        print(
            f"note: teacher: {config.teacher!r} is itself a student of {len(record.levels)} steps ({record.method}), "
            f"and knows little between them; the usual teacher is {of}",
            file=sys.stderr,
        )
    if config.frames is not None and len(teacher.shape) == 3:
        raise UserError(f"frames: {config.frames} was given, and {family.name} makes images; leave it out")
    if encoded is not None:
        check_encoded(encoded, folder, family, teacher.shape)
        check_negative(encoded, config.negative_prompt)
        teacher = with_prompts(teacher, encoded)
        if "guidance" in encoded.shards[0]:  # the student is to be called with what it was trained with
            guidance = {"guidance_scale": encoded.settings["embedded_guidance"]}
            teacher = dataclasses.replace(teacher, size=teacher.size | guidance)
    elif family.text is not None:
        teacher = _with_a_prompt(teacher, folder, family)
    lora = lora_settings(config, family.lora_targets)
    if config.student is not None:
        if "student" in lora:
            raise UserError("lora: a student of its own (--student) is trained whole; leave student out of lora")
        teacher = dataclasses.replace(teacher, small=of_another_size(config.student, teacher, weights, **size))
    return dataclasses.replace(teacher, lora=lora), encoded


def _guided_at_two(teacher: Teacher, own: Any) -> Teacher:
    """The teacher, of two networks guided at two scales where the method's options say so."""
    if not isinstance(own, TeacherGuidance):
        return teacher
    scales = (own.guidance_scale, own.guidance_scale_2)
    return dataclasses.replace(teacher, denoiser=with_second_scale(teacher.denoiser, *scales))


def _with_a_prompt(teacher: Teacher, folder: Path, family: Family) -> Teacher:
    """The teacher with conditions of the shapes that a prompt's have, by text encoders without weights."""
    assert family.text is not None
    unread = family.networks if family.reads_image else (*family.networks, "vae")
    encoders, empty = load_pipeline(folder, leave_out=unread, weights=False), Weightless()
    empty.bare(part for part in encoders.components.values() if isinstance(part, nn.Module))
    prompt = prompt_of(family, folder, teacher)
    with empty, torch.no_grad():
        made = family.text.encode(encoders, [_PROMPT], prompt), family.text.null(encoders, prompt)
    cond, null = ({name: filled(value) for name, value in part.items()} for part in made)
    with_null(teacher.denoiser, null)
    return dataclasses.replace(teacher, example_cond=cond)


def _own_teacher(config: TrainConfig, teacher: Teacher) -> Teacher:
    """A teacher that Python gave, with the settings of its LoRA players; UserError for options of teachers by name."""
    defaults = TrainConfig()
    for name in (
        "student",
        "prompts",
        "resolution",
        "frames",
        "null_class",
        "teacher_dtype",
        "teacher_bits",
        "negative_prompt",
    ):
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(
                f"{name}: it is for a teacher that is given by name; leave it out with a teacher as an object"
            )
    entry = FAMILIES.get(teacher.family)
    usual = None if entry is None else entry.lora_targets
    return dataclasses.replace(teacher, lora=lora_settings(config, usual))


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


def check_bits(config: TrainConfig, own: Any) -> None:
    """UserError for what does not go with layers of few bits."""
    if config.teacher_bits is None:
        return
    if config.offload in ("model", "group"):
        raise UserError(f"offload: {config.offload} does not move the layers of teacher_bits; use optimizer or none")
    if config.judge_every:
        raise UserError("judge_every: a training with teacher_bits is judged after it; export and eval its checkpoints")
    if getattr(own, "derivative", "central") not in ("central", "backward"):
        raise UserError(
            f"derivative: {own.derivative} asks for one that layers of teacher_bits do not have; use central"
        )


def _encoded(config: TrainConfig) -> Encoded:
    """The folder of `prompts`, which is made first in the run folder if it names a file of prompts."""
    if config.prompts is None:
        made = f"`diffdistill encode --teacher {config.teacher}`"
        raise UserError(
            f"prompts: none are given, and {config.teacher!r} needs them; give a .txt, or a folder made by {made}"
        )
    if Path(config.prompts).is_dir():
        return open_encoded(config.prompts)
    if process_count() > 1:
        raise UserError(
            f"prompts: {config.prompts!r} cannot be encoded by several processes; give a folder made by "
            "`diffdistill encode`"
        )
    inside = Path(config.out) / "encoded"
    if not Path(config.prompts).exists() and inside.is_dir():
        return open_encoded(inside)
    size = {"resolution": config.resolution, "frames": config.frames}
    source = {"prompts": config.prompts, "device": config.device, "out": inside}
    negative = config.negative_prompt
    return open_encoded(encode(teacher=config.teacher, negative_prompt=negative, **source, **size))


def data_for(game: Game) -> Examples | None:
    """What the method is trained on; None: class labels drawn uniformly."""
    encoded, needed, name = game.encoded, Need.IMAGES in game.method.needs, game.recipe.name
    game.objects.require_objects({"data": game.config.data})
    if game.objects.data is not None:
        return _own_data(game, game.objects.data)
    if encoded is not None:
        if needed and not encoded.has_images:
            raise UserError(
                f"prompts: {name} with these options needs images too; give a folder made by "
                "`diffdistill encode --data` from images with captions"
            )
        if isinstance(encoded, Bucketed):
            _check_buckets(game)
        return encoded
    if not needed:
        _check_drawn(game)
        return None
    if game.family is not None and game.family.autoencoder is not None:
        raise UserError(f"prompts: {name} needs images; give a folder made by `diffdistill encode --data`")
    if game.config.data is None:
        raise UserError(f"data: {name} with these options needs real images; give --data ({game.recipe.about.data})")
    if len(game.teacher.shape) != 3:
        raise UserError(
            f"data: the teacher's samples {tuple(game.teacher.shape)} are no images; give data as an object"
        )
    channels, height, width = game.teacher.shape
    opened = open_data(game.config.data, resolution=(height, width), channels=channels)
    data = skipping(opened, game.config.skip_unreadable)
    check_data(game.teacher, data)
    return data


def _check_drawn(game: Game) -> None:
    """UserError where a training draws its conditions itself, and the teacher takes others than class labels."""
    taken = "" if game.teacher.num_classes is not None else ", ".join(sorted(game.teacher.example_cond))
    if taken and Need.PAIRS not in game.method.needs:
        raise UserError(f"data: none say the conditions that the teacher takes ({taken}); give examples that have them")


def _check_buckets(game: Game) -> None:
    """UserError for a method that keeps samples of one size from step to step, or takes pairs, which are of one."""
    kept = any(isinstance(module, GuidedChains) for module in game.method.state.values())
    if kept or Need.PAIRS in game.method.needs:
        what = "the trajectories that it keeps" if kept else "pairs"
        raise UserError(
            f"prompts: {game.config.prompts!r} has buckets, and of {game.recipe.name} {what} are of one size; encode "
            "without --buckets"
        )


def _own_data(game: Game, data: Tensor | tuple[Tensor, Tensor] | Examples) -> Examples | None:
    """Data that Python gave, checked against the teacher; None where the method reads none of them."""
    teacher, name = game.teacher, game.recipe.name
    images_alone = isinstance(data, Tensor | tuple | Data)  # other examples may be conditions or pairs
    if images_alone and Need.IMAGES not in game.method.needs:
        _check_drawn(game)
        print(f"note: data: {name} with these options learns from the teacher alone and reads none", file=sys.stderr)
        return None
    if isinstance(data, tuple):
        images, labels = data
        data = TensorExamples(images, {"class_labels": labels.long()})
    examples = as_examples(data)
    if not isinstance(examples, TensorExamples) or teacher.num_classes is None or examples.cond:
        check_data(teacher, examples)
        if Need.IMAGES in game.method.needs and examples.get(torch.zeros(1, dtype=torch.int64)).x0 is None:
            raise UserError(
                f"data: {name} with these options needs samples, and the examples have no x0; give examples with x0"
            )
        return examples
    if teacher.denoiser.null is None:
        raise UserError(
            f"data: the tensor has no labels and the teacher has {teacher.num_classes} classes; give (images, labels)"
        )
    check_data(dataclasses.replace(teacher, num_classes=None), examples)
    print("note: data: the tensor has no labels, so that the teacher's 'no class' is distilled", file=sys.stderr)
    return TensorExamples(examples.x0, teacher.denoiser.null({"class_labels": torch.zeros(len(examples)).long()}))


def pairs_for(game: Game, least: int) -> Examples | None:
    """The noise-image pairs that the method needs, at least so many; None where it needs none."""
    folder, name, own = game.config.pairs, game.recipe.name, game.objects.pairs
    game.objects.require_objects({"pairs": folder})
    if Need.PAIRS not in game.method.needs:
        return None
    if own is not None:
        if own.get(torch.zeros(1, dtype=torch.int64)).pair is None:
            raise UserError(f"pairs: the examples of {type(own).__name__} have no pair; give examples with pair")
        if len(own) < least:
            raise UserError(f"pairs: there are {len(own)} and a step takes {least}; give more")
        return own
    data = game.objects.data
    if isinstance(data, Examples) and data.get(torch.zeros(1, dtype=torch.int64)).pair is not None:
        return None  # each batch has its own
    if folder is None:
        made = f"`diffdistill pairs --teacher {game.config.teacher} --out DIR`"
        raise UserError(f"pairs: {name} with these options needs noise-image pairs; make them with {made}")
    pairs = open_pairs(folder)
    check_pairs(game.teacher, pairs)
    if len(pairs) < least:
        raise UserError(f"pairs: {folder!r} holds {len(pairs)} and a step takes {least}; make more")
    if game.encoded is not None and pairs.settings["guidance_scale"] != 1:
        check_negative(game.encoded, pairs.settings.get("negative_prompt"), folder)
    _note_other_guidance(game.options(), pairs.settings, name)
    return pairs


def _note_other_guidance(options: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> None:
    """Say where pairs were made with another guidance than the method of that name has."""
    if options.get("guidance_scale") is None:
        return
    for option in ("guidance_scale", "guidance_scale_2"):
        own, theirs = options.get(option), settings.get(option)
        if own != theirs:
            said, other = ("none" if value is None else f"{value:g}" for value in (theirs, own))
            print(f"note: the pairs were made with {option} {said} and {name}'s is {other}", file=sys.stderr)


def load_run(run: str | Path, step: int | None = None, objects: Objects = NO_OBJECTS) -> tuple[Game, int]:
    """A run's parts with the student as its checkpoint at `step` (default: the last) has it, and that step.

    `objects` are those that the run began with.
    """
    run = Path(run)
    values = run_options(run) | {"out": str(run)}  # which may have been moved
    stored = {"prompts": str(run / "encoded")} if (run / "encoded").is_dir() else {}
    start = values.pop("start", None)  # which the checkpoint stands for
    game = make_game(values | stored, objects)  # the prompts' file may be another, or gone
    game.config = dataclasses.replace(game.config, prompts=values.get("prompts"), start=start)
    by_step = {step_of(path): path for path in checkpoints(run / "checkpoints")}
    if not by_step:
        raise UserError(f"run: {str(run)!r} has no checkpoint yet; train it until its first one")
    if step is None:
        newest = load_newest(run / "checkpoints")
        assert newest is not None
        path, tensors, record = newest
    elif step in by_step:
        path = by_step[step]
        tensors, record = load_checkpoint(path)
    else:
        raise UserError(f"step: no checkpoint at {step}; there are {', '.join(map(str, sorted(by_step)))}")
    load_student_into(game.method, tensors, path)
    return game, record["step"]


def load_student_into(method: Method, tensors: Mapping[str, dict[str, Tensor]], path: Path) -> None:
    """What is exported, as the checkpoint at `path` with these tensors has it: averaged, in evaluation mode."""
    try:
        for name, module in method.state.items():
            load_into(module, state_tensors(name, tensors), path)
        name = method.exported
        load_into(method.players[name].eval(), tensors[name] | tensors.get("average", {}), path)
    except KeyError as error:
        raise UserError(f"checkpoint: {path} is of other players ({error} is not in it)") from None
