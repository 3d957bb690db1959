"""Noise of every step from the call's generators, and the file that gives a student's folder its own plain call.

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
from typing import Any

FILE = "pipeline.py"


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


def pipeline_file(base: str, call: dict[str, Any]) -> str:
    """Source of a module with the stock pipeline class `base` under the arguments `call`."""
    return f'''"""{base} as this student is called: its steps, guidance and size unless the call says otherwise."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers import {base}

CALL = {call!r}


{inspect.getsource(seeded_steps)}

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
        with seeded_steps(self, call.get("generator")):
            return super().__call__(**call)

    def save_config(self, save_directory, *args, **kwargs):
        # What save_pretrained and push_to_hub write: {base} as diffusers has it, and this file beside it.
        super().save_config(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text(encoding="utf-8")) | {{"_class_name": "{base}"}}
        values.pop("_module", None)
        index.write_text(json.dumps(values, indent=2) + "\\n", encoding="utf-8")
        (Path(save_directory) / "{FILE}").write_bytes(Path(__file__).read_bytes())
'''
