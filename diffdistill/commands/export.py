"""`diffdistill export`: save a run's student."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from diffdistill.config import SAVING, ExportConfig, SavingConfig
from diffdistill.core.experts import ClassExperts
from diffdistill.environment import use_machine
from diffdistill.errors import UserError
from diffdistill.families import local_folder
from diffdistill.options import build
from diffdistill.pipelines.card import model_card, own_card
from diffdistill.pipelines.export import SAVED, check_policies, check_saving, other_parts, save_network, save_pipeline
from diffdistill.pipelines.hub import check_upload, upload
from diffdistill.pipelines.record import new_student_record
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.pipelines.steps import other_steps
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.equilibrium import EquilibriumTransformer
from diffdistill.players.policy import PolicyDenoiser
from diffdistill.training.assemble import Game, load_run
from diffdistill.training.checkpoint import best_step
from diffdistill.training.inputs import Allowed, check_inputs, inputs_of
from diffdistill.training.recipe import Objects

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from diffdistill.commands.keywords import SavingOptions
    from diffdistill.players.teacher import Teacher
    from diffdistill.scaffold.method import Method

_READ = {"teacher's weights", "teacher's scheduler", "student's weights", "method"}  # an export reads no data


def export(
    run: str | PathLike[str],
    *,
    step: int | None = None,
    best: bool = False,
    student_steps: int | None = None,
    out: str | PathLike[str] | None = None,
    dtype: Literal["teacher", "float32", "bfloat16", "float16"] = "teacher",
    allow_change: Allowed = False,
    teacher: Teacher | None = None,
    method: ModuleType | Callable[..., Method] | None = None,
    **saving: Unpack[SavingOptions],
) -> Path:
    """Save a run's student from its checkpoint at `step` (default: the last); returns the folder.

    With `best` it is the best checkpoint by the judgings of the training.
    `student_steps` is in how many steps it is sampled, of a student that is trained for any number (default: that of
    the training). `out` is the folder to make, by default RUN/student; `dtype` is the type of the network's weights in
    it, by default that of the teacher's folder. `saving` are the options of how it is saved (`diffdistill export
    --help`): `export`, `parts`, `max_shard_size`, `layout`, and `push_to_hub` with `hub_private`, which uploads the
    folder. `teacher` and `method` are given again where the run began with objects. Raises UserError for a folder that
    is no run, a step without checkpoint, a number of steps that the student is not trained for, a student that cannot
    be saved so, an upload that fails, after which the folder is there, and, unless `allow_change`, for a run whose
    options, teacher or method are not those that it began with.
    """
    config: SavingConfig = build(SavingConfig, saving)
    if best:
        if step is not None:
            raise UserError(f"best: --step {step} names another checkpoint; give one of them")
        step = best_step(Path(run))
    _, objects = Objects.split({"teacher": teacher, "method": method}, None)
    game, step = load_run(Path(run), step, objects)
    now = inputs_of(game.options(), teacher=game.teacher, method=game.recipe.source)
    note = check_inputs(Path(run), now, allow_change, "export", _READ)
    if note:
        print(note, file=sys.stderr)
    if student_steps is not None:
        game.method.in_steps(student_steps)
    check_exportable(game, config)
    folder = Path(out) if out else Path(run) / "student"
    export_student(game, folder, step, None if dtype == "teacher" else dtype, config)
    upload(folder, config)
    return folder


def run(config: ExportConfig) -> None:
    """The command."""
    use_machine(config.device, config.threads)
    saving = {name: getattr(config, name) for name in SAVING}
    own = {name: getattr(config, name) for name in ("step", "best", "student_steps", "out", "dtype", "allow_change")}
    print(f"saved {export(config.run, **own, **saving)}")
    if config.push_to_hub is not None:
        print(f"uploaded to {config.push_to_hub}")


def check_exportable(game: Game, saving: SavingConfig = SAVED) -> None:
    """UserError for a student that cannot be saved, or uploaded, before it is trained."""
    sampler = game.method.sampler()
    if isinstance(sampler.denoiser, PolicyDenoiser):
        check_policies(game.family, saving)
    if game.family is not None:
        student_scheduler(game.teacher, sampler)
    elif isinstance(sampler.denoiser.network, AdaptedNetwork | ClassExperts | EquilibriumTransformer):
        raise UserError(
            f"method: a student of {game.recipe.name} is saved as a diffusers pipeline, and this teacher has none; "
            "give a teacher of diffusers"
        )
    check_saving(game.family, sampler.denoiser.network, saving)
    check_upload(saving, game.family, game.teacher.source)


def parts_bytes(game: Game) -> int:
    """What is copied into a student's folder besides the network; UserError where the teacher's is not whole."""
    if game.family is None or game.family.autoencoder is None:
        return 0
    parts = other_parts(local_folder(game.teacher.source), game.family)
    if game.config.parts != "copy" or game.config.export == "lora":
        return 0
    return sum(file.stat().st_size for part in parts for file in part.rglob("*.safetensors"))


def export_student(game: Game, folder: Path, step: int, dtype: str | None = None, saving: SavingConfig = SAVED) -> Path:
    """Save the student as it stands: as a diffusers folder, or weights and a record if diffusers lacks its network.

    `dtype` names the type of its weights; None: that of the teacher's folder. What `saving` says of an upload is left
    to the caller.
    """
    sampler, teacher, options = game.method.sampler(), game.teacher, game.options()
    size: dict[str, Any] = {"resolution": game.config.resolution, "frames": game.config.frames}
    size = size if game.encoded is None else game.encoded.size
    record = new_student_record(game.recipe.name, options, teacher, sampler, step, **size)
    network = sampler.network(teacher.shape, teacher.sample_cond(len(sampler.levels)))
    if game.family is None:
        return save_network(folder, teacher, network, record, own_card(game.recipe, options, teacher, sampler, step))
    described = partial(
        model_card, game.recipe, options, teacher, sampler, step, dtype, place=saving.push_to_hub, layout=saving.layout
    )

    scheduler, others = student_scheduler(teacher, sampler), other_steps(game.method, teacher)

    def card(form: str, made: Path) -> str:
        return described(form=form, folder=made, others=others.schedulers if form == "pipeline" else ())

    source = teacher.source
    return save_pipeline(folder, teacher.family, network, scheduler, record, card, source, dtype, saving, others)
