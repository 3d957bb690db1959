"""`diffdistill train` and `export`: distill a teacher, save the student."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffdistill.catalogue import describe_method
from diffdistill.config import TrainConfig
from diffdistill.data.batches import batches
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, local_folder
from diffdistill.options import coerce, nearest
from diffdistill.pipelines.card import model_card
from diffdistill.pipelines.export import other_parts, save_pipeline
from diffdistill.pipelines.record import new_student_record
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.players.teacher import Teacher
from diffdistill.training.assemble import Game, _data_for, _pairs_for, load_run, make_game
from diffdistill.training.folder import refuse_a_run, resumed_options, start_folder
from diffdistill.training.grids import grid_writer
from diffdistill.training.trainer import Trainer, accelerator_for


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
        values = dict(presets[preset].options) | values
    out = Path(str(values.get("out", TrainConfig.out)))
    if resume is None:
        refuse_a_run(out)  # before anything is loaded
    game = make_game(values)
    config, method, teacher = game.config, game.method, game.teacher
    student_scheduler(teacher, method.sampler())  # a level that cannot be exported is refused now
    whole = method.whole
    if whole is not None and config.steps != whole:
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
    grids = grid_writer(out, method.sampler, teacher, game.encoded)
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


def _export(game: Game, folder: Path, step: int) -> Path:
    sampler = game.method.sampler()
    scheduler = student_scheduler(game.teacher, sampler)
    size = {"resolution": game.config.resolution, "frames": game.config.frames}
    size = size if game.encoded is None else game.encoded.size
    record = new_student_record(game.info.name, game.options(), game.teacher, sampler, step, **size)
    card = model_card(game.info, game.options(), game.teacher, sampler, step)
    network = sampler.denoiser.network
    return save_pipeline(folder, game.teacher.family, network, scheduler, record, card, game.teacher.source)


def export_run(run: str | Path, *, step: int | None = None, out: str | Path | None = None) -> Path:
    """Save a run's student from its checkpoint at `step` (default: the last); returns the folder."""
    game, step = load_run(run, step)
    return _export(game, Path(out) if out else Path(run) / "student", step)
