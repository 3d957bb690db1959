"""The model card of a student, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdistill.core.experts import ClassExperts, asked, experts_of
from diffdistill.families import FAMILIES, Family, diffusers_class, local_folder, public_name, read_json
from diffdistill.families._folders import boundary_of
from diffdistill.families._parts import LORA, LORA_2, null_parts, stored_dtypes
from diffdistill.families._single import holds_pipeline
from diffdistill.pipelines.comfyui import comfyui_note
from diffdistill.pipelines.origin import card_of, head, license_note, metadata, public_options, teacher_folder
from diffdistill.pipelines.schedulers import level_arguments, student_rows, student_scheduler
from diffdistill.pipelines.shipped.student_pipeline import FILE
from diffdistill.players.adapter_networks import AdaptedNetwork
from diffdistill.players.equilibrium import EquilibriumTransformer
from diffdistill.players.lora import LoraNetwork
from diffdistill.players.policy import PolicyDenoiser
from diffdistill.players.sampler import DDIM, Gamma, Sampler
from diffdistill.players.teacher import Teacher
from diffdistill.training.recipe import Recipe


def student_call(teacher: Teacher, sampler: Sampler) -> dict[str, Any]:
    """The arguments of the stock pipeline's call, besides the prompt, that make the student's images."""
    call = FAMILIES[teacher.family].arguments(len(sampler.levels)) | teacher.size
    if isinstance(sampler.step, Gamma) and len(sampler.levels) > 1:
        call["eta"] = sampler.step.gamma
    call |= (arguments := level_arguments(teacher, sampler))
    if "timesteps" in arguments and isinstance(sampler.step, DDIM):
        call["eta"] = 0.0  # of TCDScheduler, which takes a pipeline's word for it
    scale = sampler.denoiser.default_scale
    return call if scale is None else call | {"guidance_scale": scale}


def own_card(info: Recipe, options: dict[str, Any], teacher: Teacher, sampler: Sampler, step: int) -> str:
    """README.md of a student whose network diffusers does not know."""
    values = metadata(teacher.source, None, info.name, {}, relation="finetune")
    return f"""{head(values)}# A {len(sampler.levels)}-step student of {teacher.source}

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
    rows = "\n".join(f"| {name} | {value} |" for name, value in public_options(options).items())
    return f"| option | value |\n|---|---|\n{rows}"


def model_card(
    info: Recipe,
    options: dict[str, Any],
    teacher: Teacher,
    sampler: Sampler,
    step: int,
    dtype: str | None = None,
    *,
    form: str = "pipeline",
    folder: Path | None = None,
    place: str | None = None,
    layout: str = "diffusers",
    others: Collection[int] = (),
) -> str:
    """README.md of a student: teacher, method, settings, license, and the lines that load it in stock diffusers.

    `form` is what the folder holds, as in its record; `folder` the folder itself, by which the card says what files
    there are; `place` the hub id that it is uploaded to; `layout` "comfyui" where it is for ComfyUI too; `others` the
    other numbers of steps that the folder serves.
    """
    levels = ", ".join(f"{level:g}" for level in sampler.levels)
    steps, network = len(sampler.levels), sampler.denoiser.network
    entry = FAMILIES.get(teacher.family, FAMILIES["unet2d"])
    subject, call = _call(entry, teacher, sampler)
    base = teacher_folder(teacher.source, entry)
    theirs = card_of(base)
    adapted = isinstance(network, AdaptedNetwork)
    kind = (dtype if form != "lora" else None) or _stored(entry, teacher)
    coded = adapted or student_rows(teacher, sampler) is not None
    where = _Lines(entry, teacher, sampler, call, kind, place or "FOLDER", coded)
    both = form == "pipeline" and isinstance(network, LoraNetwork) and entry.loads_lora
    lora = both and (folder is None or (folder / "lora").is_dir())
    one = experts_of(network) is None and _is_one_file(folder, entry)
    file = entry.single_file and form == "pipeline" and not adapted and one
    own = (entry.autoencoder is not None or others or coded) and not adapted
    values = metadata(teacher.source, entry, info.name, theirs, relation="adapter" if form == "lora" else "finetune")
    comfy = "" if layout != "comfyui" or folder is None else comfyui_note(entry, teacher, sampler, folder, form)
    what = "The LoRA is" if form == "lora" else "The network's weights are"
    return f"""{head(values)}# A {steps}-step student of {public_name(teacher.source)}

Distilled with diffdistill by {info.name} ({info.about.paper}), {step} steps.

{where.code(form)}
{where.lora() if lora else ""}{where.single_file() if file else ""}{comfy}
{where.own_pipeline(form, subject, others) if own else ""}The call makes {steps} step{"s" if steps > 1 else ""}, \
with the student's own scheduler in `scheduler/`{_code_of(sampler)}; the levels
(timestep or sigma) are {levels}. {what} stored in {_lora_type(dtype) if form == "lora" else kind}. diffdistill need \
not be installed. Image i
of `diffdistill sample --seed S` is that of `generator=torch.Generator().manual_seed(1_000_000 * S + i)`.

{license_note(teacher.source, base, theirs)}{_table(options)}
"""


def _code_of(sampler: Sampler) -> str:
    """What is said of the code of a scheduler that is not diffusers', and of the numbers of steps that it takes."""
    if not isinstance(sampler.denoiser, PolicyDenoiser):
        return ""
    *others, last = sorted({len(sampler.levels), *sampler.denoiser.settings.passes})
    listed = ", ".join(str(n) for n in others)
    return ", and its code" + (f", which takes {listed} or {last} steps" if others else "")


def _lora_type(dtype: str | None) -> str:
    return dtype or "float32"


def _is_one_file(folder: Path | None, entry: Family) -> bool:
    return folder is None or len(list((folder / entry.component).glob("*.safetensors"))) == 1


def _stored(entry: Family, teacher: Teacher) -> str:
    """The type that the teacher's files have, by its name in torch."""
    return str(stored_dtypes(local_folder(teacher.source) / entry.component)[1]).removeprefix("torch.")


def _reads_image(entry: Family, teacher: Teacher) -> bool:
    """Whether images come with its prompts, as a family needs them or as those of the training had them."""
    return entry.reads_image or (entry.several and "image_latents" in teacher.example_cond)


def _prompt(entry: Family, teacher: Teacher) -> str:
    """The prompt, by its name where it is not the first argument of the pipeline's call (FLUX.2 takes images first)."""
    if _reads_image(entry, teacher):
        return 'image=image, prompt="a prompt"'
    names = list(inspect.signature(diffusers_class(entry.pipelines[0]).__call__).parameters)
    return '"a prompt"' if names[:2] == ["self", "prompt"] else 'prompt="a prompt"'


def _call(entry: Family, teacher: Teacher, sampler: Sampler) -> tuple[str, str]:
    """What the pipeline draws, and all arguments of its call, as Python."""
    steps, network = len(sampler.levels), sampler.denoiser.network
    if entry.autoencoder is None:
        subject = "" if teacher.num_classes is None else "batch_size=4, class_labels=[0, 1, 2, 3]"
        arguments = [*filter(None, [subject]), *([f"num_inference_steps={steps}"] if steps > 1 else [])]
    else:
        subject = _prompt(entry, teacher) if entry.conditions == "text" else "class_labels=[0, 1, 2, 3]"
        arguments = [subject, *(f"{name}={value!r}" for name, value in student_call(teacher, sampler).items())]
    if isinstance(network, AdaptedNetwork):
        arguments.append(f"guidance_scale={float(network.guidance_scale):g}")
    return subject, ", ".join(arguments)


@dataclass(frozen=True)
class _Lines:
    """The lines of code in a card."""

    entry: Family
    teacher: Teacher
    sampler: Sampler
    call: str  #: the arguments of the pipeline's call
    dtype: str  #: of the pipeline
    place: str  #: where the student is
    coded: bool  #: the folder's index names a pipeline of its own, whose code loads with the folder

    @property
    def _base(self) -> str:
        """Where the teacher is: its hub id, or a word for its folder."""
        name = public_name(self.teacher.source)
        return name if "/" in name else "TEACHER"

    @property
    def _networks(self) -> list[str]:
        """The components that are the student's own."""
        times = [level * self.teacher.scheduler.get("num_train_timesteps", 1) for level in self.sampler.levels]
        return [*asked(self.sampler.denoiser.network, times)] or [self.entry.component]

    def _load_lora(self, where: str) -> list[str]:
        """The lines that load the LoRA, or two, from a folder."""
        files = zip((LORA, LORA_2), ("", ", load_into_transformer_2=True"), strict=True)
        lines = [f'pipeline.load_lora_weights({where}, weight_name="{file}"{more})' for file, more in files]
        return lines[: len(self._networks)]

    @property
    def _scheduler(self) -> str:
        return type(student_scheduler(self.teacher, self.sampler)).__name__

    @property
    def _type(self) -> str:
        return "" if self.dtype == "float32" else f", torch_dtype=torch.{self.dtype}"

    @property
    def _draw(self) -> str:
        """The call."""
        return f"images = pipeline({self.call}).{'frames' if self.entry.videos else 'images'}"

    def _loaded(self, place: str, more: str = "") -> str:
        """The arguments of `from_pretrained` that load a whole pipeline."""
        several = isinstance(self.sampler.denoiser.network, ClassExperts | EquilibriumTransformer)
        trusted = self.coded or several or isinstance(self.sampler.denoiser, PolicyDenoiser)
        source = f'"{place}"' + (", trust_remote_code=True" if trusted else "") + more
        if self.entry.autoencoder is not None:  # the parts that the teacher has not
            index = read_json(local_folder(self.teacher.source) / "model_index.json")
            nulls = null_parts(diffusers_class(self.entry.pipelines[0]), index)
            source += "".join(f", {name}=None" for name in nulls)
        return source + self._type

    def code(self, form: str) -> str:
        """How the student is loaded and called."""
        names, lines = ["DiffusionPipeline"], []
        if form == "pipeline":
            lines = [f"pipeline = DiffusionPipeline.from_pretrained({self._loaded(self.place)})"]
        elif form == "network":
            network = _name(self.entry.network)
            names += [network, self._scheduler]
            components = dict(zip(self._networks, ("network", "network_2"), strict=False))
            passed = "".join(f", {component}={name}" for component, name in components.items())
            index = read_json(local_folder(self.teacher.source) / "model_index.json")
            if len(components) == 1 and boundary_of(self.entry, index) is not None:
                passed += f", {self.entry.second}=None, boundary_ratio=None"
            lines = [
                *(
                    f'{name} = {network}.from_pretrained("{self.place}", subfolder="{component}"{self._type})'
                    for component, name in components.items()
                ),
                f'scheduler = {self._scheduler}.from_pretrained("{self.place}", subfolder="scheduler")',
                "pipeline = DiffusionPipeline.from_pretrained("
                f"{self._loaded(self._base, f'{passed}, scheduler=scheduler')})",
            ]
        else:
            names.append(self._scheduler)
            lines = [
                f"pipeline = DiffusionPipeline.from_pretrained({self._loaded(self._base)})",
                *self._load_lora(f'"{self.place}"'),
                f'pipeline.scheduler = {self._scheduler}.from_pretrained("{self.place}", subfolder="scheduler")',
            ]
        head = [f"# pip install {name}" for name in self.entry.packages]
        head += ([] if self.dtype == "float32" else ["import torch"]) + [f"from diffusers import {', '.join(names)}"]
        if _reads_image(self.entry, self.teacher):
            head.append("from diffusers.utils import load_image")
            size = f"({self.teacher.size['width']}, {self.teacher.size['height']})"
            use = "what the video begins with" if self.entry.videos else "what is to be changed"
            loaded = f'load_image("IMAGE").resize({size})'
            if self.entry.several and (example := self.teacher.example_cond.get("image_latents")) is not None:
                files = ", ".join(f'"IMAGE {k + 1}"' for k in range(example.shape[1]))
                loaded = f"[load_image(file).resize({size}) for file in [{files}]]"
            lines.append(f"image = {loaded}  # {use}")
        code = "\n".join(["```python", *head, "", *lines, self._draw, "```"])
        if form == "pipeline" or self._base != "TEACHER":
            return code
        name, file = public_name(self.teacher.source), Path(self.teacher.source)
        if not file.is_file():
            return f"{code}\n\n`TEACHER` is the folder of {name}, a pipeline of its own."
        whole = f'{_name(self.entry.pipelines[0])}.from_single_file("{name}").save_pretrained("TEACHER")'
        made = f", as `{whole}` writes it" if holds_pipeline(file) else ""
        return f"{code}\n\n`TEACHER` is a diffusers folder with the weights of `{name}`{made}."

    def lora(self) -> str:
        """How the LoRA beside a merged student is loaded."""
        lines = "\n".join(self._load_lora(f'"{self.place}", subfolder="lora"'))
        return f"""
The student's weights are its teacher's and a LoRA, which is in `lora/` alone, with a card of its own. On the teacher's
pipeline:

```python
{lines}
pipeline.scheduler = {self._scheduler}.from_pretrained("{self.place}", subfolder="scheduler")
{self._draw}
```
"""

    def single_file(self) -> str:
        """How the network alone is read as a single file."""
        network, component = _name(self.entry.network), self.entry.component
        place = self.place if self.place == "FOLDER" else f"https://huggingface.co/{self.place}/blob/main"
        file = f"{place}/{component}/diffusion_pytorch_model.safetensors"
        return f"""
The network's weights are one file, which `from_single_file` reads too:

```python
from diffusers import {network}

network = {network}.from_single_file("{file}", config="{self.place}", subfolder="{component}")
```
"""

    def own_pipeline(self, form: str, subject: str, others: Collection[int]) -> str:
        """How the file that gives the stock pipeline the student's own call, and other numbers of steps, is used."""
        known = ", ".join(str(n) for n in sorted([*others, len(self.sampler.levels)]))
        more = f"\nSo loaded, it draws in other numbers of steps too, `num_inference_steps=` one of {known}.\n"
        if self.coded:
            text = f"The levels are handed to the scheduler by `{FILE}`, without which the folder does not load."
            return f"{text}\n{more if others else ''}\n"
        use = f'custom_pipeline="{self.place}", trust_remote_code=True'
        text = f"These arguments are in `{FILE}` too, where `generator` seeds the noise of every step in any family:\n"
        if form != "pipeline":
            return f"{text}add `{use}` to `DiffusionPipeline.from_pretrained(..)`, and call `pipeline({subject})`.\n\n"
        loaded = f'`DiffusionPipeline.from_pretrained("{self.place}", {use})({subject})`.'
        return f"{text}{loaded}\n{more if others else ''}\n"


def _name(kind: str | type) -> str:
    return kind if isinstance(kind, str) else kind.__name__
