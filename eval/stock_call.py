"""How a stock pipeline is called: a student's own call, or a number of steps with guidance in the pipeline's units."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdistill.core.guidance import check_second_scale, refuse_second_scale
from diffdistill.errors import UserError
from diffdistill.families import (
    Family,
    StudentRecord,
    TeacherRecord,
    describe,
    diffusers_class,
    read_json,
    read_record,
)
from diffdistill.families._folders import boundary_of
from diffdistill.families._parts import both_sides, one_side, part_config

LATENT_STEPS = 20  # of a teacher, where the user says nothing


def stock_call(
    path: Path,
    family: Family | None,
    steps: int | None,
    guidance_scale: float | None,
    negative: str | None = None,
    second: float | None = None,
) -> dict[str, Any]:
    """Arguments of a stock pipeline's call: a student's own, or a number of steps with guidance off or in its units.

    `negative` is the negative prompt of a guided one, `second` the scale of the second of two networks. Raises
    UserError where they would change nothing.
    """
    record = read_record(path)
    size: Mapping[str, Any] = _own_size(path, family) if family is not None and record is None else {}
    reads = family is not None and family.reads_image and not isinstance(record, StudentRecord)
    if reads or (isinstance(record, TeacherRecord) and record.frames):
        size = describe(path).size  # which the pipeline would take from its image, or its makers' defaults
    own = None if record is None or isinstance(record, TeacherRecord) else record.call
    others = {} if steps is None else {"num_inference_steps": steps}  # of a pipeline with a default of its own
    call = {**(own or (family.arguments(steps or LATENT_STEPS) if family else others)), **size}
    if negative is not None and guidance_scale is None and family is not None and own is None:
        raise UserError("negative_prompt: without guidance it changes nothing; give --guidance-scale too")
    if guidance_scale is not None:
        call |= guidance_call(family, guidance_scale, negative, true_cfg="true_cfg_scale" in call)
    elif negative is not None:
        call["negative_prompt"] = negative
    if second is not None:
        if family is None or boundary_of(family, read_json(path / "model_index.json")) is None:
            refuse_second_scale(second, repr(str(path)))
        check_second_scale(guidance_scale, second)
        call["guidance_scale_2"] = second
    return call


def _own_size(path: Path, family: Family) -> dict[str, int]:
    """Height and width of a network made for another than a square, which not all stock pipelines read in its config.

    UserError where the config leaves the pipeline without a size.
    """
    size = 1 if family.autoencoder is None else part_config(path / family.component).get("sample_size", 1)
    if size is None:
        file = path / family.component / "config.json"
        raise UserError(
            f"teacher: sample_size in {file} is null, so that its stock pipeline has no size; write a number"
        )
    if both_sides(size) is None or one_side(size) is not None:
        return {}
    height, width = family.pixels(path, both_sides(size) or ())
    return {"height": height, "width": width}


def guidance_call(
    family: Family | None, scale: float, negative: str | None = None, *, true_cfg: bool | None = None
) -> dict[str, Any]:
    """Guidance by `scale`, in the units of the stock pipeline, away from a negative prompt, as arguments of its call.

    `true_cfg`: by `true_cfg_scale`, which acts only where a negative prompt is given; None: where the pipeline has it.
    Of one whose `guidance_scale` is an input of the network (Flux), a negative prompt needs it.
    """
    if family is not None:
        has_it = "true_cfg_scale" in inspect.signature(diffusers_class(family.pipelines[0]).__call__).parameters
        true_cfg = has_it and (true_cfg is not False or negative is not None)
        if negative is None and family.text is not None:
            negative = family.text.negative
    if true_cfg:
        return {"true_cfg_scale": scale, "negative_prompt": negative or ""}
    return {"guidance_scale": scale} | ({} if negative is None else {"negative_prompt": negative})


def steered(pipeline: Any, family: Family | None, call: dict[str, Any]) -> dict[str, Any]:
    """The call without the guidance scale, where `Family.steer` gives that to the pipeline, as is done here."""
    if family is None or family.steer is None or "guidance_scale" not in call:
        return call
    family.steer(pipeline, call["guidance_scale"])
    return {name: value for name, value in call.items() if name != "guidance_scale"}


def with_negatives(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The call for so many prompts: there must be as many negative ones."""
    return {name: [value] * count if name == "negative_prompt" else value for name, value in call.items()}
