"""Noise of every step from the call's generators, and the file that gives a student's folder its own plain call.

A student that takes the time to jump to is a stock network for one number of steps; the file makes it that of others.
Where no stock scheduler has a student's levels in a row of its own, the file hands them to it.

Several stock pipelines (Stable Diffusion 3, Flux, Qwen-Image, Z-Image, Wan, Sana, DiT) hand no generator to their
scheduler, so that what a student of several steps renoises with would come from torch's global state. And no stock
pipeline has a place for a default number of steps or guidance. A student's folder therefore carries `pipeline.py`: the
stock pipeline with both, which diffusers uses if it is told `custom_pipeline=FOLDER`, and which needs diffusers alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

FILE = "pipeline.py"
STEPS_FILE = "scheduler/steps.safetensors"  # in a folder of which diffusers loads all files


@contextmanager
def seeded_steps(pipeline: Any, generator: Any) -> Iterator[None]:
    """While it lasts, the scheduler's steps draw their noise from `generator`, one or a list, unless told otherwise."""
    scheduler, kind = pipeline.scheduler, type(pipeline.scheduler)
    own = getattr(kind, "step", None)  # a wrapper may have it elsewhere
    if generator is None or own is None or "generator" not in inspect.signature(own).parameters:
        yield
        return

    @wraps(kind.step)  # pipelines look at its arguments
    def seeded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.step(self, *args, **{"generator": generator, **kwargs})

    # By the class, which the copies have too that a pipeline makes of its scheduler.
    scheduler.__class__ = type(kind.__name__, (kind,), {"step": seeded, "__module__": kind.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = kind


def steps_file(pipeline: Any) -> Path:
    """Where the tensors of the other numbers of steps are: in the folder, or in the repository of the hub."""
    place = Path(str(pipeline.config["_name_or_path"]))
    return place / STEPS_FILE if place.is_dir() else Path(hf_hub_download(str(place), STEPS_FILE))


class LevelScheduler:
    """A scheduler that goes through levels which its own rows of steps have not.

    `rows` has for each step the level, and how much of the next sample is the sample, the clean sample that is seen in
    it, and fresh noise. What is seen is where one step of `scheduler` from that level to clean data leads.
    """

    def __init__(self, scheduler: Any, rows: list[tuple[float, float, float, float]]):
        self._scheduler, self._rows = scheduler, rows
        self._once: list[Any] = []
        self.set_timesteps()

    def __getattr__(self, name: str) -> Any:
        if "_scheduler" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """Back to the first level."""
        self._once = []
        for level, *_ in self._rows:
            config = self._scheduler.config
            once = type(self._scheduler).from_config(config, **({"sigma_max": level} if "sigma_max" in config else {}))
            once.set_timesteps(**({"sigmas": [level]} if "shift" in config else {"num_inference_steps": 1}))
            if "beta_schedule" in config:
                once.timesteps = torch.tensor([int(level)])
            self._once.append(once)
        self.timesteps = torch.cat([once.timesteps for once in self._once]).to(device)
        self.init_noise_sigma = getattr(self._once[0], "init_noise_sigma", 1.0)

    def _at(self, timestep: Any) -> int:
        return int((self.timesteps - timestep).abs().argmin())

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """What the network reads."""
        once = self._once[self._at(timestep)]
        return once.scale_model_input(sample, once.timesteps[0]) if hasattr(once, "scale_model_input") else sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """The sample at the next level, after the last one the clean sample."""
        _, kept, clean, fresh = self._rows[k := self._at(timestep)]
        once = self._once[k]
        x = clean * once.step(model_output, once.timesteps[0], sample, return_dict=False)[0]
        if kept:
            x = x + kept * sample
        if fresh:
            x = x + fresh * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


@contextmanager
def at_levels(pipeline: Any, rows: list[tuple[float, float, float, float]] | None) -> Iterator[None]:
    """While it lasts, the scheduler goes through the levels of the rows, if there are any."""
    before = pipeline.scheduler
    if rows is not None:  # not by setattr, which would rewrite the config
        pipeline.__dict__["scheduler"] = LevelScheduler(before, rows)
    try:
        yield
    finally:
        pipeline.__dict__["scheduler"] = before


@contextmanager
def in_steps(
    pipeline: Any, component: str, own: int, others: dict[int, dict[str, Any]], steps: int, alone: bool = False
) -> Iterator[None]:
    """While it lasts, scheduler and network are those of so many steps; `others` has what differs in the scheduler.

    Raises ValueError for a number that is neither `own` nor one of the others, if there are others or `own` is `alone`.
    """
    if steps == own or not (others or alone):
        yield
        return
    if steps not in others:
        known = ", ".join(str(n) for n in sorted([own, *others]))
        raise ValueError(f"num_inference_steps: {steps} is none that this student takes; give one of {known}")
    before, values = pipeline.scheduler, others[steps]
    kind = getattr(diffusers, values.get("_class_name", type(before).__name__))
    same = kind.__name__ == type(before).__name__  # whose class another may stand for (`seeded_steps`)
    kept = {k: v for k, v in before.config.items() if k != "_use_default_values"} if same else {}
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


def pipeline_class(base: str) -> str:
    """What the class of a student's own pipeline is called, by the name of the stock one."""
    return f"Student{base}"


_IMPORTS = """
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
"""


def pipeline_file(
    base: str,
    component: str,
    call: dict[str, Any],
    others: dict[int, dict[str, Any]],
    rows: dict[int, list[tuple[float, float, float, float]]],
) -> str:
    """Source of a module with the stock pipeline class `base` under the arguments `call`.

    `component` is its network's name, `others` are those of `in_steps`, `rows` those of `at_levels` by number of steps;
    with the call's own number in them the folder does not work without the class, and its index names that.
    """
    named = [FILE.removesuffix(".py"), pipeline_class(base)] if call["num_inference_steps"] in rows else base
    parts = "\n\n".join(inspect.getsource(p) for p in (seeded_steps, LevelScheduler, at_levels, steps_file, in_steps))
    return f'''"""{base} as this student is called: its steps, guidance and size unless the call says otherwise."""
{_IMPORTS}
STEPS_FILE = {STEPS_FILE!r}


{parts}

class {pipeline_class(base)}(diffusers.{base}):
    """The noise of every step follows `generator`, also where {base} leaves that to torch's global state."""

    # In the class: of the folders that a process loads, diffusers runs the files in one and the same module.
    _call = {call!r}
    _others = {others!r}
    _rows = {rows!r}
    _source = Path(__file__).read_bytes()

    @wraps(diffusers.{base}.__call__)
    def __call__(self, *args, **given):
        names = list(inspect.signature(super().__call__).parameters)
        if len(args) > len(names):
            raise TypeError(f"the call takes {{len(names)}} arguments and was given {{len(args)}}")
        named = dict(zip(names, args))
        if twice := sorted(named.keys() & given.keys()):
            raise TypeError(f"the call got {{twice[0]}} twice")
        call = {{**self._call, **named, **given}}
        own, steps = self._call["num_inference_steps"], call["num_inference_steps"]
        if steps != own:  # whose levels these are
            call = {{k: v for k, v in call.items() if k in given or k not in ("timesteps", "sigmas")}}
        with (
            in_steps(self, {component!r}, own, self._others, steps, own in self._rows),
            at_levels(self, self._rows.get(steps)),
            seeded_steps(self, call.get("generator")),
        ):
            return super().__call__(**call)

    def save_config(self, save_directory, *args, **kwargs):
        super().save_config(save_directory, *args, **kwargs)  # what save_pretrained and push_to_hub write
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text(encoding="utf-8")) | {{"_class_name": {json.dumps(named)}}}
        values.pop("_module", None)
        index.write_text(json.dumps(values, indent=2) + "\\n", encoding="utf-8")
        (Path(save_directory) / "{FILE}").write_bytes(self._source)
        if self._others:
            (Path(save_directory) / "scheduler").mkdir(exist_ok=True)
            (Path(save_directory) / STEPS_FILE).write_bytes(steps_file(self).read_bytes())
'''
