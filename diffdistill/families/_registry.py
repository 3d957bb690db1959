"""Which families there are: those of this package, one file each, and those that are registered from outside."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from difflib import get_close_matches
from pathlib import Path

import diffusers

from diffdistill.errors import UserError, first_line, shown
from diffdistill.families._family import Autoencoder, Family, Text
from diffdistill.families._hints import hint_for_folder
from diffdistill.families._not_yet import reason_of
from diffdistill.families._own import WEIGHTS
from diffdistill.families._parts import Config, read_json

FAMILIES: dict[str, Family] = {
    module.name: importlib.import_module(f"diffdistill.families.{module.name}").FAMILY
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if not module.name.startswith("_")
}
"""By name; of two that cover a pipeline, the first reads it."""


def register_family(family: Family | str | Path) -> Family:
    """Let a family from outside the package read teachers and save students, before those of the package; returns it.

    `family` is a `Family`, or a .py file that defines FAMILY. Raises UserError for a file that does not, and for the
    name of a family of the package.
    """
    own = family if isinstance(family, Family) else _family_in(Path(family))
    _check_fields(own)
    if own.name in _OURS:
        raise UserError(f"family: {own.name!r} is the name of a family of diffdistill; choose another")
    others = {name: entry for name, entry in FAMILIES.items() if name != own.name}
    FAMILIES.clear()
    FAMILIES.update({own.name: own} | others)
    return own


_OURS = frozenset(FAMILIES)


def from_outside() -> list[Family]:
    """The families that are registered besides those of the package."""
    return [family for name, family in FAMILIES.items() if name not in _OURS]


def _check_fields(family: Family) -> None:
    """UserError for a field that is not what it must be."""

    def known(kind: object) -> bool:
        return inspect.isclass(kind) or (isinstance(kind, str) and hasattr(diffusers, kind))

    texts = {name: getattr(family, name) for name in ("name", "models", "component")}
    rows: list[tuple[str, object, bool, str]] = [
        *((name, value, isinstance(value, str) and bool(value), "a text") for name, value in texts.items()),
        (
            "pipelines",
            family.pipelines,
            # The first is loaded and saved; others may be names in folders of another library.
            isinstance(family.pipelines, tuple) and bool(family.pipelines) and known(family.pipelines[0]),
            "a tuple of classes or names, the first a class or the name of one in diffusers",
        ),
        ("network", family.network, known(family.network), "a class, or the name of one in diffusers"),
        ("conditions", family.conditions, family.conditions in _CONDITIONS, f"one of {', '.join(_CONDITIONS)}"),
        ("teacher", family.teacher, callable(family.teacher), "a function of the network and its Source"),
        ("arguments", family.arguments, callable(family.arguments), "a function of the number of steps"),
        ("guided", family.guided, family.guided is None or callable(family.guided), "a function of the scale, or None"),
        ("autoencoder", family.autoencoder, isinstance(family.autoencoder, Autoencoder | None), "an Autoencoder"),
        ("text", family.text, isinstance(family.text, Text | None), "a Text"),
        (
            "text",
            family.text,
            (family.text is not None) == (family.conditions == "text"),
            "there for the conditions 'text', and None for others",
        ),
    ]
    for name, value, right, what in rows:
        if not right:
            raise UserError(f"family: {shown(family.name)}: its {name} is {shown(value)}; it must be {what}")
    if not isinstance(family.lora_targets, tuple | None):
        raise UserError(f"family: {shown(family.name)}: its lora_targets must be a tuple of names, or None for all")


_CONDITIONS = ("none", "classes", "text")


def _family_in(path: Path) -> Family:
    name = f"diffdistill_family_{path.stem}"  # a file called random.py must not hide the real one
    spec = importlib.util.spec_from_file_location(name, path)
    if path.suffix != ".py" or not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"family: {str(path)!r} is no Python file; give one that defines FAMILY")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"family: {path} cannot be imported ({type(error).__name__}: {first_line(error)})") from error
    own = vars(module).get("FAMILY")
    if not isinstance(own, Family):
        raise UserError(f"family: {path} does not define FAMILY, a diffdistill.families.Family")
    return own


def family_of(folder: Path) -> tuple[Family, Config]:
    """The family of a diffusers folder and its model_index.json; UserError where none reads it."""
    if not (folder / "model_index.json").exists() and (folder / WEIGHTS).exists():
        raise UserError(
            f"teacher: {folder} holds a network that is not in diffusers; load it by load_student(folder, network=..)"
        )
    if folder.is_dir() and not (folder / "model_index.json").exists():
        hint = hint_for_folder(folder)
        place = folder.name if "python -c" in hint else folder  # the command must fit
        raise UserError(f"teacher: {place} has no model_index.json{hint}")
    index = read_json(folder / "model_index.json")
    name, own = index.get("_class_name"), None
    if isinstance(name, list) and len(name) == 2:  # of a file in the folder, [file, class]
        own, name = name
        name = str(name).removeprefix("Student")  # of a folder of ours
    family = next((f for f in FAMILIES.values() if name in f.class_names), None)
    if family is None and own is not None:
        raise UserError(
            f"teacher: {folder} carries a pipeline of its own, {own}.py, whose code is run only if you say so: by "
            "DiffusionPipeline.from_pretrained(.., trust_remote_code=True), or `diffdistill eval --trust-remote-code`"
        )
    if family is None:
        near = get_close_matches(str(name), [n for f in FAMILIES.values() for n in f.class_names], n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}? " if near else ""
        if reason := reason_of(str(name)):
            raise UserError(f"teacher: {name} is not supported: {reason}; `diffdistill families` lists what is")
        raise UserError(
            f"teacher: pipeline class {shown(name)} is not supported; {hint}`diffdistill families` lists those that "
            "are, and `diffdistill family-check` says what a family file for it must have"
        )
    return family, index
