"""A folder with a few-step student and its teacher, for the pipeline that starts with the one and ends with the other.

Diversity distillation (Gandikota & Bau 2025, arXiv:2503.10637) trains nothing; diversity_pipeline.py is the sampler.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffdistill.core.schedule import DiscreteVP
from diffdistill.errors import UserError
from diffdistill.families import (
    NOT_LOADED,
    DiversityRecord,
    StudentRecord,
    family_of,
    local_folder,
    parts_of,
    public_name,
    read_json,
    read_record,
    schedule_of,
    teacher_of,
)
from diffdistill.pipelines.export import pipeline_folder
from diffdistill.pipelines.shipped import diversity_pipeline

_PIPELINES = {
    "stable_diffusion": diversity_pipeline.DiversityPipeline,
    "sdxl": diversity_pipeline.DiversityXLPipeline,
}


def write_diversity(
    student: str | Path,
    out: str | Path,
    teacher: str | Path | None = None,
    base_steps: int = 20,
    base_guidance: float = 7.0,
) -> Path:
    """The folder `out`, whole or not at all, which `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)`
    loads without diffdistill. `base_steps` and `base_guidance` are what its call takes unless told otherwise.

    `teacher` None: the one that the student was distilled from. Raises UserError for a student of one step, of another
    family than Stable Diffusion, or whose teacher has another noise schedule.
    """
    folder = local_folder(str(student))
    record, (family, index) = read_record(folder), family_of(folder)
    if not isinstance(record, StudentRecord) or isinstance(index["_class_name"], list):
        raise UserError(f"student: {str(student)!r} is no plain student of diffdistill; give an exported folder")
    if record.form == "lora":
        raise UserError(
            f"student: {str(student)!r} is a LoRA alone; give a whole one: `diffdistill export --export merged`"
        )
    if family.name not in _PIPELINES:
        raise UserError(f"student: {family.name} is not supported here; supported are {', '.join(_PIPELINES)}")
    if len(record.levels) < 2:
        raise UserError("student: it takes one step, which the teacher would stand in for; it must take two or more")
    source = str(teacher or teacher_of(Path(student), record))
    base = local_folder(source)
    if family_of(base)[0] is not family:
        raise UserError(f"teacher: {source!r} is {family_of(base)[0].name} and the student is {family.name}")
    base_scheduler = _check_schedules(base, folder, len(record.levels), base_steps)

    sizes = ("height", "width", "num_inference_steps")
    call = {name: value for name, value in (record.call or {}).items() if name in sizes}
    settings = {"base_steps": base_steps, "base_guidance": base_guidance, **call}
    script = Path(inspect.getsourcefile(diversity_pipeline) or "")
    names = public_name(str(student)), public_name(source)
    made = DiversityRecord(*names, settings)
    with pipeline_folder(Path(out), made, _card(*names, settings), script.name) as partial:
        index = dict(index)
        for name in parts_of(index):
            _copy(folder / name, partial / name)
        _copy(base / family.component, partial / "base_unet")
        _copy(base / "scheduler", partial / "base_scheduler")
        index["_class_name"] = [script.stem, _PIPELINES[family.name].__name__]
        index["base_unet"] = ["diffusers", family.network]
        index["base_scheduler"] = ["diffusers", base_scheduler]
        (partial / "model_index.json").write_text(json.dumps(index | settings, indent=2) + "\n", encoding="utf-8")
        (partial / script.name).write_bytes(script.read_bytes())
    return Path(out)


def _copy(source: Path, to: Path) -> None:
    if not source.is_dir():
        raise UserError(f"diversity: {source} is missing; give whole pipelines")
    shutil.copytree(source, to, ignore=shutil.ignore_patterns(*NOT_LOADED))
    weights = [path for path in source.iterdir() if path.suffix in (".bin", ".safetensors")]
    if weights and not any(to.glob("*.safetensors")):
        raise UserError(f"diversity: {source} has no .safetensors weights; save it with safe_serialization=True")


def _check_schedules(base: Path, student: Path, steps: int, base_steps: int) -> str:
    """The class of the base's scheduler; UserError where the student cannot take over from it."""
    configs = [read_json(folder / "scheduler" / "scheduler_config.json") for folder in (base, student)]
    tables = []
    for config in configs:
        schedule, _ = schedule_of(config)
        if not isinstance(schedule, DiscreteVP):
            raise UserError(f"scheduler: {config['_class_name']} has no table of alphas, by which the two are matched")
        tables.append(schedule.alphas_cumprod)
    if tables[0].shape != tables[1].shape or not torch.allclose(tables[0], tables[1], atol=1e-6):
        raise UserError("teacher: its noise schedule is not the student's, so their timesteps mean different noise")
    if base_steps > 0:
        mine, theirs = (_scheduler(config, n) for config, n in zip(configs, (base_steps, steps), strict=True))
        try:
            diversity_pipeline.hand_off_index(mine.timesteps, theirs.timesteps[1])
        except ValueError as error:
            raise UserError(str(error)) from None
    return configs[0]["_class_name"]


def _scheduler(config: dict[str, Any], steps: int) -> Any:
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def _card(student: str, teacher: str, settings: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
library_name: diffusers
tags: [diffusion, distillation, diffdistill, diversity]
---
# {student}, started by {teacher}

The base model goes from noise to the student's second timestep, and the student takes its remaining steps from there
(Gandikota & Bau 2025, arXiv:2503.10637). Nothing was trained for it.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipeline("a prompt").images
alone = pipeline("a prompt", base_steps=0).images  # the student's own
```

| default | value |
|---|---|
{rows}
"""
