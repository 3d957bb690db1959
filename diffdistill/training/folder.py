"""A run's folder: where it starts, and what may change when it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdistill.config import run_options
from diffdistill.data import encoded
from diffdistill.environment import environment
from diffdistill.errors import UserError
from diffdistill.files import atomic_write
from diffdistill.training.inputs import MAY_CHANGE, Allowed, allows, changed, plain_name, write_inputs
from diffdistill.training.trainer import Accelerator


def refuse_a_run(out: Path) -> None:
    """UserError if the folder holds a run already."""
    if (out / "config.yaml").exists():
        raise UserError(f"out: {str(out)!r} already holds a run; resume it with --resume {out}, or choose another")


def start_folder(
    out: Path,
    options: dict[str, Any],
    player_bytes: int,
    accelerator: Accelerator,
    inputs: Mapping[str, Any],
    *,
    resume: bool,
    kept_bytes: int = 0,
    export_bytes: int = 0,
) -> None:
    """Make the run folder with its resolved options, environment and `inputs`, and start the tracker.

    Fails here, not after the training, where the folder cannot be written or the disk has no room for the
    checkpoints: parameters, two moments and an average each, and what a method keeps besides (`kept_bytes`), of
    which one more than is kept exists at times; and for the student (`export_bytes`).
    """
    import yaml

    if accelerator.is_main_process:
        if not resume:
            refuse_a_run(out)
        existing = next(p for p in (out, *out.absolute().parents) if p.exists())
        kept = options["keep_checkpoints"] + 1 + bool(options.get("judge_every"))  # the best one too
        need = (4 * player_bytes + kept_bytes) * kept + export_bytes
        free = shutil.disk_usage(existing).free
        if free < need:
            raise UserError(f"out: {str(out)!r} has {free >> 20} MiB free and this run needs {need >> 20} MiB")
        try:
            atomic_write(out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            write_inputs(out, inputs)
            atomic_write(out / "config.yaml", yaml.safe_dump(options, sort_keys=False))
        except OSError as error:
            raise UserError(f"out: cannot write to {str(out)!r} ({error.strerror}); choose another --out") from None
    scalars = {k: str(v) if isinstance(v, list) else v for k, v in options.items() if v is not None}
    accelerator.init_trackers("diffdistill", config=scalars)  # TensorBoard takes neither None nor a list


def resumed_options(
    run: Path, values: dict[str, Any], objects: Mapping[str, str] | None = None, allow_change: Allowed = False
) -> dict[str, Any]:
    """A run folder's options, updated by `values`; UserError for one that cannot change on the way.

    With `allow_change` it can.

    `objects` are the recorded options that stand for what Python has given as an object again.
    """
    saved = run_options(run)
    for name, value in (objects or {}).items():
        if saved.get(name) != value:
            raise UserError(
                f"{name}: the run began with {saved.get(name)!r}, and {value.partition(':')[2]} was given; "
                "give the first again"
            )
    for name in values:
        if name not in MAY_CHANGE and not allows(allow_change, name):
            raise UserError(
                f"{name}: cannot change when a run is resumed, unless with --allow-change {plain_name(name)}; what can "
                f"is {', '.join(sorted(MAY_CHANGE))}"
            )
    return saved | values | {"out": str(run)}


def check_prompts(run: Path, prompts: str | None, allow_change: Allowed) -> None:
    """UserError if the file of prompts that a run has encoded is another now.

    With `allow_change` the old ones are removed, so that the new ones are encoded.
    """
    inside = run / "encoded"
    if prompts is None or not Path(prompts).is_file() or not (inside / encoded.KIND.index).is_file():
        return
    if encoded.is_of_prompts(inside, prompts):
        return
    if not allows(allow_change, "prompts"):
        raise changed("resume", f"the prompts of {prompts}", "prompts")
    shutil.rmtree(inside)
