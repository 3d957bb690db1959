"""A teacher that is a base and LoRA files: merged once, into a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from diffdistill.environment import process_count
from diffdistill.errors import UserError, first_line, shown
from diffdistill.families import diffusers_class, family_of, local_folder, public_name
from diffdistill.families._folders import boundary_of
from diffdistill.families._parts import LOADING, copy_part, load_part
from diffdistill.files import atomic_folder
from diffdistill.pipelines.export import as_stored, other_parts
from diffdistill.pipelines.origin import card_of, copy_licenses

Lora = tuple[Path, float]
"""A file, and what its weights are multiplied by."""


def loras_of(texts: Sequence[str]) -> list[Lora]:
    """The files and scales of FILE or FILE:SCALE; UserError for what is no file."""
    found = []
    for text in texts:
        path, scale = Path(text), 1.0
        before, colon, after = text.rpartition(":")
        if colon and not path.exists():
            with suppress(ValueError):
                path, scale = Path(before), float(after)
        if not path.is_file() or path.suffix != ".safetensors":
            raise UserError(f"teacher_lora: {shown(text)} is no .safetensors file, nor one with :SCALE behind it")
        found.append((path, scale))
    return found


def merged_name(base: str, loras: Sequence[Lora]) -> str:
    """What the folder is called, by which a student's card names its teacher."""
    parts = [path.stem + ("" if scale == 1 else f"-{scale:g}") for path, scale in loras]
    return "+".join([public_name(base).rpartition("/")[2], *parts])


def merged_teacher(base: str, loras: Sequence[Lora], folder: Path) -> Path:
    """Write the pipeline of `base` with the LoRA files in its network's weights, whole or not at all.

    Its other parts are links to the base's, or copies where the file system has none. Raises UserError for a base whose
    stock pipeline loads no LoRA, and for a file that has nothing for its network, or something for another part.
    """
    if process_count() > 1:
        raise UserError("teacher_lora: several processes would each merge it; merge it in one, and give that folder")
    source = local_folder(base)
    family, index = family_of(source)
    if not family.loads_lora:
        raise UserError(f"teacher_lora: stock diffusers loads no LoRA on {family.class_names[0]}; leave it out")
    if boundary_of(family, index) is not None:
        raise UserError(
            "teacher_lora: the base has two networks, and a LoRA does not say which it is for; merge it by diffusers "
            "(load_lora_weights, fuse_lora, save_pretrained), and give that folder"
        )
    kind: Any = diffusers_class(family.pipelines[0])
    component = source / family.component
    network: Any = load_part(diffusers_class(family.network), component, torch.float32)
    for path, scale in loras:
        loaded = _read(kind, path)
        state, alphas = loaded[:2] if isinstance(loaded, tuple) else (loaded, None)
        others = {name.partition(".")[0] for name in state} - {family.component}
        if others or not state:
            what = f"nothing for {family.component}"
            if others:  # which encode the prompts, and long before this training
                what = (
                    f"something for {', '.join(sorted(others))}; fuse it into a folder (load_lora_weights, fuse_lora, "
                    "save_pretrained of diffusers), and encode and train with that"
                )
            raise UserError(f"teacher_lora: {path.name} has {what}")
        try:
            network.load_lora_adapter(state, prefix=family.component, network_alphas=alphas)
            network.fuse_lora(lora_scale=scale)
            network.unload_lora()
        except LOADING as error:
            raise UserError(
                f"teacher_lora: {path.name} does not fit {public_name(base)} ({first_line(error)})"
            ) from None
    with atomic_folder(folder, "model_index.json") as made:
        as_stored(network, component, None).save_pretrained(made / family.component)
        for part in other_parts(source, family):
            copy_part(part, made / part.name, link=True)
        shutil.copytree(source / "scheduler", made / "scheduler")
        (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        copy_licenses(source, made)
        head = card_of(source) | ({"base_model": base} if "/" in public_name(base) and not Path(base).exists() else {})
        text = ", ".join(f"{path.name} (scale {scale:g})" for path, scale in loras)
        (made / "README.md").write_text(
            f"---\n{yaml.safe_dump(head, allow_unicode=True) if head else ''}---\n\n{public_name(base)} with {text}.\n",
            encoding="utf-8",
        )
    return folder


def _read(kind: Any, path: Path) -> Any:
    """The file as the pipeline's class reads it, whoever wrote it."""
    try:
        return kind.lora_state_dict(str(path))
    except LOADING as error:
        raise UserError(f"teacher_lora: {path.name} cannot be read as a LoRA ({first_line(error)})") from None
