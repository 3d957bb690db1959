"""The model card of a student, and how it is called."""

from __future__ import annotations

from typing import Any

from diffdistill.catalogue import MethodInfo
from diffdistill.families import FAMILIES
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.pipelines.shipped.student_pipeline import FILE
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.lora import LoraNetwork
from diffdistill.players.sampler import FewStepSampler
from diffdistill.players.teacher import Teacher


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

Distilled with diffdistill by {info.name} ({info.about.paper}), {step} steps.

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
