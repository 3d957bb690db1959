"""Noise of every step from the call's generators, and the file that gives a student's folder its own plain call.

A student that takes the time to jump to is a stock network for one number of steps; the file makes it that of others.

Several stock pipelines (Stable Diffusion 3, Flux, Qwen-Image, Z-Image, Wan, Sana, DiT) hand no generator to their
scheduler, so that what a student of several steps renoises with would come from torch's global state. And no stock
pipeline has a place for a default number of steps or guidance. A student's folder therefore carries `pipeline.py`: the
stock pipeline with both, which diffusers uses if it is told `custom_pipeline=FOLDER`, and which needs diffusers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

FILE = "pipeline.py"
STEPS_FILE = "scheduler/steps.safetensors"  # in a folder of which diffusers loads all files


@contextmanager
def seeded_steps(pipeline: Any, generator: Any) -> Iterator[None]:
    """While it lasts, the scheduler's steps draw their noise from `generator`, one or a list, unless told otherwise."""
    step, own = pipeline.scheduler.step, vars(pipeline.scheduler).get("step")
    if generator is None or "generator" not in inspect.signature(step).parameters:
        yield
        return

    @wraps(step)  # pipelines look at its arguments
    def seeded(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **{"generator": generator, **kwargs})

    pipeline.scheduler.step = seeded
    try:
        yield
    finally:
        del pipeline.scheduler.step
        if own is not None:  # somebody else's
            pipeline.scheduler.step = own


def steps_file(pipeline: Any) -> Path:
    """Where the tensors of the other numbers of steps are: in the folder, or in the repository of the hub."""
    place = Path(str(pipeline.config["_name_or_path"]))
    return place / STEPS_FILE if place.is_dir() else Path(hf_hub_download(str(place), STEPS_FILE))


@contextmanager
def in_steps(pipeline: Any, component: str, own: int, others: dict[int, dict[str, Any]], steps: int) -> Iterator[None]:
    """While it lasts, scheduler and network are those of so many steps; `others` has what differs in the scheduler.

    Raises ValueError for a number that is neither `own` nor one of the others.
    """
    if steps == own or not others:
        yield
        return
    if steps not in others:
        known = ", ".join(str(n) for n in sorted([own, *others]))
        raise ValueError(f"num_inference_steps: {steps} is none that this student takes; give one of {known}")
    before, values = pipeline.scheduler, others[steps]
    kind = getattr(diffusers, values.get("_class_name", type(before).__name__))
    kept = {} if kind is not type(before) else {k: v for k, v in before.config.items() if k != "_use_default_values"}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(steps_file(pipeline)).items():
        number, layer, part = name.split("/")
        if int(number) == steps:
            parts.setdefault(layer, {})[part] = value
    undo = []
    for layer, change in parts.items():

        def add(module: Any, args: Any, output: Any, change: dict[str, torch.Tensor] = change) -> Any:
            more = change["bias"].to(output)
            if "down" in change:
                more = more + args[0] @ change["down"].to(output).T @ change["up"].to(output).T
            return output + more

        undo.append(getattr(pipeline, component).get_submodule(layer).register_forward_hook(add).remove)
    pipeline.scheduler = kind.from_config({**kept, **values})
    try:
        yield
    finally:
        pipeline.scheduler = before
        for remove in undo:
            remove()


def pipeline_file(base: str, component: str, call: dict[str, Any], others: dict[int, dict[str, Any]]) -> str:
    """Source of a module with the stock pipeline class `base` under the arguments `call`.

    `component` is the name of its network, `others` are those of `in_steps`.
    """
    return f'''"""{base} as this student is called: its steps, guidance and size unless the call says otherwise."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import {base}
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

CALL = {call!r}
STEPS_FILE = {STEPS_FILE!r}
OTHERS = {others!r}


{inspect.getsource(seeded_steps)}

{inspect.getsource(steps_file)}

{inspect.getsource(in_steps)}

class StudentPipeline({base}):
    """The noise of every step follows `generator`, also where {base} leaves that to torch's global state."""

    @wraps({base}.__call__)
    def __call__(self, *args, **given):
        names = list(inspect.signature({base}.__call__).parameters)[1:]  # after self
        if len(args) > len(names):
            raise TypeError(f"the call takes {{len(names)}} arguments and was given {{len(args)}}")
        named = dict(zip(names, args))
        if twice := sorted(named.keys() & given.keys()):
            raise TypeError(f"the call got {{twice[0]}} twice")
        call = {{**CALL, **named, **given}}
        steps = in_steps(self, {component!r}, CALL["num_inference_steps"], OTHERS, call["num_inference_steps"])
        with steps, seeded_steps(self, call.get("generator")):
            return super().__call__(**call)

    def save_config(self, save_directory, *args, **kwargs):
        # What save_pretrained and push_to_hub write: {base} as diffusers has it, and this file beside it.
        super().save_config(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text(encoding="utf-8")) | {{"_class_name": "{base}"}}
        values.pop("_module", None)
        index.write_text(json.dumps(values, indent=2) + "\\n", encoding="utf-8")
        (Path(save_directory) / "{FILE}").write_bytes(Path(__file__).read_bytes())
        if OTHERS:
            (Path(save_directory) / "scheduler").mkdir(exist_ok=True)
            (Path(save_directory) / STEPS_FILE).write_bytes(steps_file(self).read_bytes())
'''
