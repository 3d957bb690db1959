"""Options: dataclasses that the command line, YAML files and Python share; no torch is imported here.

Every option is a dataclass field with a help text. A method's options are its own `Config`; they are read
from the method's source without importing it, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError


def option(default: Any, help: str, *, above: float | None = None, at_least: float | None = None,
           below: float | None = None, at_most: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with a help text and, for numbers, its range."""
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FitConfig:
    """How long, how much at a time, and what is kept: the same for every training."""

    steps: int = option(1000, "iterations; a method's turns of one step count as one", at_least=1)
    batch_size: int = option(64, "samples in a step and process", at_least=1)
    seed: int = option(0, "all randomness and the order of the data are a function of it and the step", at_least=0)
    ema: float = option(0.0, "decay of the moving average that is evaluated and exported; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(10.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(0, "the learning rate rises linearly over so many steps", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option("constant", "cosine: it falls to zero by the end")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train; auto: a GPU if there is one")
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast of the networks; weights stay float32")
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw: fused; adamw8bit: moments in 8 bits, by the package bitsandbytes"
    )
    threads: int = option(0, "CPU threads of torch; 0: its own choice", at_least=0)
    log_every: int = option(20, "steps between two lines of metrics.jsonl", at_least=1)
    sample_every: int = option(200, "steps between two sample grids; 0: none", at_least=0)
    checkpoint_every: int = option(500, "steps between two checkpoints; 0: only at the end", at_least=0)
    keep_checkpoints: int = option(2, "checkpoints kept; older ones are removed", at_least=1)
    tracker: Literal["none", "tensorboard", "wandb"] = option("none", "also log there, through accelerate")


@dataclass(frozen=True)
class TrainConfig(FitConfig):
    """Distill a teacher into a few-step student."""

    method: str = option("dmd2", "a method's name (see `diffdistill methods`) or a file of your own, ./my_method.py")
    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    data: str | None = option(
        None,
        "real images: digits, a folder, .npz, .safetensors, a Hugging Face dataset; a method says if it needs any",
    )
    pairs: str | None = option(None, "a folder made by `diffdistill pairs`; a method says if it needs one")
    prompts: str | None = option(
        None, "for a latent teacher: a folder made by `diffdistill encode`, or a .txt or .jsonl, encoded at the start"
    )
    resolution: int | None = option(None, "pixels a side, for a latent teacher; default: its own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the teacher's own", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "the teacher's weights; those that are trained are float32"
    )
    student: Literal["full", "lora"] = option("full", "full: its own weights; lora: an adapter on the teacher's")
    fake_score: Literal["full", "lora"] = option("full", "the same for the fake score, in methods that have one")
    adapter_rank: int = option(64, "rank of LoRA players", at_least=1)
    adapter_alpha: float | None = option(None, "their scale is adapter_alpha / adapter_rank; default: 1", above=0)
    adapter_targets: str | None = option(
        None, "names of the layers they adapt, separated by commas, or all; default: the family's usual ones"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    out: str = option("runs/train", "the run folder")


@dataclass(frozen=True)
class EncodeConfig:
    """Encode prompts, or images with captions, once, so that training loads neither text encoder nor VAE."""

    teacher: str = option("", "the folder or hub id of a latent diffusion pipeline")
    prompts: str | None = option(
        None,
        "a .txt with a prompt on each line; .jsonl, .parquet or a Hugging Face dataset with a prompt, caption or text",
    )
    data: str | None = option(
        None,
        "images with captions (or classes): a folder, .parquet, .tar shards or a pattern of them, "
        "a Hugging Face dataset, shapes",
    )
    resolution: int | None = option(None, "pixels a side; default: the model's own", at_least=1)
    frames: int | None = option(None, "frames of a video; default: the model's own", at_least=1)
    embedded_guidance: float = option(3.5, "what a network with an embedded guidance scale (Flux) is told", at_least=0)
    count: int | None = option(None, "only so many, from the first on; default: all", at_least=1)
    streaming: bool = option(
        False, "read a Hugging Face dataset or .parquet files row by row, in order: only what is encoded is on disk"
    )
    batch_size: int = option(16, "prompts encoded at a time", at_least=1)
    shard_size: int = option(1024, "prompts in a file; a stopped run goes on from the last whole file", at_least=1)
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the text encoders and the autoencoder; what bfloat16 ones give is also stored in it"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to encode; auto: a GPU if there is one")
    out: str = option("runs/encoded", "the folder; the same command on an unfinished one goes on with it")


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """Train a teacher from data and save it as a diffusers folder."""

    architecture: Literal["unet2d", "stable-diffusion"] = option(
        "unet2d", "unet2d: of pixels and classes; stable-diffusion: of captions, with an autoencoder trained first"
    )
    steps: int = option(10000, "iterations", at_least=1)
    batch_size: int = option(128, "samples in a step and process", at_least=1)
    ema: float = option(0.999, "decay of the moving average that is saved; 0: none", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", at_least=0)
    warmup_steps: int = option(200, "the learning rate rises linearly over so many steps", at_least=0)
    checkpoint_every: int = option(2000, "steps between two checkpoints; 0: only at the end", at_least=0)
    sample_every: int = option(2000, "steps between two sample grids; 0: none", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "cosine: it falls to zero by the end")
    lr: float = option(1e-3, "AdamW's learning rate", above=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", at_least=0)
    data: str = option("digits", "digits, shapes, a folder, .npz, .safetensors, a Hugging Face dataset id or folder")
    resolution: int | None = option(None, "resize images to this many pixels; default: as they are", at_least=1)
    channels: Literal[1, 3] | None = option(None, "1: grey, 3: colour; default: as the data are")
    parameterization: Literal["vp", "flow", "edm"] = option(
        "vp",
        "vp: cosine schedule with zero terminal SNR and v; flow: linear flow matching; edm: Karras et al.",
    )
    label_dropout: float = option(0.1, "share of labels replaced by 'no class', for guidance", at_least=0, below=1)
    widths: str = option("32,64", "channels of the UNet's levels, separated by commas")
    layers: int = option(2, "residual blocks of a level", at_least=1)
    attention: str = option(
        "1", "levels with self-attention, from 0 (full resolution), separated by commas; '' for none"
    )
    dropout: float = option(0.0, "dropout of the UNet", at_least=0, below=1)
    vae_steps: int = option(1000, "stable-diffusion: iterations of the autoencoder, before the UNet's", at_least=1)
    vae_batch_size: int = option(32, "stable-diffusion: images in one of them", at_least=1)
    vae_widths: str = option("16,32,32", "stable-diffusion: channels of the autoencoder's levels")
    text_width: int = option(64, "stable-diffusion: of the text encoder, a multiple of 16", at_least=16)
    out: str = option("runs/teacher", "the run folder; the diffusers folder is its sub-folder 'teacher'")


@dataclass(frozen=True)
class PairsConfig:
    """Make noise-image pairs of a teacher, for the methods that want them."""

    teacher: str = option("digits", "a diffusers folder, a hub id, or 'digits', the embedded one")
    null_class: int | None = option(None, "the class label that means 'no class', if the teacher has one", at_least=0)
    prompts: str | None = option(None, "for a text-to-image teacher: a folder made by `diffdistill encode`")
    teacher_dtype: Literal["float32", "bfloat16"] = option("float32", "the teacher's weights, as in the training")
    count: int = option(2000, "pairs; all classes or prompts in turn", at_least=1)
    solver: Literal["ddim", "heun"] = option("ddim", "ddim: first order; heun: second, two network passes a step")
    sampling_steps: int = option(50, "the solver's steps, at the teacher's own times", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher (1: none)", at_least=0)
    seed: int = option(0, "pair i is a function of it and i, whatever the batch", at_least=0)
    batch_size: int = option(256, "pairs made at a time", at_least=1)
    shard_size: int = option(1024, "pairs in a file; a stopped run goes on from the last whole file", at_least=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to make them; auto: a GPU if there is one")
    out: str = option("runs/pairs", "the folder; the same command on an unfinished one goes on with it")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' where X is close to the name, else the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def coerce(name: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """The value as the option's type, from a string (command line) or a YAML scalar; UserError if it is not one."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if type(None) in options:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        options = tuple(o for o in options if o is not type(None))
    (kind,) = options
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if value == choice or str(value) == str(choice) or (value is False and choice == "no"):
                return choice
        raise UserError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")
    try:
        return _in_range(name, _scalar(value, kind), bounds)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{name}: {value!r} is not {words[kind]}") from None


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in _BOOLS:
            raise TypeError
        return _BOOLS[str(value).lower()]
    if isinstance(value, (bool, list, dict)) or value is None:
        raise TypeError
    if kind is int and isinstance(value, float) and value != int(value):
        raise TypeError
    return kind(value)


def _in_range(name: str, value: Any, bounds: Mapping[str, float]) -> Any:
    checks = {
        "above": (lambda v, b: v > b, "greater than"),
        "at_least": (lambda v, b: v >= b, "at least"),
        "below": (lambda v, b: v < b, "less than"),
        "at_most": (lambda v, b: v <= b, "at most"),
    }
    for key, bound in bounds.items():
        holds, words = checks[key]
        if not holds(value, bound):  # also false for nan
            raise UserError(f"{name}: {value} must be {words} {bound:g}")
    return value


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass from option values; UserError for a value that does not fit."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{name}: no such option; {nearest(name, known)}")
    fitted = {n: coerce(n, v, hints[n], known[n].metadata.get("bounds", {})) for n, v in values.items()}
    return cls(**fitted)


def split(values: Mapping[str, Any], first: type, second: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Option values parted over two dataclasses; UserError with the nearest name for one that neither has."""
    names = [f.name for f in dataclasses.fields(first)]
    others = [f.name for f in dataclasses.fields(second)]
    for name in values:
        if name not in names and name not in others:
            raise UserError(f"{name}: no such option; {nearest(name, names + others)}")
    return {n: v for n, v in values.items() if n in names}, {n: v for n, v in values.items() if n in others}


@dataclass(frozen=True)
class MethodInfo:
    """What a method's file says of itself, read without importing it."""

    name: str
    path: Path
    doc: str
    paper: str
    data: str
    equations: Mapping[str, str]
    presets: Mapping[str, Mapping[str, Any]]
    config: type
    end_to_end: Mapping[str, Any] | None = None  #: what its student should be on the plane (end_to_end.py)
    passes: Mapping[str, float] = field(default_factory=dict)  #: preset -> network passes that a step needs at least
    any_steps: bool = False  #: one student, sampled with any number of steps
    scales: Sequence[str] = ()  #: options that count training steps

    def load(self) -> types.ModuleType:
        """Import the method's module."""
        if self.path.parent == _methods_folder():
            return importlib.import_module(f"diffdistill.methods.{self.name}")
        name = f"diffdistill_method_{self.name}"  # a file called random.py must not hide the real one
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


_LITERALS = {"PAPER", "DATA", "EQUATIONS", "PRESETS", "END_TO_END", "PASSES", "ANY_STEPS", "SCALES"}


def _methods_folder() -> Path:
    spec = importlib.util.find_spec("diffdistill.methods")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def method_names() -> list[str]:
    return sorted(p.stem for p in _methods_folder().glob("*.py") if not p.stem.startswith("_"))


def describe_method(name: str) -> MethodInfo:
    """A method of ours by name, or of the user's by path; UserError with the nearest name if there is none."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"method: {name!r} is not a file")
    else:
        path = _methods_folder() / f"{name}.py"
        if name not in method_names():
            raise UserError(f"method: {name!r} is not known; {nearest(name, method_names())}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"method: {path} does not parse ({error})") from None
    said: dict[str, Any] = {}
    defined: set[str] = set()
    try:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                defined.add(node.targets[0].id)
                if node.targets[0].id in _LITERALS:
                    said[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined.add(node.name)
                if node.name == "Config":
                    said["Config"] = _config_class(node, path)
    except Exception as error:  # whatever the file's own text raises
        raise UserError(f"method: {path}, line {node.lineno}: {type(error).__name__}: {error}") from None
    missing = {"PAPER", "DATA", "EQUATIONS", "Config", "METHOD", "verify"} - defined
    if missing:
        raise UserError(f"method: {path} does not define {', '.join(sorted(missing))}; see CONTRIBUTING.md")
    config: type = said["Config"]
    clash = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(TrainConfig)}
    if clash:
        raise UserError(f"method: {path} has options of every training: {', '.join(sorted(clash))}; rename them")
    doc = ast.get_docstring(tree) or ""
    return MethodInfo(
        path.stem, path, doc, said["PAPER"], said["DATA"], said["EQUATIONS"], said.get("PRESETS", {}), config,
        said.get("END_TO_END"), said.get("PASSES", {}), said.get("ANY_STEPS", False), said.get("SCALES", ()),
    )  # fmt: skip


def _config_class(node: ast.stmt, path: Path) -> type:
    """The options class alone, executed with nothing but what an options class needs."""
    module = types.ModuleType(f"diffdistill._options.{path.stem}")
    module.__dict__.update({"dataclass": dataclass, "option": option, "Literal": Literal})
    sys.modules[module.__name__] = module  # get_type_hints looks names up there
    exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
    return module.__dict__["Config"]


def read_yaml(path: str) -> dict[str, Any]:
    """A flat mapping of option names to values; UserError for anything else."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: {path!r} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path!r} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"config: {path!r} is not a mapping of options to values")
    return {key.replace("-", "_"): value for key, value in values.items()}


def run_options(run: Path) -> dict[str, Any]:
    """The resolved options of a run folder; UserError if it is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {str(run)!r} is not a run folder; it has no config.yaml")
    return read_yaml(str(run / "config.yaml"))
