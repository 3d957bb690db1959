"""Saving networks as diffusers folders that stock diffusers loads, with their own scheduler."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn

from diffdistill import adapter_networks
from diffdistill.adapter_networks import AdaptedNetwork
from diffdistill.adapters import plain_network
from diffdistill.config import MethodInfo
from diffdistill.errors import UserError
from diffdistill.families import FAMILIES, METADATA, Family, local_folder, parts_of
from diffdistill.files import atomic_folder
from diffdistill.guidance_adapters import write_adapters
from diffdistill.lora import LoraNetwork, lora_weights
from diffdistill.players import FewStepSampler, Teacher
from diffdistill.schedule import EDM, DiscreteVP, LinearFlow, lcm_indices

from . import adapted_pipeline
from .student_pipeline import FILE, pipeline_file

# What a student keeps of its teacher's discrete VP scheduler: the chain and the kind of output.
_VP_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


def student_scheduler(teacher: Teacher, sampler: FewStepSampler) -> SchedulerMixin:
    """The stock scheduler that repeats the sampler exactly when it is given the student's number of steps.

    Raises UserError where no stock scheduler can start at the student's level, or take its steps.
    """
    schedule, level = sampler.denoiser.schedule, sampler.levels[0]
    if isinstance(schedule, LinearFlow) and isinstance(sampler.denoiser.network, AdaptedNetwork):
        # Its own pipeline can drive the scheduler of flow matching, which takes any number of steps.
        return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps, schedule.shift)
    if isinstance(schedule, LinearFlow) and schedule.starts_at_one:
        entry = FAMILIES.get(teacher.family)
        return _latent_flow_scheduler(schedule, sampler, entry is None or entry.flow_grid == "own")
    if len(sampler.levels) > 1:
        return _several_steps(teacher, sampler)
    if isinstance(schedule, DiscreteVP):
        kept = {k: teacher.scheduler[k] for k in _VP_KEYS if k in teacher.scheduler}
        # One trailing step is at the last timestep; one leading step is at `steps_offset`.
        noisiest = len(schedule.alphas_cumprod) - 1
        last = level == noisiest
        if level != int(level) or not 0 <= level <= noisiest:
            raise UserError(f"student_level: {level} is not a whole timestep from 0 to {noisiest}")
        if not last:
            # The chain up to that level. `steps_offset` would do, but StableDiffusionPipeline sets it to 1.
            alphas = schedule.alphas_cumprod[: int(level) + 1].double()
            betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
            kind = kept.get("prediction_type", "epsilon")
            kept = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": kind}
        return diffusers.DDIMScheduler(**kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    if isinstance(schedule, EDM):
        if not schedule.sigma_min < level <= schedule.sigma_max:
            raise UserError(f"student_level: {level} is not a sigma from {schedule.sigma_min} to {schedule.sigma_max}")
        shared = {
            "sigma_min": schedule.sigma_min,
            "sigma_max": level,
            "sigma_data": schedule.data_std,
            "rho": schedule.rho,
        }
        if schedule.unit_init:
            kind = teacher.scheduler.get("prediction_type", "epsilon")
            return diffusers.EDMEulerScheduler(**shared, prediction_type=kind)
        return diffusers.CMStochasticIterativeScheduler(**shared, clip_denoised=False)
    if isinstance(schedule, LinearFlow):
        return _flow_scheduler(_flow_shift_for(level, schedule), schedule.train_timesteps)
    raise UserError(f"export: no stock scheduler for a {type(schedule).__name__} student")


def _several_steps(teacher: Teacher, sampler: FewStepSampler) -> SchedulerMixin:
    schedule, steps = sampler.denoiser.schedule, len(sampler.levels)
    own = torch.tensor(sampler.levels, dtype=torch.float64)
    if isinstance(schedule, DiscreteVP):
        count = len(schedule.alphas_cumprod)
        kept = {k: teacher.scheduler[k] for k in _VP_KEYS if k in teacher.scheduler}
        if sampler.renoise:
            for points in (n for n in range(steps, count + 1) if count % n == 0):
                if torch.equal(schedule.levels(points)[lcm_indices(points, steps)], own):
                    # The scaling makes its c_skip less than 1e-12, so that it takes the network's x0 as it is.
                    return diffusers.LCMScheduler(**kept, original_inference_steps=points, timestep_scaling=1e6)
        if sampler.renoise or count % steps or not torch.equal(schedule.levels(steps), own):
            raise UserError(
                f"export: {steps} steps do not divide the teacher's {count} timesteps evenly; use 2, 4 or 8"
            )
        return diffusers.DDIMScheduler(**kept, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    if isinstance(schedule, EDM) and schedule.unit_init and not sampler.renoise:
        low, high = sampler.levels[-1], sampler.levels[0]
        if torch.allclose(replace(schedule, sigma_min=low, sigma_max=high).levels(steps), own):
            scheduler = student_scheduler(teacher, FewStepSampler(sampler.denoiser, [high]))
            return type(scheduler).from_config({**scheduler.config, "sigma_min": low})
    how = "renoising" if sampler.renoise else "deterministic"
    raise UserError(
        f"export: no stock scheduler takes {steps} {how} steps on this teacher's {type(schedule).__name__} schedule; "
        "use one step"
    )


def _latent_flow_scheduler(schedule: LinearFlow, sampler: FewStepSampler, own_row: bool) -> SchedulerMixin:
    """Flow matching's own scheduler with the sampler's levels, the trailing ones.

    `own_row`: the pipeline lets it take its own row, where others hand it 1, .., 1/n.
    """
    steps, own = len(sampler.levels), torch.tensor(sampler.levels, dtype=torch.float64)
    if not torch.allclose(schedule.trailing(steps), own):
        told = ", ".join(f"{level:g}" for level in sampler.levels)
        raise UserError(f"export: this pipeline's scheduler cannot start {steps} steps at {told}; leave the levels out")
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    if sampler.renoise and steps > 1:
        kind = diffusers.FlowMatchLCMScheduler
    shift, terminal = schedule.shift, None
    if own_row and steps > 1:
        # It shifts the row from 1 to its own least sigma and stretches that to end at `shift_terminal`. Both rows are
        # Moebius functions of k; they are the same one for the shift q/(q - 1), q = shift n d/(shift - 1), where d is
        # what one step takes off before the shift. d depends weakly on the new shift.
        terminal, shift = float(own[-1]), 1.0
        for _ in range(100 if schedule.shift != 1 else 0):
            least = shift / (schedule.train_timesteps + shift - 1)
            q = schedule.shift * steps * (1 - least) / (steps - 1) / (schedule.shift - 1)
            shift = q / (q - 1)
    return kind(schedule.train_timesteps, shift, shift_terminal=terminal)


def _flow_scheduler(shift: float, timesteps: int) -> SchedulerMixin:
    """Euler steps of flow matching, in the one stock scheduler that pixel pipelines can drive."""
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        final_sigmas_type="zero",
    )


def _flow_shift_for(level: float, schedule: LinearFlow) -> float:
    """The shift that moves that scheduler's one-step sigma, 1 - 1/T, to the level."""
    first, time = 1 - 1 / schedule.train_timesteps, level * schedule.train_timesteps
    # That scheduler hands the network whole timesteps only.
    if not 0 < level < 1 or abs(time - round(time)) > 1e-6:
        raise UserError(f"student_level: {level} is not k/{schedule.train_timesteps} inside (0, 1)")
    return level * (1 - first) / (first * (1 - level))


def teacher_scheduler(parameterization: str) -> SchedulerMixin:
    """The stock scheduler of a teacher of ours: DDIM ('vp'), EDM's Euler ('edm') or Euler steps of a flow."""
    if parameterization == "edm":
        return diffusers.EDMEulerScheduler()
    if parameterization == "flow":
        return _flow_scheduler(1.0, 1000)
    return diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def scheduler_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The config as scheduler_config.json would hold it."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@contextmanager
def pipeline_folder(folder: Path, metadata: dict[str, Any], card: str, marker: str = METADATA) -> Iterator[Path]:
    """A folder to write a pipeline into; `folder` becomes it with metadata and model card, whole or not at all."""
    with atomic_folder(folder, marker) as partial:
        yield partial
        (partial / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")


def save_pipeline(
    folder: Path,
    family: str,
    network: nn.Module,
    scheduler: SchedulerMixin,
    metadata: dict[str, Any],
    card: str,
    source: str | None = None,
) -> Path:
    """Write a diffusers folder with its model card, whole or not at all.

    A latent family's other parts are those of the pipeline `source`. A LoRA student is saved merged, and its adapter
    beside it where the stock pipeline has `load_lora_weights`.
    """
    entry = FAMILIES[family]
    with pipeline_folder(folder, metadata, card) as partial:
        plain = network.base if isinstance(network, AdaptedNetwork) else plain_network(network)
        if entry.autoencoder is None:
            parts = {entry.component: plain, "scheduler": scheduler}
            getattr(diffusers, entry.pipelines[0])(**parts).save_pretrained(partial, safe_serialization=True)
        else:
            _copy_parts(local_folder(str(source)), partial, entry, plain, scheduler)
            if "call" in metadata:
                (partial / FILE).write_text(pipeline_file(entry.pipelines[0], metadata["call"]), encoding="utf-8")
        if isinstance(network, AdaptedNetwork):
            _add_adapters(partial, network, len(metadata["levels"]))
        if isinstance(network, LoraNetwork) and entry.loads_lora:
            layers = {f"{entry.component}_lora_layers": lora_weights(network)}
            getattr(diffusers, entry.pipelines[0]).save_lora_weights(partial / "lora", **layers)
    return folder


def other_parts(source: Path, entry: Family) -> list[Path]:
    """The folders of a pipeline's parts besides network and scheduler; UserError where one is not whole."""
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    parts = [source / name for name in parts_of(index) if name not in (entry.component, "scheduler")]
    for part in parts:
        if not part.is_dir():
            raise UserError(f"teacher: {source} has no {part.name}/, which its pipeline needs; give the whole pipeline")
        if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
            raise UserError(f"teacher: {part} has no .safetensors weights; save it with safe_serialization=True")
    return parts


def _copy_parts(source: Path, folder: Path, entry: Family, network: Any, scheduler: SchedulerMixin) -> None:
    """The source's pipeline with another network and scheduler; its other parts are copied, not loaded."""
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    for part in other_parts(source, entry):
        pickled = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack")
        shutil.copytree(part, folder / part.name, ignore=pickled)
    index["_class_name"] = entry.pipelines[0]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    shards = {"max_shard_size": sys.maxsize} if entry.single_file else {}
    network.save_pretrained(folder / entry.component, safe_serialization=True, **shards)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _add_adapters(folder: Path, network: AdaptedNetwork, steps: int) -> None:
    """Beside the base model: the adapters, and the code of their pipeline, which stock diffusers runs from there."""
    (folder / "adapter").mkdir()
    write_adapters(folder / "adapter", network)
    for module, where in ((adapted_pipeline, folder), (adapter_networks, folder / "adapter")):
        source = Path(inspect.getsourcefile(module) or "")
        (where / source.name).write_bytes(source.read_bytes())
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [adapted_pipeline.__name__.rpartition(".")[2], adapted_pipeline.AdaptedPipeline.__name__]
    index["adapter"] = [adapter_networks.__name__.rpartition(".")[2], adapter_networks.GuidanceAdapters.__name__]
    index["num_inference_steps"] = steps
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def student_call(teacher: Teacher, sampler: FewStepSampler) -> dict[str, Any]:
    """What the stock pipeline must be told besides the prompt to make the student's images."""
    call = FAMILIES[teacher.family].arguments(len(sampler.levels)) | teacher.size
    scale = sampler.denoiser.default_scale
    return call if scale is None else call | {"guidance_scale": scale}


def model_card(info: MethodInfo, options: dict[str, Any], teacher: Teacher, sampler: FewStepSampler, step: int) -> str:
    """README.md of a student: teacher, method, settings, and the lines that load it."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in options.items())
    levels = ", ".join(f"{level:g}" for level in sampler.levels)
    steps = len(sampler.levels)
    entry = FAMILIES[teacher.family] if teacher.family in FAMILIES else FAMILIES["unet2d"]
    if entry.autoencoder is None:
        given = [] if teacher.num_classes is None else ["batch_size=4", "class_labels=[0, 1, 2, 3]"]
        call = ", ".join(given + ([f"num_inference_steps={steps}"] if steps > 1 else []))
    else:
        given = ['"a prompt"'] if entry.conditions == "text" else ["class_labels=[0, 1, 2, 3]"]
        call = ", ".join(given + [f"{name}={value!r}" for name, value in student_call(teacher, sampler).items()])
    network, source = sampler.denoiser.network, '"FOLDER"'
    if isinstance(network, AdaptedNetwork):
        call += f", guidance_scale={float(network.guidance_scale):g}"
        source += ", trust_remote_code=True"  # the folder's own adapted_pipeline.py
    lora = ""
    if isinstance(network, LoraNetwork) and entry.loads_lora:
        scheduler = type(student_scheduler(teacher, sampler)).__name__
        lora = f"""
The student's weights are its teacher's and a LoRA, which is in `lora/` alone. On the teacher's pipeline:

```python
pipeline.load_lora_weights("FOLDER/lora")
pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
images = pipeline({call}).{"frames" if "num_frames" in call else "images"}
```
"""
    alone = ""
    if entry.single_file and not isinstance(network, AdaptedNetwork):
        file = f"FOLDER/{entry.component}/diffusion_pytorch_model.safetensors"
        alone = f"""
The network's weights are one file, which `from_single_file` reads too:

```python
from diffusers import {entry.network}

network = {entry.network}.from_single_file("{file}", config="FOLDER", subfolder="{entry.component}")
```
"""
    own = ""
    if entry.autoencoder is not None and not isinstance(network, AdaptedNetwork):
        own = f"""These arguments are in `{FILE}` too, where `generator` seeds the noise of every step in any family:
`DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)({given[0]})`.

"""
    return f"""---
library_name: diffusers
tags: [diffusion, distillation, diffdistill, {info.name}]
---
# A {steps}-step student of {teacher.source}

Distilled with diffdistill by {info.name} ({info.paper}), {step} steps.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({source})
images = pipeline({call}).{"frames" if "num_frames" in call else "images"}
```
{lora}{alone}
{own}The call makes {steps} step{"s" if steps > 1 else ""}, with the student's own scheduler in `scheduler/`; the levels
(timestep or sigma) are {levels}. diffdistill need not be installed. Image i of `diffdistill sample --seed S` is
that of `generator=torch.Generator().manual_seed(1_000_000 * S + i)`.

| option | value |
|---|---|
{settings}
"""
