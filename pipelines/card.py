"""The model card of a student, and how it is called."""

from __future__ import annotations

from typing import Any

from diffdistill.families import FAMILIES, Family, diffusers_class, local_folder, read_json
from diffdistill.families._parts import null_parts, stored_dtypes
from diffdistill.pipelines.schedulers import student_scheduler
from diffdistill.pipelines.shipped.student_pipeline import FILE
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.lora import LoraNetwork
from diffdistill.players.sampler import Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.training.recipe import Recipe


def student_call(teacher: Teacher, sampler: Sampler) -> dict[str, Any]:
    """The arguments of the stock pipeline's call, besides the prompt, that make the student's images."""
    call = FAMILIES[teacher.family].arguments(len(sampler.levels)) | teacher.size
    scale = sampler.denoiser.default_scale
    return call if scale is None else call | {"guidance_scale": scale}


def own_card(info: Recipe, options: dict[str, Any], teacher: Teacher, sampler: Sampler, step: int) -> str:
    """README.md of a student whose network diffusers does not know."""
    return f"""---
tags: [diffusion, distillation, diffdistill, {info.name}]
---
# A {len(sampler.levels)}-step student of {teacher.source}

Distilled with diffdistill by {info.name} ({info.about.paper}), {step} steps. The shape of a sample is
{tuple(teacher.shape)}.

```python
from diffdistill import load_student
from diffdistill.rng import image_generators

sampler, student = load_student("FOLDER", network={teacher.source}(...))  # of the teacher's class, with any weights
samples = sampler(student.shape, conditions, image_generators(0, range(16)))
```

{_table(options)}
"""


def _table(options: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in options.items())
    return f"| option | value |\n|---|---|\n{rows}"


def model_card(
    info: Recipe, options: dict[str, Any], teacher: Teacher, sampler: Sampler, step: int, dtype: str | None = None
) -> str:
    """README.md of a student: teacher, method, settings, and the lines that load it."""
    levels = ", ".join(f"{level:g}" for level in sampler.levels)
    steps, network = len(sampler.levels), sampler.denoiser.network
    entry = FAMILIES.get(teacher.family, FAMILIES["unet2d"])
    subject, call = _call(entry, teacher, sampler)
    source, adapted = '"FOLDER"', isinstance(network, AdaptedNetwork)
    if adapted:
        source += ", trust_remote_code=True"  # the folder's own adapted_pipeline.py
    if entry.autoencoder is not None:
        index = read_json(local_folder(teacher.source) / "model_index.json")
        source += "".join(f", {name}=None" for name in null_parts(diffusers_class(entry.pipelines[0]), index))
    kind = dtype or _stored(entry, teacher)
    if kind != "float32":
        source += f", torch_dtype=torch.{kind}"
    lora = _lora(teacher, sampler, call) if isinstance(network, LoraNetwork) and entry.loads_lora else ""
    alone = _single_file(entry) if entry.single_file and not adapted else ""
    own = _own_pipeline(subject) if entry.autoencoder is not None and not adapted else ""
    return f"""---
library_name: diffusers
tags: [diffusion, distillation, diffdistill, {info.name}]
---
# A {steps}-step student of {teacher.source}

Distilled with diffdistill by {info.name} ({info.about.paper}), {step} steps.

```python
{"" if kind == "float32" else "import torch" + chr(10)}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({source})
images = pipeline({call}).{_output(call)}
```
{lora}{alone}
{own}The call makes {steps} step{"s" if steps > 1 else ""}, with the student's own scheduler in `scheduler/`; the levels
(timestep or sigma) are {levels}. The network's weights are stored in {kind}. diffdistill need not be installed. Image i
of `diffdistill sample --seed S` is that of `generator=torch.Generator().manual_seed(1_000_000 * S + i)`.

{_table(options)}
"""


def _stored(entry: Family, teacher: Teacher) -> str:
    """The type that the teacher's files have, by its name in torch."""
    return str(stored_dtypes(local_folder(teacher.source) / entry.component)[1]).removeprefix("torch.")


def _call(entry: Family, teacher: Teacher, sampler: Sampler) -> tuple[str, str]:
    """What the pipeline draws, and all arguments of its call, as Python."""
    steps, network = len(sampler.levels), sampler.denoiser.network
    if entry.autoencoder is None:
        subject = "" if teacher.num_classes is None else "batch_size=4, class_labels=[0, 1, 2, 3]"
        arguments = [*filter(None, [subject]), *([f"num_inference_steps={steps}"] if steps > 1 else [])]
    else:
        subject = '"a prompt"' if entry.conditions == "text" else "class_labels=[0, 1, 2, 3]"
        arguments = [subject, *(f"{name}={value!r}" for name, value in student_call(teacher, sampler).items())]
    if isinstance(network, AdaptedNetwork):
        arguments.append(f"guidance_scale={float(network.guidance_scale):g}")
    return subject, ", ".join(arguments)


def _output(call: str) -> str:
    """The attribute of the pipeline's result."""
    return "frames" if "num_frames" in call else "images"


def _lora(teacher: Teacher, sampler: Sampler, call: str) -> str:
    scheduler = type(student_scheduler(teacher, sampler)).__name__
    return f"""
The student's weights are its teacher's and a LoRA, which is in `lora/` alone. On the teacher's pipeline:

```python
pipeline.load_lora_weights("FOLDER/lora")
pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
images = pipeline({call}).{_output(call)}
```
"""


def _single_file(entry: Family) -> str:
    network = entry.network if isinstance(entry.network, str) else entry.network.__name__
    file = f"FOLDER/{entry.component}/diffusion_pytorch_model.safetensors"
    return f"""
The network's weights are one file, which `from_single_file` reads too:

```python
from diffusers import {network}

network = {network}.from_single_file("{file}", config="FOLDER", subfolder="{entry.component}")
```
"""


def _own_pipeline(subject: str) -> str:
    return f"""These arguments are in `{FILE}` too, where `generator` seeds the noise of every step in any family:
`DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)({subject})`.

"""
