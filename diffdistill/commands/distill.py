"""`diffdistill train`: distill a teacher and save the student."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffdistill.catalogue import describe_recipe, recipes
from diffdistill.commands.export import check_exportable, export_student, parts_bytes
from diffdistill.commands.in_training import JudgedInTraining, check_judged
from diffdistill.commands.rewards import file_of, judge_of
from diffdistill.commands.run import Run
from diffdistill.config import TrainConfig
from diffdistill.data.batches import batches
from diffdistill.data.examples import Examples
from diffdistill.data.seen import decoder_of, with_texts
from diffdistill.environment import is_first_process
from diffdistill.errors import UserError, first_line, shown
from diffdistill.families import attention_of, check_weights, family_of, local_folder, public_name
from diffdistill.options import coerce, nearest
from diffdistill.pipelines.hub import upload
from diffdistill.pipelines.merged import loras_of, merged_name, merged_teacher
from diffdistill.pipelines.record import imitated_guidance
from diffdistill.players.quantized import bitsandbytes, quantize
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.scaffold.method import Batch, Method, Need
from diffdistill.scaffold.reward import Reward
from diffdistill.training.assemble import Game, data_for, load_run, load_student_into, make_game, pairs_for
from diffdistill.training.checkpoint import full_disk_said, load_checkpoint
from diffdistill.training.diagnosis import Diagnosis
from diffdistill.training.figures import Figures, usual_interval
from diffdistill.training.folder import check_prompts, refuse_a_run, resumed_options, start_folder
from diffdistill.training.grids import grid_writer
from diffdistill.training.inputs import Allowed, check_inputs, inputs_of
from diffdistill.training.launchers import block_names, divides
from diffdistill.training.lock import only_trainer
from diffdistill.training.looks import Look, watch
from diffdistill.training.preferences import preferred, reward_for
from diffdistill.training.recipe import Objects, recorded
from diffdistill.training.sharding import shard
from diffdistill.training.stopping import Interrupted
from diffdistill.training.trainer import Trainer, accelerator_for
from diffdistill.training.underneath import teacher_check
from diffdistill.training.views import in_two_views

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import TrainOptions


def distill(
    method: str | PathLike[str] | ModuleType | Callable[..., Method] | None = None,
    *,
    preset: str | None = None,
    recipe: str | None = None,
    resume: str | PathLike[str] | None = None,
    allow_change: Allowed = False,
    teacher: str | PathLike[str] | Teacher | None = None,
    data: str | PathLike[str] | Tensor | tuple[Tensor, Tensor] | Examples | None = None,
    pairs: str | PathLike[str] | Examples | None = None,
    losers: str | PathLike[str] | Tensor | Examples | None = None,
    teacher_data: str | PathLike[str] | Examples | None = None,
    reward: str | Reward | None = None,
    options: Mapping[str, float | int | str | bool | None] | DataclassInstance | None = None,
    **training: Unpack[TrainOptions],
) -> Run:
    """Distill a teacher into a few-step student, save it, and return the run.

    Args:
        method: a name (`diffdistill methods` lists them), a .py file or module of your own, or a class with a `Config`;
            default: 'dmd2'.
        preset: the method's named settings, e.g. its paper's; what is given besides goes first.
        recipe: in place of method and preset, a model's published settings (`diffdistill recipes` lists them), which
            say the teacher too; what is given besides goes first.
        resume: a run folder to continue from its last checkpoint. Few options may change then, `steps` among them;
            objects that the run began with are given again. UserError if the run would read anything else than when it
            began: other options in its config.yaml, another teacher, other data, prompts or pairs, another method.
        allow_change: go on with a changed run, and say in a note what has changed; or the names of what may be
            another, as in the line that refuses it: options, 'teacher-weights', 'data', 'method', ..
        teacher: a diffusers folder, a hub id, 'digits' (the default, embedded in the package), or `Teacher.around` a
            network of your own.
        data: what `open_data` opens; or a tensor (N, *shape) in the units of the teacher's samples, images in [-1, 1]
            as a rule; or (images, labels), labels int64 (N,); or any object with `__len__` and
            `get(indices) -> Example`. Without labels a class-conditional teacher is distilled as it is without a class.
        pairs: a folder made by `make_pairs`, or examples with pairs.
        losers: of pairs of which one is better, the worse, row by row as `data` or `prompts` has the better.
        teacher_data: the samples of `data` or `prompts` once more, with the conditions that the teacher sees in place
            of the student's.
        reward: a function (images, conditions) -> a number for each image, higher is better, or 'FILE.py:FUNCTION' (see
            `scaffold.reward.Reward`), for methods and options that need one.
        options: the method's own, by name, or an instance of its `Config`.
        training: the options of every training (`diffdistill train --help`): steps, batch_size, out, ...

    Without `steps`, preset and recipe a method with stages takes all of them, any other 1000. Raises UserError for
    whatever cannot be used.
    """
    named = {"method": method, "preset": preset, "recipe": recipe, "teacher": teacher, "data": data, "pairs": pairs}
    named |= {"losers": losers, "teacher_data": teacher_data, "reward": reward}
    values, objects = Objects.split(named | dict(training), options)
    return distill_values(values, objects, None if resume is None else Path(resume), allow_change)


def distill_values(
    values: dict[str, Any], objects: Objects, resume: Path | None = None, allow_change: Allowed = False
) -> Run:
    """`distill` with the options as the command line and YAML have them: all in one mapping."""
    whole = is_whole(values)
    if resume is not None:
        values = resumed_options(resume, values, objects.named, allow_change)
    elif allow_change:
        raise UserError("allow_change: it is for a run that is resumed; give --resume RUN")
    else:
        values = with_settings(values, objects) | dict(objects.named)
    out = Path(str(values.get("out", TrainConfig.out)))
    if resume is None:  # before anything is loaded
        if objects.teacher is None:
            check_weights(str(values.get("teacher", TrainConfig.teacher)))
        refuse_a_run(out)
    with only_trainer(out, "out" if resume is None else "resume"):
        if resume is not None:
            check_prompts(resume, values.get("prompts"), allow_change)
        values = _with_merged(values, objects, out)
        # Networks are divided in place: one's own teacher stays whole.
        parts = replace(objects, teacher=copy.deepcopy(objects.teacher)) if divides() else objects
        start = None if resume is None else values.pop("start", None)  # which the checkpoint stands for
        game = make_game(values, parts, deriving=resume is None and not whole)
        if start is not None:
            game.config = replace(game.config, start=start)
        game.objects = objects
        _check_options(game, values, resumed=resume is not None)
        if game.config.teacher_bits and divides():
            raise UserError("teacher_bits: layers of few bits are not divided by FSDP; launch without it")
        if game.config.teacher_bits:
            bitsandbytes()  # which is missed now, and not later
        check_exportable(game, game.config)  # a student that cannot be saved is refused now
        check_judged(game, divides())
        _note_on_stages(game)
        if resume is None and not whole:
            _note_on_recipes(game)
        saved = _train(game, out, resume is not None, allow_change)
    if saved:
        upload(out / "student", game.config)
    return Run(out, objects.teacher)


def _with_merged(values: dict[str, Any], objects: Objects, out: Path) -> dict[str, Any]:
    """The options with the folder of base and LoRA for the teacher, which is made in the run's own."""
    files = coerce("teacher_lora", list(values.pop("teacher_lora", ())), tuple[str, ...], {})
    if not files:
        return values
    if objects.teacher is not None:
        raise UserError("teacher_lora: it is for a teacher that is a folder or a hub id; merge it into yours")
    base, loras = str(values.get("teacher", TrainConfig.teacher)), loras_of(files)
    return values | {"teacher": str(merged_teacher(base, loras, out / merged_name(base, loras)))}


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether the options name a whole setting, with which nothing is derived from the teacher."""
    return values.get("preset") is not None or values.get("recipe") is not None


def with_settings(values: dict[str, Any], objects: Objects) -> dict[str, Any]:
    """The options with those of the preset or recipe that they name.

    UserError for one that is not known, has no `steps`, or is for another teacher or method.
    """
    values = dict(values)
    if "recipe" in values:
        return _with_recipe(values, coerce("recipe", values.pop("recipe"), str, {}), objects)
    if "preset" not in values:
        return values
    preset = coerce("preset", values.pop("preset"), str, {})
    presets = objects.method_of(values, TrainConfig.method).presets
    if preset not in presets:
        raise UserError(f"preset: {preset!r} is not known; {nearest(preset, presets)}")
    values = dict(presets[preset].options) | values
    if values["steps"] is None:
        raise UserError(f"steps: the source of the preset {preset!r} has no number of them; give steps")
    return values


def _with_recipe(values: dict[str, Any], name: str, objects: Objects) -> dict[str, Any]:
    recipe = describe_recipe(name)
    if "preset" in values:
        raise UserError(f"preset: the recipe {name!r} has all settings; leave --preset or --recipe out")
    if objects.recipe is not None or values.get("method", recipe.method) != recipe.method:
        raise UserError(f"method: the recipe {name!r} is of {recipe.method}; leave the method out, or the recipe")
    values = recipe.options | values
    if values["steps"] is None:
        raise UserError(f"steps: the source of the recipe {name!r} has no number of them; give steps")
    if objects.teacher is None:  # configs alone are read, also of a hub's
        teacher = str(values["teacher"])
        family, _ = family_of(local_folder(teacher, weights=False))
        if family.name != recipe.family:
            fitting = ", ".join(_recipes_for(family.name, teacher)[:4]) or "none"
            raise UserError(
                f"recipe: {name!r} is for teachers of {recipe.family}, and {shown(teacher)} is one of {family.name}, "
                f"for which there are: {fitting}"
            )
    return values


def _recipes_for(family: str, teacher: str) -> list[str]:
    """The names of the recipes for a teacher: for its model where that is known by name, else for its family."""
    name, fitting = public_name(teacher).lower(), [each for each in recipes().values() if each.family == family]
    own = [each for each in fitting if any(part in name for part in each.known_by)]
    return [each.name for each in own or fitting]


def _note_on_recipes(game: Game) -> None:
    names = [] if game.family is None else _recipes_for(game.family.name, game.config.teacher)
    if names and is_first_process():
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        print(f"note: published settings for this kind of teacher, by --recipe: {listed}", file=sys.stderr)


def _check_options(game: Game, values: Mapping[str, Any], resumed: bool) -> None:
    """UserError where a resumed run is given another Config than it began with."""
    if resumed and game.objects.options is not None:
        for name, value in recorded(game.method_config).items():
            if values.get(name) != value:
                raise UserError(f"{name}: the run began with {values.get(name)!r}, and options say {value!r}")


def _note_on_stages(game: Game) -> None:
    whole, steps = game.method.whole, game.config.steps
    if whole is not None and steps != whole and "stage_steps" not in game.derived:
        rests = all(turn.lr_factor == 0 for turn in game.method.turns(whole))
        after = "the rest trains nothing" if rests else "the last stage goes on in the rest"
        end = "it stops at an earlier stage" if steps < whole else after
        name = game.recipe.name
        print(f"note: all stages of {name} take {whole} steps and steps is {steps}: {end}", file=sys.stderr)


def _train(game: Game, out: Path, resumed: bool, allow_change: Allowed) -> bool:
    """Train and save the student; returns whether this is the process that saved it."""
    config, method, teacher = game.config, game.method, game.teacher
    accelerator = accelerator_for(config, out, may_divide=True)
    main = accelerator.is_main_process
    data = in_two_views(game, preferred(game, data_for(game)))
    pairs = pairs_for(game, config.batch_size * accelerator.num_processes)
    reward = reward_for(game)
    if reward is not None and game.encoded is not None and game.encoded.null and data is game.encoded:
        data = game.encoded = with_texts(game.encoded)
    draw = batches(config, teacher, data, accelerator, pairs=pairs)
    if reward is not None:
        _set_reward(game, reward, draw)
    if Need.DECODER in method.needs:
        method.decode = decoder_of(teacher)
    player_bytes = sum(p.numel() * p.element_size() for m in method.players.values() for p in m.parameters())
    kept_bytes = sum(v.numel() * v.element_size() for m in method.state.values() for v in m.state_dict().values())
    export_bytes = sum(p.numel() * p.element_size() for p in teacher.denoiser.parameters()) + parts_bytes(game)
    inputs = inputs_of(
        game.options(), data=data, teacher=teacher, prompts=game.encoded, noise_pairs=pairs, method=game.recipe.source,
        reward=file_of(reward) if isinstance(reward, str) else reward,
    )  # fmt: skip
    note = check_inputs(out, inputs, allow_change) if resumed else None
    if note and main:
        print(note, file=sys.stderr)
    networks = nn.ModuleList([teacher.denoiser, *method.players.values(), *method.state.values()])
    if config.teacher_bits:
        quantize(teacher.denoiser.network, config.teacher_bits, getattr(torch, config.teacher_dtype))
    if divides():  # before they are moved, for which a whole network may be too large
        shard([*networks, *([teacher.start] if teacher.start else [])], accelerator.device, block_names())
    with attention_of(networks, config.attention):
        shown = data if game.family is None and teacher.num_classes is None else game.encoded
        grids = grid_writer(out, method.sampler, teacher, shown, saving=main)
        starts = [teacher.start] if teacher.start else []
        trainer = Trainer(method, draw, config, out, accelerator, grids, [teacher.denoiser, *starts])
        mapped = not divides() and not config.teacher_bits  # which leave nothing mapped to the files
        if mapped or main:
            fingerprint = inputs["fingerprints"]["teacher's weights"] if mapped else None
            trainer.before_save = teacher_check(teacher, fingerprint)
        first = method.sampler()  # a resumed stage takes other levels, and looks compare with the beginning
        if resumed:
            trainer.resume(allow_change)
        looks = (main or divides()) and trainer.step < config.steps
        look = _look(game, first, shown) if looks else None
        sizes = {"kept_bytes": kept_bytes, "export_bytes": export_bytes}
        start_folder(out, game.options(), player_bytes, accelerator, inputs, resume=resumed, **sizes)
        trainer.on_look = lambda step: None
        if looks:
            _diagnose(game, trainer, look, main)
        if config.judge_every:
            trainer.judge = JudgedInTraining(game, out, accelerator)
        trainer.fit()
        if main:
            with trainer.offload.on_host():
                _export(game, trainer)
    accelerator.wait_for_everyone()  # the student is there, in all processes
    accelerator.end_training()
    return main


def _set_reward(game: Game, reward: str | Reward, draw: Callable[[int], Batch]) -> None:
    """Let the method be told the reward, which is tried first; UserError where it does not give what it should."""
    game.method.reward = judge_of(reward, game.teacher)
    tried = draw(0).parts(game.config.accumulate)[0]
    game.method.scored(tried.randn("reward").requires_grad_(), tried)


def _diagnose(game: Game, trainer: Trainer, look: Look | None, main: bool) -> None:
    """Say what was derived and, with a look, what the teacher gives; looks, figures and warnings from here on."""
    config, method = game.config, game.method
    for name, (value, reason) in game.derived.items() if main else ():
        print(f"{name}: {value} ({reason})")
    if look is None:
        return
    drawing, done = config.sample_every > 0, trainer.step
    own = {f.name for f in fields(game.method_config)}
    trainer.on_look = watch(
        trainer.out, look, method.sampler, config.steps, done=done, drawing=drawing, saving=main, options=own
    )
    every = config.figures_every
    if every is None:
        every = usual_interval(look, method, config.batch_size, config.log_every)
    trainer.figures = Figures(look, method, every)
    trainer.warn = Diagnosis(config.steps, look.measures(look.before), look.relearns, own).add


def _export(game: Game, trainer: Trainer) -> None:
    """Save the student as it stands, or as it was at its best judging."""
    config, out, step = game.config, trainer.out, trainer.step
    # Of divided players this process has a share, and a base of few bits takes no LoRA: a run from its files has both.
    if trainer.divided or config.teacher_bits:
        whole, _ = load_run(out, step, game.objects)
        with full_disk_said(out):
            export_student(whole, out / "student", step, saving=config)
        return
    if config.export_best and trainer.best is not None and trainer.best[0] != step:
        step, value = trainer.best
        path = out / "checkpoints" / f"step-{step:08d}"
        tensors, _ = load_checkpoint(path)
        load_student_into(game.method, tensors, path)
        print(
            f"the student is that of step {step}, the best that was judged ({value:.4g}); --export-best false: the last"
        )
        with full_disk_said(out):
            export_student(game, out / "student", step, saving=config)
        return
    with trainer.evaluating(), full_disk_said(out):
        export_student(game, out / "student", step, saving=config)


def _look(game: Game, sampler: Sampler, shown: Examples | None) -> Look | None:
    """Of a student as it is sampled at first; None of one that restores images.

    The first use of the teacher's network; UserError where it fails.
    """
    if game.recipe.about.kind == "restoration":  # to which the teacher's samples are no measure
        return None
    scale = imitated_guidance(sampler.denoiser, game.options()).scale
    try:
        return Look(game.teacher, sampler, shown, scale)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if game.objects.teacher is not None:  # one's own code, whose traceback says more
            raise
        raise UserError(
            f"teacher: the network of {game.config.teacher!r} cannot be called ({first_line(error)}); give "
            "a folder whose config.json fits its weights and the installed diffusers"
        ) from error


def run(values: dict[str, Any]) -> int:
    """The command; `values` are those of the command line and of a YAML file."""
    resume, allow_change = values.pop("resume", None), values.pop("allow_change", False)
    try:
        result = distill_values(values, Objects(), None if resume is None else Path(resume), allow_change)
    except Interrupted as stopped:
        if is_first_process():
            print(stopped.line("train"), file=sys.stderr)
        return stopped.code
    if not is_first_process():
        return 0
    from diffdistill.eval.choice import suggestion

    print(f"saved {result.student}\n{suggestion(result.folder)}")
    if values.get("push_to_hub"):
        print(f"uploaded to {values['push_to_hub']}")
    return 0
