"""The parts of a pipeline's folder: which there are, the files of their weights, and how one is loaded or refused."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffdistill.errors import UserError, first_line
from diffdistill.files import json_of

Config = dict[str, Any]

LOADING = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError),
    *(ZeroDivisionError, SafetensorError),
)
"""What diffusers and transformers raise of files and configs that do not fit."""
PICKLED = [f"*.{kind}" for kind in ("bin", "msgpack", "ckpt", "pt", "pth", "onnx*")]
"""Weights that would have to be unpickled, or that are of another framework."""
LORA = "pytorch_lora_weights.safetensors"
"""The file of a LoRA, as `load_lora_weights` expects it."""
LORA_2 = "pytorch_lora_weights_2.safetensors"
"""That of the second network's, where there are two."""
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
_SPLIT = re.compile(r"-\d{5}-of-\d{5}")


def read_json(path: Path) -> Config:
    """A JSON object; UserError where there is none."""
    try:
        values = json_of(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"teacher: {path} is missing; a diffusers folder must have it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} is not readable JSON ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"teacher: {path} holds no JSON object; a diffusers folder's is one")
    return values


def part_config(folder: Path) -> Config:
    """folder/config.json, with the defaults of its diffusers class where the file leaves a key out."""
    config = read_json(folder / "config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not inspect.isclass(kind):
        return config
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def both_sides(size: Any) -> tuple[int, int] | None:
    """A config's sample_size, one number or two, as height and width; None where it is neither."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    return sides


def one_side(size: Any) -> int | None:
    """A config's sample_size as one number, of a list of equal ones too; None where it says nothing or two."""
    sides = both_sides(size)
    return sides[0] if sides and sides[0] == sides[1] else None


def sized(config: Config) -> Config:
    """The config with a sample_size of equal numbers as one, which every class takes."""
    side = one_side(config.get("sample_size"))
    return config if side is None else config | {"sample_size": side}


def parts_of(index: Config, kind: Any = None) -> list[str]:
    """The parts that a model_index.json names, each a sub-folder: [library, class], neither of them null.

    With the pipeline's class `kind`, only those that it takes: it may also name two texts that are none.
    """
    taken = None if kind is None else inspect.signature(kind.__init__).parameters
    named = [name for name, value in index.items() if name[:1] != "_" and _is_part(value)]
    return [name for name in named if taken is None or name in taken]


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def whole_index(kind: Any, index: Config) -> Config:
    """A model_index.json with [null, null] for the parts of the pipeline class that it has as a plain null."""
    parts, _ = kind._get_signature_keys(kind)
    return {name: [None, None] if value is None and name in parts else value for name, value in index.items()}


def student_index(kind: Any, index: Config, parts: Sequence[str], component: str, scheduler: Sequence[str]) -> Config:
    """The model_index.json of a student: its teacher's with another network and scheduler, and the parts that it has.

    `scheduler` is the library and the name of its class.
    """
    index = whole_index(kind, index)
    index |= {name: [None, None] for name in parts_of(index, kind) if name not in (*parts, component, "scheduler")}
    if index.get("safety_checker") == [None, None] and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index.pop("_name_or_path", None)
    return index | {"_class_name": kind.__name__, "scheduler": [*scheduler]}


def null_parts(kind: Any, index: Config) -> list[str]:
    """The parts that the pipeline class must be told are None, since its index has null for them."""
    parts, _ = kind._get_signature_keys(kind)
    nulls = [name for name, value in index.items() if name in parts and value in (None, [None, None])]
    return [name for name in nulls if name not in kind._optional_components]


def part_class(entry: Sequence[str]) -> Any:
    """The class of a part that diffusers, one of its pipelines (a network) or transformers has; None of another."""
    library, name = entry[0], entry[1]
    if library in ("diffusers", "transformers"):
        return getattr(importlib.import_module(library), name, None)
    if not library.isidentifier() or importlib.util.find_spec(f"diffusers.pipelines.{library}") is None:
        return None
    kind = getattr(importlib.import_module(f"diffusers.pipelines.{library}"), name, None)
    return kind if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin) else None


def one_of_each(folder: Path) -> tuple[list[Path], str | None]:
    """The plain safetensors files of a part, which may be none, or else those of one variant and its name."""
    named = {path: _variant(path.name) for path in sorted(folder.glob("*.safetensors"))}
    variants = sorted(set(named.values()), key=lambda name: (name is not None, name != "fp16", name or ""))
    return [path for path, variant in named.items() if variant == variants[0]], variants[0] if variants else None


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a part and their variant: None, or 'fp16' where there are only *.fp16.safetensors.

    Raises UserError where there are none, or one is not whole.
    """
    files, variant = one_of_each(folder)
    if not files:
        if any(path.suffix in (".bin", ".ckpt", ".pt", ".pth") for path in folder.glob("*")):
            raise UserError(
                f"teacher: {folder} has no .safetensors weights, and others would be unpickled, which is not done; "
                "load the pipeline where you trust it, and save_pretrained(.., safe_serialization=True)"
            )
        raise UserError(
            f"teacher: {folder} has no .safetensors weights, neither plain ones nor a variant's (*.fp16.safetensors); "
            "save it with safe_serialization=True"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"teacher: {file} is not a whole safetensors file ({first_line(error)})") from None
    return files, variant


def _variant(name: str) -> str | None:
    """model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and its later form: 'fp16'."""
    parts = _SPLIT.sub("", name).split(".")
    return parts[1] if len(parts) > 2 else None


def stored_dtypes(folder: Path) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """The half precision types of a part's weights by their names, and the type that most numbers have."""
    types: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for file in weight_files(folder)[0]:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, which is no mapping
                row = tensors.get_slice(name)
                kind = _HALF.get(row.get_dtype(), torch.float32)
                sizes[kind] += prod(row.get_shape())
                if kind is not torch.float32:
                    types[name] = kind
    return types, sizes.most_common(1)[0][0] if sizes else torch.float32


def empty_part(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network of a part's config, on the meta device: no file of weights is read. UserError for another config."""
    path = folder / "config.json"
    try:
        with torch.device("meta"):
            if kind.__module__.startswith("transformers"):
                network = kind(kind.config_class.from_pretrained(folder))
            else:
                network = kind.from_config({k: v for k, v in sized(read_json(path)).items() if k[:1] != "_"})
    except UserError:
        raise
    except Exception as error:  # a config may hold anything
        raise UserError(f"teacher: {path} is no config of {kind.__name__} ({first_line(error)})") from error
    return nn.Module.to(network, dtype).eval()


def load_part(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network of diffusers or transformers in this type; UserError unless the files hold every weight of it."""
    _, variant = weight_files(folder)
    named: dict[str, Any] = {"dtype": dtype}
    if not kind.__module__.startswith("transformers"):
        # diffusers makes float32 of any file; told to, it lays weights out otherwise, and sums round otherwise.
        named = {} if dtype == torch.float32 else {"torch_dtype": dtype}
        values = read_json(folder / "config.json")
        named |= {key: value for key, value in sized(values).items() if value != values[key]}
    try:
        network, report = kind.from_pretrained(
            folder, use_safetensors=True, variant=variant, output_loading_info=True, **named
        )
    except LOADING as error:
        raise UserError(f"teacher: {folder} does not load as {kind.__name__} ({first_line(error)})") from error
    tensors = dict(network.named_parameters())
    parameters = {name for name in report["missing_keys"] if name in tensors}
    tensors |= dict(network.named_buffers())
    missing = sorted(parameters | {name for name, tensor in tensors.items() if tensor.is_meta})
    extra = sorted(name for name in report["unexpected_keys"] if not name.endswith("position_ids"))
    if missing:
        hint = _hint(extra)
        raise UserError(f"teacher: {folder} does not load as {kind.__name__} (it has no {missing[0]}){hint}")
    if _hint(extra):
        raise UserError(f"teacher: {folder} holds more than a {kind.__name__} ({extra[0]}){_hint(extra)}")
    if extra:
        more = f"{len(extra)} weights that {kind.__name__} does not have, {extra[0]} first"
        print(f"note: teacher: {folder} holds {more}; they are left out", file=sys.stderr)
    return network


def _hint(extra: Iterable[str]) -> str:
    """What is wrong with a file whose weights have these names besides those of the network; '' if that is unknown."""
    names = list(extra)
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return "; a LoRA is active in it: fuse_lora(), then unload_lora_weights(), then save the pipeline again"
    if any(name.startswith("_orig_mod.") for name in names):
        return "; its names begin with _orig_mod.: save the module that torch.compile was given"
    if any(name.startswith("module.") for name in names):
        return "; its names begin with module.: save the module that is inside of the wrapper"
    return ""


def _linked(source: str, to: str) -> str:
    """Copy a file, or give its weights a second name where the file system can."""
    if source.endswith(".safetensors"):
        try:
            os.link(os.path.realpath(source), to)
            return to
        except OSError:  # another file system, or none with links
            pass
    return shutil.copy2(source, to)


def copy_part(part: Path, folder: Path, link: bool = False) -> None:
    """Copy a part to `folder`, with its safetensors weights once, under their plain names.

    `link`: the weights are hard links to the teacher's, where that can be.

    A half precision network of transformers is told to load in float32 where the user names no type, which is what
    diffusers does with its own: a pipeline of two types does not run.
    """
    left_out = [*PICKLED]
    variant = None
    if any(part.glob("*.safetensors")):
        _, variant = weight_files(part)
        others = {_variant(path.name) for path in part.glob("*.safetensors")} - {None, variant}
        left_out += [f"*.{name}*" for name in others]
    copy = _linked if link else shutil.copy2
    shutil.copytree(part, folder, ignore=shutil.ignore_patterns(*left_out), copy_function=copy)
    if variant is not None:
        for path in sorted(folder.glob(f"*.{variant}*")):
            if path.suffix == ".json":
                text = path.read_text(encoding="utf-8")
                path.write_text(text.replace(f".{variant}", ""), encoding="utf-8")
            path.rename(path.with_name(path.name.replace(f".{variant}", "")))
    config = folder / "config.json"
    if config.is_file() and any(folder.glob("*.safetensors")):
        values = read_json(config)
        if "_class_name" not in values and stored_dtypes(folder)[1] is not torch.float32:
            config.write_text(json.dumps(_in_float32(values), indent=2) + "\n", encoding="utf-8")


def _in_float32(values: Config) -> Config:
    """A transformers config, and those inside of it, that says float32."""
    inner = {
        name: _in_float32(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in values.items()
    }
    return {name: value for name, value in inner.items() if name != "torch_dtype"} | {"dtype": "float32"}
