"""What a file or folder is that is no diffusers pipeline, and the command that makes a pipeline's folder of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from diffdistill.families._parts import read_json

SINGLE = (".safetensors", ".sft")
"""How single files that are read end."""
CHECKPOINTS = (".safetensors", ".sft", ".ckpt", ".bin", ".pt", ".pth", ".gguf")

_LORA = "'); p.fuse_lora(); p.unload_lora_weights(); p.save_pretrained('FOLDER')\""
_KINDS = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "sana": "SanaPipeline",
    "wan-t2v": "WanPipeline",
    "z-image": "ZImagePipeline",
}
"""Pipelines by the beginnings of what diffusers calls a checkpoint's kind."""


def hint_for_file(path: Path) -> str:
    """What one file with weights is, and the command that makes a diffusers folder of it."""
    shapes = _shapes(path)
    if is_lora(path):
        return f"a LoRA; {_with_lora('BASE', path.name)}"
    kind = _pipeline_of(shapes)
    if kind is None and shapes:
        return (
            "one file, and a diffusers folder is needed; make one by save_pretrained('FOLDER') of the pipeline that "
            "its makers name, or by from_single_file of that pipeline's class"
        )
    name = kind or "StableDiffusionPipeline"
    others = "" if kind else " (or the pipeline class of its kind)"
    return (
        f'one file, and a diffusers folder is needed; make one: python -c "from diffusers import {name} as P; '
        f"P.from_single_file('{path.name}').save_pretrained('FOLDER')\"{others}"
    )


def hint_for_folder(folder: Path) -> str:
    """What a folder without model_index.json is, and what to do with it."""
    lora = next((file for file in folder.glob("*.safetensors") if "lora" in file.name.lower()), None)
    if (folder / "adapter_config.json").is_file() or lora is not None:
        base = "BASE"
        if (folder / "adapter_config.json").is_file():
            base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or base)
        return f"; it holds a LoRA; {_with_lora(base, folder.name)}"
    if (folder / "config.json").is_file():
        return "; it holds one network: give the folder of the whole pipeline"
    single = [path for path in sorted(folder.glob("*")) if path.suffix in CHECKPOINTS]
    if single:
        return f"; it holds {single[0].name}, which is {hint_for_file(single[0])}"
    return ", which a diffusers folder must have"


def _with_lora(base: str, lora: str) -> str:
    return (
        'fuse it: python -c "from diffusers import DiffusionPipeline as P; '
        f"p = P.from_pretrained('{base}'); p.load_lora_weights('{lora}{_LORA}"
    )


def tensors_in(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (type as the file says it, shape) of a safetensors file's tensors; none of a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            rows = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, which is no mapping
            return {name: (row.get_dtype(), row.get_shape()) for name, row in rows.items()}
    except (SafetensorError, OSError):
        return {}


def is_lora(path: Path) -> bool:
    """Whether a file with weights is a LoRA's."""
    return any(".lora" in name or name.startswith("lora_") for name in tensors_in(path))


def is_single_file(path: Path) -> bool:
    """Whether a file has the weights of a network, and so no images; not of a LoRA."""
    return path.suffix in SINGLE and any("." in name for name in tensors_in(path)) and not is_lora(path)


def default_repository(path: Path) -> str | None:
    """The hub's repository whose configs diffusers takes for such a file; None where it does not know the file."""
    shapes = _shapes(path)
    if _pipeline_of(shapes) is None:
        return None
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(dict(shapes))["pretrained_model_name_or_path"])


def _shapes(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, without their values; none of a file that is none."""
    return {name: torch.empty(shape, device="meta") for name, (_, shape) in tensors_in(path).items()}


def _pipeline_of(shapes: dict[str, Any]) -> str | None:
    """The stock pipeline class whose `from_single_file` reads such weights; None where that is not known."""
    try:
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type

        kind = infer_diffusers_model_type(dict(shapes)) if shapes else ""
    except Exception:  # whatever a later diffusers makes of it
        return None
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in shapes):
        return None  # which is what diffusers calls all that it does not know
    name = next((name for beginning, name in _KINDS.items() if str(kind).startswith(beginning)), None)
    return name if name is not None and hasattr(getattr(diffusers, name, None), "from_single_file") else None
